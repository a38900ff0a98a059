"""Masked reductions, and the one place where a loss's unreduced terms become a scalar.

A masked entry (weight 0) may hold NaN or infinity: it changes no value and gets a zero gradient. A real NaN under a
non-zero weight shows. Nothing to average gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignax.types import ConfigError, Term, Terms

REDUCTIONS = ("pairs", "sequences", "tokens", "seq_mean_token_mean", "fixed_len", "whole")
_BARE = {1: "pairs", 2: "sequences", 3: "tokens"}


def _floats(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _masked(values: Any, weight: Any) -> tuple[jax.Array, jax.Array]:
    """weight * values with weight-0 entries cut off on both passes, and the broadcast weight."""
    values = _floats(values)
    weight = jnp.broadcast_to(_floats(weight), values.shape)
    live = weight != 0
    return jnp.where(live, weight * jnp.where(live, values, 0), 0), weight


def _divide(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count, 0 where count is 0."""
    some = count != 0
    return jnp.where(some, total / jnp.where(some, count, 1), 0)


def weighted_sum_count(values: Any, weight: Any = 1.0) -> tuple[jax.Array, jax.Array]:
    """(sum of weight * values, sum of weight) over all axes; scalars, float32 or wider.

    values: any shape. weight: broadcastable to it; bool or float. Entries of weight 0 never leak.
    """
    product, weight = _masked(values, weight)
    return product.sum(), weight.sum()


def masked_mean(values: Any, weight: Any = 1.0) -> jax.Array:
    """sum(weight * values) / sum(weight); 0 when every weight is 0."""
    return _divide(*weighted_sum_count(values, weight))


def _sequence_parts(term: Term) -> tuple[jax.Array, jax.Array]:
    """Per sequence: weighted sum and weight sum over the last axis."""
    product, weight = _masked(term.values, term.weight)
    if product.ndim < 1:
        raise ConfigError(f"reduction {term.reduction!r} needs a token axis; found a scalar")
    return product.sum(-1), weight.sum(-1)


def _check(term: Term) -> None:
    if term.reduction not in REDUCTIONS:
        raise ConfigError(f"term reduction = {term.reduction!r}; allowed: {', '.join(REDUCTIONS)}")
    if term.reduction == "whole" and jnp.ndim(term.values) != 0:
        raise ConfigError(f"reduction 'whole' needs a scalar; found values of shape {jnp.shape(term.values)}")


def numerator(term: Term) -> jax.Array:
    """What is summed over micro-batches: scalar, without the term's scale."""
    _check(term)
    if term.reduction == "whole":
        return _floats(term.values)
    if term.reduction == "seq_mean_token_mean":
        return _divide(*_sequence_parts(term)).sum()
    return weighted_sum_count(term.values, term.weight)[0]


def denominator(term: Term) -> jax.Array:
    """What `numerator` is divided by: scalar.

    pairs, sequences, tokens: sum of weights. seq_mean_token_mean: sequences that have tokens. fixed_len: sequences
    that have tokens times L. whole: 1.
    """
    _check(term)
    if term.reduction == "whole":
        return jnp.ones((), jnp.float32)
    if term.reduction in ("seq_mean_token_mean", "fixed_len"):
        some = (_sequence_parts(term)[1] != 0).sum().astype(jnp.float32)
        return some * jnp.shape(term.values)[-1] if term.reduction == "fixed_len" else some
    return weighted_sum_count(term.values, term.weight)[1]


_own_denominator = denominator  # `reduce_term` has an argument of that name


def reduce_term(term: Term, denominator: Any = None) -> jax.Array:
    """scale * numerator / denominator, a scalar; 0 when the denominator is 0.

    denominator: the global one, when `term` is a micro-batch's share (shares then add up to the whole); this term's
    own by default.
    """
    count = _own_denominator(term) if denominator is None else _floats(denominator)
    return term.scale * _divide(numerator(term), count)


def as_terms(result: Any) -> dict[str, Term]:
    """The terms of what a loss returned: Terms, a mapping of terms, or a bare array ([B], [B,K] or [B,K,L])."""
    if isinstance(result, Terms):
        return dict(result.terms)
    if isinstance(result, Mapping):
        return dict(result)
    rank = jnp.ndim(result)
    if rank not in _BARE:
        raise ConfigError(f"a loss returned a bare array of shape {jnp.shape(result)}; allowed: [B], [B,K], [B,K,L], "
                          "or Terms that name their reduction")
    return {"loss": Term(result, 1.0, _BARE[rank])}


def reduce_terms(
    result: Any, denominators: Mapping[str, Any] | None = None
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """(loss, {term name: (sum, count)}) of what a loss returned.

    loss: sum over terms of `reduce_term`. sum and count are without the term's scale, so that sum / count is the
    plain mean of the term; they add over micro-batches and devices. A bare array is one term "loss": [B] by pairs,
    [B,K] by sequences, [B,K,L] by tokens. denominators: global ones by term name.
    """
    total, parts = jnp.zeros((), jnp.float32), {}
    for name, term in as_terms(result).items():
        count = denominator(term)
        total = total + reduce_term(term, count if denominators is None else denominators[name])
        parts[name] = (numerator(term), count)
    return total, parts
