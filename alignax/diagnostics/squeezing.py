"""The squeezing effect: where the mass goes that a negative gradient frees (arXiv 2407.10490)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def step_factors(p: jax.Array, index: int, eta: Any) -> jax.Array:
    """p'/p of every answer after one step of size eta on the logits of a softmax that lowers log p[index]; p: [V].

    Logits move by eta p_j, that of `index` by -eta (1 - p_index), then mass is renormalised: the others' factors grow
    with p_j, and the likeliest answer gains most. A negative eta raises log p[index].
    """
    shift = eta * (p - jax.nn.one_hot(index, p.shape[-1], dtype=p.dtype))
    return jnp.exp(shift) / (p * jnp.exp(shift)).sum()


def moved(before: jax.Array, after: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    """What became of next-token distributions: log-probs before and after [..., V], target int [...], the token pushed.

    Returns arrays [...]: freed (what the target lost, at least 0), top_gain (what the likeliest other token of before
    gained), top_log_ratio (log of its p'/p), other_log_ratio (that of the mass of all the rest together), fell (share
    of the tokens beside the target whose probability fell).
    """
    vocabulary = before.shape[-1]
    is_target = jax.nn.one_hot(target, vocabulary, dtype=bool)
    floor = jnp.finfo(before.dtype).min / 4
    top = jnp.where(is_target, floor, before).argmax(-1)
    pick = lambda logp, index: jnp.take_along_axis(logp, index[..., None], -1)[..., 0]
    rest = ~is_target & ~jax.nn.one_hot(top, vocabulary, dtype=bool)
    mass = lambda logp: jax.nn.logsumexp(jnp.where(rest, logp, floor), -1)
    others = vocabulary - 1
    return {
        "freed": jnp.maximum(jnp.exp(pick(before, target)) - jnp.exp(pick(after, target)), 0),
        "top_gain": jnp.exp(pick(after, top)) - jnp.exp(pick(before, top)),
        "top_log_ratio": pick(after, top) - pick(before, top),
        "other_log_ratio": mass(after) - mass(before),
        "fell": ((after < before) & ~is_target).sum(-1) / others,
    }


def numbers(found: dict[str, jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """Scalars for a log: means over the scored slots `mask` of `moved`, and `to_top`, the likeliest token's gain over
    what the targets lost (0 where nothing was lost)."""
    count = jnp.maximum(mask.sum(), 1)
    mean = {name: jnp.where(mask, value, 0).sum() / count for name, value in found.items()}
    lost = mean["freed"] > 0
    return {**mean, "to_top": jnp.where(lost, mean["top_gain"] / jnp.where(lost, mean["freed"], 1), 0.0)}
