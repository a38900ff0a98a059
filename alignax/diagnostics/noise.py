"""Per-example gradient norms and the simple noise scale of gradients (McCandlish et al., arXiv 1812.06162)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def estimates(small: Any, big: Any, small_size: float, big_size: float) -> tuple[jax.Array, jax.Array]:
    """Unbiased (|G|^2, trace of the per-example covariance) from squared gradient norms at two batch sizes.

    small, big: E |g|^2 of mean gradients over small_size and big_size examples, small_size < big_size. |G|^2 may come
    out negative by chance. Average both over steps before dividing: B_simple = trace / |G|^2.
    """
    signal = (big_size * big - small_size * small) / (big_size - small_size)
    return signal, (small - big) / (1 / small_size - 1 / big_size)


def per_example(gradient: Callable[[Any], Any], params: Any, parts: Any) -> tuple[jax.Array, jax.Array]:
    """(squared norms of every example's gradient [n], squared norm of their mean).

    gradient(part) -> the gradient of one example's loss, like params; parts: leaves with a leading axis of n examples.
    """
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.float32, p.dtype)), params)

    def one(total, part):
        found = jax.tree.map(lambda z, g: g.astype(z.dtype), zeros, gradient(part))
        return jax.tree.map(jnp.add, total, found), optax.tree.vdot(found, found)

    total, squares = jax.lax.scan(one, zeros, parts)
    return squares, optax.tree.vdot(total, total) / squares.shape[0] ** 2


def numbers(squares: jax.Array, mean_square: jax.Array) -> dict[str, jax.Array]:
    """Scalars for a log: mean, median and largest norm, and the two estimates from batch sizes 1 and n >= 2."""
    norms = jnp.sqrt(squares)
    signal, trace = estimates(squares.mean(), mean_square, 1, squares.shape[0])
    return {"norm_mean": norms.mean(), "norm_median": jnp.median(norms), "norm_max": norms.max(), "signal": signal,
            "trace": trace}
