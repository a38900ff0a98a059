"""How far policy and reference are apart along a completion, and where a pair's two completions part."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def thirds(values: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Means of per-token values [..., L] at the first scored token and over the first, second and last third of every
    completion's scored tokens; a third without tokens is 0. mask: bool [..., L]."""
    rank = jnp.cumsum(mask, -1) - 1
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    third = (3 * rank) // count
    mean = lambda where: jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)
    return {"first": mean(mask & (rank == 0)),
            **{name: mean(mask & (third == number)) for number, name in enumerate(("begin", "middle", "end"))}}


def first_divergence(targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(slot int [B], whether there is one bool [B]): the first slot whose tokens differ while both are scored.

    targets int [B,2,L], mask bool [B,2,L]; slots count from the completions' common beginning, so that both see the
    same prefix there.
    """
    differ = (targets[:, 0] != targets[:, 1]) & mask[:, 0] & mask[:, 1]
    same_before = jnp.cumprod((targets[:, 0] == targets[:, 1]) & (mask[:, 0] == mask[:, 1]), -1)
    reached = differ & (jnp.pad(same_before, ((0, 0), (1, 0)), constant_values=1)[:, :-1] > 0)
    return reached.argmax(-1), reached.any(-1)
