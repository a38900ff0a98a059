"""Attention in blocks of queries and of keys, written in plain JAX: for CPUs, which no kernel serves.

Scores of one pair of blocks stay in the processor's cache; those of whole rows travel to memory and back several times,
which takes longer than the products. A pair of blocks in which nobody reads anybody is skipped: what is above the
diagonal, and in rows of several segments what lies between segments that do not read each other.

Softmax by running maxima and sums (arXiv 2205.14135; the backward pass recomputes the scores from the log of the sums,
arXiv 2307.08691). It has a backward pass of its own, so that forward mode does not go through it, though forward over
reverse does. Under jax.checkpoint the name KEPT stands for its result and the log of the sums.

Scores lie as [keys, queries]: with keys and values in both orders, made once, no product turns what it multiplies.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from alignax.types import Array

BLOCK = 128  # columns; half or twice of it is slower
KEPT = "attention"


class Tiles(NamedTuple):
    """A mask by blocks: mask bool [n,n,R,keys,queries], by blocks of queries, then of keys; order int32 [1,n,n], for
    each block of queries those of keys, first the ones in which it reads anything; found int32 [1,n], how many."""

    mask: Array
    order: Array
    found: Array


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


@jax.custom_batching.custom_vmap
def _live(cut: Array) -> Array:
    """Blocks of a mask [R,n,block,n,block] in which anybody reads anything, bool [n,n]."""
    return cut.any((0, 2, 4))


@_live.def_vmap
def _live_together(size: int, batched: list[bool], cut: Array) -> tuple[Array, bool]:
    """Under vmap one answer for all: loops of different lengths would copy all they carry at every turn."""
    return _live(cut.reshape(-1, *cut.shape[2:])), False


def prepare(mask: Array) -> Tiles:
    """The Tiles of a causal mask bool [R,T,T]."""
    rows, length, _ = mask.shape
    count = -(-length // BLOCK)
    block = -(-length // count)
    fill = count * block - length
    cut = jnp.pad(mask, [(0, 0), (0, fill), (0, fill)]).reshape(rows, count, block, count, block)
    live = _live(cut)
    # Loops over those that are, rather than conditions: XLA keeps what stands under a condition on one core.
    return Tiles(cut.transpose(1, 3, 0, 4, 2), jnp.argsort(~live, axis=1, stable=True)[None], live.sum(1)[None])


def attend_blocks(query: Array, key: Array, value: Array, tiles: Tiles, *, scale: float,
                  softcap: float | None = None) -> Array:
    """attention.attend without bias for prepare's mask: query [R,T,H,h]; key, value [R,T,G,h] -> [R,T,H,h].

    In query's dtype, softmax in promote(float32, dtype). A query with nothing to read gets zeros or a mean of some
    values: finite, and with finite gradients.
    """
    rows, length, heads, width = query.shape
    count, block = tiles.mask.shape[0], tiles.mask.shape[-1]
    shape = _Shape(rows, count, block, key.shape[2], heads // key.shape[2], width, scale, softcap)
    fill = [(0, 0), (0, count * block - length), (0, 0), (0, 0)]
    out = _attend(shape, *(jnp.pad(a.astype(query.dtype), fill) for a in (query, key, value)), tiles)
    return out[:, :length]


def _turned(shape: _Shape, array: Array) -> Array:
    """[R,T,heads,h] -> [blocks,R,G,h,n*block], n heads in each group."""
    cut = array.reshape(shape.rows, shape.count, shape.block, shape.groups, -1, shape.width)
    return cut.transpose(1, 0, 3, 5, 4, 2).reshape(shape.count, shape.rows, shape.groups, shape.width, -1)


def _straight(shape: _Shape, array: Array) -> Array:
    """[R,T,heads,h] -> [blocks,R,G,n*block,h]."""
    cut = array.reshape(shape.rows, shape.count, shape.block, shape.groups, -1, shape.width)
    return cut.transpose(1, 0, 3, 4, 2, 5).reshape(shape.count, shape.rows, shape.groups, -1, shape.width)


def _back(shape: _Shape, turned: Array) -> Array:
    """_turned's way back."""
    cut = turned.reshape(shape.count, shape.rows, shape.groups, shape.width, -1, shape.block)
    return cut.transpose(1, 0, 5, 2, 4, 3).reshape(shape.rows, shape.count * shape.block, -1, shape.width)


def _at(array: Array, number: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, number, 0, keepdims=False)


def _of(equation: str, left: Array, right: Array, full) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=full)


def _scores(shape: _Shape, key, query, full):
    """Scores of a pair of blocks [R,G,keys,n*queries], and the tangent's share that a soft cap lets through."""
    found = _of("rgmh,rghq->rgmq", key, query, full) * jnp.asarray(shape.scale, full)
    if shape.softcap is None:
        return found, None
    bent = jnp.tanh(found / shape.softcap)
    return shape.softcap * bent, 1 - bent * bent


