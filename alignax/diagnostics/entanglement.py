"""Gradient entanglement: the inner product of the chosen's and the rejected's log-prob gradients, and what it breaks.

Source: A Common Pitfall of Margin-based Language Model Alignment (arXiv 2410.13828); fidelity: paper. The conditions
hold for a small step of gradient descent; under Adam they may tell the wrong sign, and diagnostics.attribution does
not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Products(NamedTuple):
    """|g_w|^2, |g_l|^2 and <g_w, g_l> of gradients of log pi(chosen) and log pi(rejected); floats of any one shape."""

    chosen: jax.Array
    rejected: jax.Array
    inner: jax.Array


def products(chosen: Any, rejected: Any) -> Products:
    """The products of two gradient trees, in float32 or wider."""
    wide = lambda tree: jax.tree.map(lambda g: g.astype(jnp.promote_types(jnp.float32, g.dtype)), tree)
    chosen, rejected = wide(chosen), wide(rejected)
    dot = optax.tree.vdot
    return Products(dot(chosen, chosen), dot(rejected, rejected), dot(chosen, rejected))


def per_example(logps: Callable[[Any, Any], jax.Array], params: Any, parts: Any) -> tuple[Products, Products]:
    """(products of every pair [n], those of the mean gradients), from a loop that holds one pair at a time.

    logps(params, part) -> [1, K >= 2], the log-probs of one pair, chosen first. parts: a tree whose leaves begin with
    the axis of the pairs (step.split_batch with as many parts as pairs).
    """
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.float32, p.dtype)), params)

    def one(sums, part):
        values, pull = jax.vjp(lambda p: logps(p, part)[0], params)
        unit = lambda k: jnp.zeros_like(values).at[k].set(1)
        grads = pull(unit(0))[0], pull(unit(1))[0]
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), products(*grads)

    sums, each = jax.lax.scan(one, (zeros, zeros), parts)
    count = each.inner.shape[0]
    return each, Products(*(value / count ** 2 for value in products(*sums)))


def first_order(found: Products, pull: Any, push: Any) -> tuple[jax.Array, jax.Array]:
    """(change of log pi(chosen), of log pi(rejected)) per unit of step size of one gradient step on the pair.

    pull: d_w = -dL/dlog pi(chosen); push: d_l = dL/dlog pi(rejected). The changes are d_w |g_w|^2 - d_l <g_w, g_l> and
    d_w <g_w, g_l> - d_l |g_l|^2.
    """
    return pull * found.chosen - push * found.inner, pull * found.inner - push * found.rejected


def numbers(each: Products, mean: Products, pull: Any = 1.0, push: Any = 1.0) -> dict[str, jax.Array]:
    """Scalars for a log from the products of n pairs and of their mean gradients. pull, push: [n] or scalars, as
    first_order takes them (equal ones unless told).

    chosen_falls: share of pairs whose condition for a rising chosen, <g_w, g_l> <= (d_w/d_l) |g_w|^2, is violated;
    rejected_rises: of that for a falling rejected, <g_w, g_l> <= (d_l/d_w) |g_l|^2. condition_ratio: the mean of
    <g_w, g_l> / min(|g_w|^2, |g_l|^2), above 1 entangled. Norms are means over the pairs; batch_ are those of the
    mean gradients.
    """
    up, down = first_order(each, pull, push)
    tiny = jnp.finfo(each.inner.dtype).tiny
    share = lambda found: found.inner / jnp.maximum(jnp.sqrt(found.chosen) * jnp.sqrt(found.rejected), tiny)
    return {
        "norm_chosen": jnp.sqrt(each.chosen).mean(), "norm_rejected": jnp.sqrt(each.rejected).mean(),
        "inner": each.inner.mean(), "cosine": share(each).mean(),
        "condition_ratio": (each.inner / jnp.maximum(jnp.minimum(each.chosen, each.rejected), tiny)).mean(),
        "chosen_falls": (up < 0).mean(), "rejected_rises": (down > 0).mean(),
        "batch_norm_chosen": jnp.sqrt(mean.chosen), "batch_norm_rejected": jnp.sqrt(mean.rejected),
        "batch_cosine": share(mean),
    }
