"""Who reads whom, at what bias, and the one place that calls an attention kernel."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Array, ConfigError

IMPLEMENTATIONS = (None, "xla", "einsum")


def attention_mask(segment: Array, prefix: Array) -> Array:
    """bool [R,T,T]: token i may read j iff j <= i, segment[j] > 0 and segment[j] is segment[i] or prefix[i]."""
    columns = jnp.arange(segment.shape[-1])
    causal = columns[None, :] <= columns[:, None]
    other = segment[:, None, :]
    related = (other == segment[:, :, None]) | (other == prefix[:, :, None])
    return causal[None] & (other > 0) & related


def distance(query_position: Array, key_position: Array) -> Array:
    """int32 [R,T,S]: how many positions key s lies before query t. In shared-prefix rows positions restart, so this is
    not the distance of columns."""
    return query_position[:, :, None] - key_position[:, None, :]


def alibi_slopes(heads: int) -> np.ndarray:
    """The slope of each head, float64 [heads] (arXiv 2108.12409).

    For n a power of two 2^(-8k/n), k = 1..n; otherwise those of the largest power of two below, then every second one
    of twice as many, until all heads have one.
    """
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between])[:heads]


def alibi_bias(heads: int, dist: Array, dtype) -> Array:
    """-slope * distance, [R, heads, T, S] in promote(float32, dtype); 0 at the token itself and, as those are masked,
    wherever the key lies after the query."""
    full = jnp.promote_types(jnp.float32, dtype)
    slopes = jnp.asarray(alibi_slopes(heads), full).reshape(1, -1, 1, 1)
    return -slopes * jnp.maximum(dist, 0).astype(full)[:, None]


def attend(query: Array, key: Array, value: Array, mask: Array, *, scale: float, softcap: float | None = None,
           bias: Array | None = None, implementation: str | None = None) -> Array:
    """softmax(c tanh(scale q k / c) + bias over what mask allows) v, [R,T,H,h] in query's dtype.

    query [R,T,H,h]; key, value [R,S,G,h] with G dividing H (arXiv 2305.13245: head n reads group n G // H); mask bool
    [R,T,S]; softcap c, None for no cap; bias [R or 1, H, T, S] or None. Softmax in float32, in float64 where query is
    float64. A query with nothing to read gets uniform weights over all S: finite values and gradients on padding,
    which no mask ever reads. implementation: `xla` (jax.nn.dot_product_attention, which knows no cap and no float64
    softmax), `einsum`, or None for the first of them that computes this. Raises ConfigError for another name, or for
    `xla` where it cannot.
    """
    needs_own = softcap is not None or query.dtype == jnp.float64
    if implementation not in IMPLEMENTATIONS or (implementation == "xla" and needs_own):
        raise ConfigError(f"attend(implementation=): found {implementation!r}, allowed: None or 'einsum'"
                          + (" with a soft cap or float64" if needs_own else " or 'xla'"))
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    if implementation == "einsum" or needs_own:
        return _einsum(query, key, value, mask, scale, softcap, bias)
    return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask[:, None], scale=scale,
                                        implementation="xla")


def attend_cached(query: Array, key: Array, value: Array, mask: Array, *, scale: float, softcap: float | None = None,
                  bias: Array | None = None) -> Array:
    """`attend` where keys and values are a cache's, [R,G,S,h]: few queries read many slots, and each head's slots lie
    side by side, which takes a third of the time of [R,S,G,h] on a CPU. Other arguments and the result as there."""
    return _einsum(query, key.astype(query.dtype), value.astype(query.dtype), mask, scale, softcap, bias, "rgsh")


def _einsum(query, key, value, mask, scale, softcap, bias, slots="rsgh"):
    """attend, spelled out; slots: the order of axes of key and value."""
    rows, columns, heads, width = query.shape
    groups = key.shape[slots.index("g")]
    full = jnp.promote_types(jnp.float32, query.dtype)
    grouped = query.reshape(rows, columns, groups, heads // groups, width)
    scores = jnp.einsum(f"rtgnh,{slots}->rgnts", grouped, key, preferred_element_type=full) * jnp.asarray(scale, full)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(full).reshape(bias.shape[0], groups, heads // groups, *bias.shape[2:])
    # A finite constant, so that a row without anything to read has uniform weights and no NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.asarray(-0.7 * np.finfo(np.float32).max, full))
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum(f"rgnts,{slots}->rtgnh", weights, value).reshape(rows, columns, heads, width)