def _where(shape: _Shape, tile: Array, scores: Array, other) -> Array:
    """The scores where a tile [R,keys,queries] holds, for all heads."""
    apart = scores.reshape(*scores.shape[:3], shape.heads, shape.block)
    return jnp.where(tile[:, None, :, None], apart, other).reshape(scores.shape)


def _least(full):
    return jnp.asarray(-0.7 * np.finfo(np.float32).max, full)


def _forward(shape: _Shape, query, key, value, tiles: Tiles):
    """(result by blocks [blocks,R,G,h,n*block] in float32, log of the sums [blocks,R,G,n*block])."""
    full = jnp.promote_types(jnp.float32, query.dtype)
    query, key, value = _turned(shape, query), _straight(shape, key), _turned(shape, value)
    lead, ends = query.shape[1:3], query.shape[4:]

    def block(number):
        one, masks, order = _at(query, number), _at(tiles.mask, number), _at(tiles.order[0], number)

        def pair(i, carry):
            j, (total, high, weight) = _at(order, i), carry
            scores, _ = _scores(shape, _at(key, j), one, full)
            scores = _where(shape, _at(masks, j), scores, _least(full))
            higher = jnp.maximum(high, scores.max(2))
            chance, shrink = jnp.exp(scores - higher[:, :, None]), jnp.exp(high - higher)
            part = _of("rghm,rgmq->rghq", _at(value, j), chance.astype(value.dtype), full)
            return total * shrink[:, :, None] + part, higher, weight * shrink + chance.sum(2)

        start = (jnp.zeros((*lead, shape.width, *ends), full), jnp.full((*lead, *ends), _least(full)),
                 jnp.zeros((*lead, *ends), full))
        total, high, weight = jax.lax.fori_loop(0, tiles.found[0, number], pair, start)
        weight = jnp.where(weight == 0, 1, weight)
        return total / weight[:, :, None], high + jnp.log(weight)

    return jax.lax.map(block, jnp.arange(shape.count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, query, key, value, tiles: Tiles):
    return _back(shape, _forward(shape, query, key, value, tiles)[0]).astype(query.dtype)


def _keep(shape, query, key, value, tiles):
    out, log_sum = (checkpoint_name(a, KEPT) for a in _forward(shape, query, key, value, tiles))
    return _back(shape, out).astype(query.dtype), (query, key, value, tiles, out, log_sum)


def _backward(shape, kept, cotangent):
    query, key, value, tiles, out, log_sum = kept
    full = out.dtype
    query_turned, key_turned, given_turned = (_turned(shape, a) for a in (query, key, cotangent))
    query, key, value, given = (_straight(shape, a) for a in (query, key, value, cotangent))
    inner = (given_turned.astype(full) * out).sum(3)

    def block(carry, number):
        masks, order = _at(tiles.mask, number), _at(tiles.order[0], number)
        one, back, one_turned, back_turned, sums, products = (
            _at(a, number) for a in (query, given, query_turned, given_turned, log_sum, inner))

        def pair(i, carry):
            j, (d_query, d_key, d_value) = _at(order, i), carry
            scores, through = _scores(shape, _at(key, j), one_turned, full)
            # Where nobody reads anything the log of the sums is a constant below all scores: no exponential of it.
            chance = jnp.exp(_where(shape, _at(masks, j), scores - sums[:, :, None], -jnp.inf))
            change = chance * (_of("rgmh,rghq->rgmq", _at(value, j), back_turned, full) - products[:, :, None])
            if through is not None:
                change = change * through
            change = (change * jnp.asarray(shape.scale, full)).astype(one.dtype)
            put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, _at(whole, j) + part, j, 0)
            return (d_query + _of("rghm,rgmq->rghq", _at(key_turned, j), change, full),
                    put(d_key, _of("rgmq,rgqh->rgmh", change, one, full)),
                    put(d_value, _of("rgmq,rgqh->rgmh", chance.astype(back.dtype), back, full)))

        d_query, *rest = jax.lax.fori_loop(0, tiles.found[0, number], pair, (jnp.zeros(one_turned.shape, full), *carry))
        return tuple(rest), d_query

    start = jnp.zeros(key.shape, full), jnp.zeros(value.shape, full)
    (d_key, d_value), d_query = jax.lax.scan(block, start, jnp.arange(shape.count))
    along = lambda a: _back(shape, a.swapaxes(-1, -2))
    return (*(a.astype(kept[0].dtype) for a in (_back(shape, d_query), along(d_key), along(d_value))), None)


_attend.defvjp(_keep, _backward)
