"""Attention in blocks of queries and of keys, written in plain JAX: for CPUs, which no kernel serves.

Scores of one pair of blocks stay in the processor's cache; those of whole rows travel to memory and back several times,
which takes longer than the products. A pair of blocks in which nobody reads anybody is skipped: what is above the
diagonal, and in rows of several segments what lies between segments that do not read each other.

Softmax by running maxima and sums (arXiv 2205.14135; the backward pass recomputes the scores from the log of the sums,
arXiv 2307.08691). It has a backward pass of its own, so that forward mode does not go through it, though forward over
reverse does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Array

BLOCK = 128  # columns; half or twice of it is slower


class _Shape(NamedTuple):
    """rows, blocks, columns of a block, groups of heads, heads of a group, width of a head; static settings."""

    rows: int
    count: int
    block: int
    groups: int
    heads: int
    width: int
    scale: float
    softcap: float | None


def attend_blocks(query: Array, key: Array, value: Array, mask: Array, *, scale: float,
                  softcap: float | None = None) -> Array:
    """attention.attend without bias for a causal mask bool [R,T,T]: query [R,T,H,h]; key, value [R,T,G,h] -> [R,T,H,h].

    In query's dtype, softmax in promote(float32, dtype). A query with nothing to read gets zeros or a mean of some
    values: finite, and with finite gradients.
    """
    rows, length, heads, width = query.shape
    count = -(-length // BLOCK)
    block = -(-length // count)
    shape = _Shape(rows, count, block, key.shape[2], heads // key.shape[2], width, scale, softcap)
    fill = count * block - length
    pad = lambda a, *axes: a if not fill else jnp.pad(a, [(0, fill if i in axes else 0) for i in range(a.ndim)])
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    out = _attend(shape, *(pad(a, 1) for a in (query, key, value)), pad(mask, 1, 2))
    return out[:, :length]


def _heads_first(shape: _Shape, array: Array) -> Array:
    """[R,T,heads,h] -> [blocks,R,G,n,block,h], n heads in each group."""
    cut = array.reshape(shape.rows, shape.count, shape.block, shape.groups, -1, shape.width)
    return cut.transpose(1, 0, 3, 4, 2, 5)


def _heads_last(shape: _Shape, array: Array) -> Array:
    """The way back."""
    return array.transpose(1, 0, 4, 2, 3, 5).reshape(shape.rows, shape.count * shape.block, -1, shape.width)


def _tiles(shape: _Shape, mask: Array) -> tuple[Array, Array]:
    """(mask by blocks [queries' blocks, keys' blocks, R, block, block], which of them hold anything [., .])."""
    cut = mask.reshape(shape.rows, shape.count, shape.block, shape.count, shape.block).transpose(1, 3, 0, 2, 4)
    return cut, cut.any((2, 3, 4))


def _scores(shape: _Shape, query, key, full):
    """Scores of a pair of blocks [R,G,n,block,block], and the tangent's share that a soft cap lets through."""
    found = jnp.einsum("rgnqh,rgmkh->rgnqk", query, key, preferred_element_type=full) * jnp.asarray(shape.scale, full)
    if shape.softcap is None:
        return found, None
    bent = jnp.tanh(found / shape.softcap)
    return shape.softcap * bent, 1 - bent * bent


def _least(full):
    return jnp.asarray(-0.7 * np.finfo(np.float32).max, full)


def _forward(shape: _Shape, query, key, value, mask):
    """(result by blocks [blocks,R,G,n,block,h] in float32, log of the sums [blocks,R,G,n,block])."""
    full = jnp.promote_types(jnp.float32, query.dtype)
    query, key, value = (_heads_first(shape, a) for a in (query, key, value))
    tiles, live = _tiles(shape, mask)
    lead = query.shape[1:5]

    def block(number):
        one = query[number]

        def pair(j, carry):
            def add(carry):
                total, high, weight = carry
                scores, _ = _scores(shape, one, key[j], full)
                scores = jnp.where(tiles[number, j][:, None, None], scores, _least(full))
                higher = jnp.maximum(high, scores.max(-1))
                chance, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(high - higher)
                part = jnp.einsum("rgnqk,rgmkh->rgnqh", chance.astype(value.dtype), value[j],
                                  preferred_element_type=full)
                return total * shrink[..., None] + part, higher, weight * shrink + chance.sum(-1)

            return jax.lax.cond(live[number, j], add, lambda carry: carry, carry)

        start = jnp.zeros((*lead, shape.width), full), jnp.full(lead, _least(full)), jnp.zeros(lead, full)
        total, high, weight = jax.lax.fori_loop(0, number + 1, pair, start)
        weight = jnp.where(weight == 0, 1, weight)
        return total / weight[..., None], high + jnp.log(weight)

    return jax.lax.map(block, jnp.arange(shape.count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, query, key, value, mask):
    return _heads_last(shape, _forward(shape, query, key, value, mask)[0]).astype(query.dtype)


def _keep(shape, query, key, value, mask):
    out, log_sum = _forward(shape, query, key, value, mask)
    return _heads_last(shape, out).astype(query.dtype), (query, key, value, mask, out, log_sum)


def _backward(shape, kept, cotangent):
    query, key, value, mask, out, log_sum = kept
    full = out.dtype
    tiles, live = _tiles(shape, mask)
    query, key, value, given = (_heads_first(shape, a) for a in (query, key, value, cotangent))
    inner = (given.astype(full) * out).sum(-1)

    def block(carry, number):
        one, back = query[number], given[number]

        def pair(j, carry):
            def add(carry):
                d_query, d_key, d_value = carry
                scores, through = _scores(shape, one, key[j], full)
                # Where nobody reads anything the log of the sums is a constant below all scores: no exponential of it.
                chance = jnp.exp(jnp.where(tiles[number, j][:, None, None], scores - log_sum[number][..., None],
                                           -jnp.inf))
                change = jnp.einsum("rgnqh,rgmkh->rgnqk", back, value[j], preferred_element_type=full)
                change = chance * (change - inner[number][..., None])
                if through is not None:
                    change = change * through
                change = (change * jnp.asarray(shape.scale, full)).astype(one.dtype)
                put = lambda whole, part: whole.at[j].add(part[:, :, None])
                of = functools.partial(jnp.einsum, preferred_element_type=full)
                return (d_query + of("rgnqk,rgmkh->rgnqh", change, key[j]),
                        put(d_key, of("rgnqk,rgnqh->rgkh", change, one)),
                        put(d_value, of("rgnqk,rgnqh->rgkh", chance.astype(back.dtype), back)))

            return jax.lax.cond(live[number, j], add, lambda carry: carry, carry)

        d_query, *rest = jax.lax.fori_loop(0, number + 1, pair, (jnp.zeros(one.shape, full), *carry))
        return tuple(rest), d_query

    start = jnp.zeros(key.shape, full), jnp.zeros(value.shape, full)
    (d_key, d_value), d_query = jax.lax.scan(block, start, jnp.arange(shape.count))
    return (*(_heads_last(shape, a).astype(kept[0].dtype) for a in (d_query, d_key, d_value)), None)


_attend.defvjp(_keep, _backward)
