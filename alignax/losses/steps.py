"""What step and turn ids say about tokens: the order of steps, sums over a step, what comes later.

steps: int [..., L], the step or turn of a token, -1 outside; equal ids side by side among the tokens that count are one
step. mask: bool [..., L]. A token is live where it is scored and belongs to a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.losses.inputs import floats


class Order(NamedTuple):
    """Which tokens belong to which step.

    live: bool [..., L]. opens: bool [..., L], the first live token of each step. rank: int32 [..., L], steps numbered
    0, 1, ... in the order in which they stand, 0 where not live. count: int32 [...], the number of steps.
    """

    live: jax.Array
    opens: jax.Array
    rank: jax.Array
    count: jax.Array


def order(steps: Any, mask: Any) -> Order:
    """The `Order` of step ids [..., L] under a mask [..., L]."""
    steps = jnp.asarray(steps)
    live = jnp.asarray(mask, bool) & (steps >= 0)
    before = last_place(live)
    previous = jnp.take_along_axis(steps, jnp.maximum(before, 0), -1)
    opens = live & ((before < 0) | (previous != steps))
    rank = jnp.where(live, jnp.cumsum(opens, -1) - 1, 0)
    return Order(live, opens, rank.astype(jnp.int32), opens.sum(-1))


def places(shape: tuple[int, ...]) -> jax.Array:
    """int32 of this shape: the index along the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def last_place(live: jax.Array) -> jax.Array:
    """int32 [..., L]: where the live token before this one stands, -1 where there is none."""
    seen = jax.lax.cummax(jnp.where(live, places(live.shape), -1), axis=live.ndim - 1)
    return jnp.concatenate([jnp.full_like(seen[..., :1], -1), seen[..., :-1]], -1)


def next_value(x: jax.Array, live: jax.Array) -> jax.Array:
    """x [..., L] at the next live token; 0 after the last one."""
    length = live.shape[-1]
    seen = jax.lax.cummin(jnp.where(live, places(live.shape), length), axis=live.ndim - 1, reverse=True)
    after = jnp.concatenate([seen[..., 1:], jnp.full_like(seen[..., :1], length)], -1)
    some = after < length
    found = jnp.take_along_axis(jnp.where(live, x, 0), jnp.where(some, after, 0), -1)
    return jnp.where(some, found, 0)


def step_sums(x: jax.Array, rank: jax.Array, live: jax.Array) -> jax.Array:
    """[..., L] or [..., L, D] -> the same shape: entry s of the token axis is the sum over the tokens of step s."""
    rows, size = rank.ndim - 1, rank.shape[-1]
    mask = live.reshape(live.shape + (1,) * (x.ndim - live.ndim))
    flat = jnp.where(mask, x, 0).reshape((-1, size) + x.shape[rows + 1:])
    add = jax.vmap(lambda values, index: jnp.zeros_like(values).at[index].add(values))
    return add(flat, rank.reshape(-1, size)).reshape(x.shape)


def from_here(x: jax.Array) -> jax.Array:
    """[..., L]: the sum of x over this token and all later ones."""
    return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def ratios(token_logps: Any, ref_token_logps: Any, mask: jax.Array) -> jax.Array:
    """l_t = log pi(y_t) - log pi_ref(y_t), 0 outside the mask; no gradient into the reference."""
    reference = jax.lax.stop_gradient(jnp.where(mask, floats(ref_token_logps), 0))
    return jnp.where(mask, floats(token_logps), 0) - reference
