"""Decoding rules: pure functions from logits [..., V] to logits, in float32 (or wider).

The distribution that is sampled is softmax of the result, so its log-probs are those of the kept set; whoever trains on
samples needs them (`behaviour_logps`) and the mass that was kept, because truncation multiplies every kept
probability by 1 / mass. The kept mass is always relative to the distribution that the truncating rules are given:
after bias, penalties and temperature.

`shape` and `truncate` apply everything in one order, that of transformers' logits processors and warpers: bias,
repetition penalty, presence and frequency penalties, end tokens held back | temperature | top-k, top-p, min-p,
typical, epsilon. Each truncating rule sees the distribution renormalised over what the ones before it kept.

Ties: top-k and top-p rank equal logits by token id, so that top-k keeps exactly k (transformers keeps all that tie
with the k-th); min-p, typical and epsilon compare values, so that equal logits stay or go together.

Settings may be Python numbers, which are checked (ConfigError), or traced scalars, which cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Array, ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """The decoding rules of one call. A field that is None is off: which ones are on is the structure of a compiled
    program, their values are traced, so that another temperature costs no compilation.

    temperature: scalar, or [M, 1] for one per row of logits [M, V]. top_k: int scalar. bias: [V], -inf bans.
    min_new_tokens: int scalar. greedy: static; `all` rows take the most probable token, `some` take it where
    their temperature is 0, or `none`.
    """

    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    typical_p: Any = None
    epsilon: Any = None
    repetition_penalty: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    bias: Any = None
    min_new_tokens: Any = None
    greedy: str = dataclasses.field(default="none", metadata={"static": True})


def _static_number(value) -> bool:
    """True for a Python number, which can be checked; a traced one cannot."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(rule: str, name: str, value, good: Callable[[Any], bool], allowed: str) -> None:
    if isinstance(value, bool) or _static_number(value) and not good(value):
        raise ConfigError(f"{rule}({name}=): found {value}, allowed: {allowed}")


def _full(logits: Array) -> jax.Array:
    return jnp.asarray(logits).astype(jnp.promote_types(jnp.float32, logits.dtype))


# --- rules that move logits --------------------------------------------------------------------------------------


def apply_temperature(logits: Array, temperature) -> Array:
    """logits [..., V] / temperature in float32 (or wider). temperature: a number or traced array > 0 that broadcasts;
    greedy decoding (0) is the sampler's own rule, not a division. ConfigError for a static temperature not > 0."""
    _check("apply_temperature", "temperature", temperature, lambda t: 0 < t < float("inf"), "a finite number > 0")
    return _full(logits) / temperature


def token_bias(vocab_size: int, bias: Mapping[int, float] | None = None, *, banned: Sequence[int] = (),
               allowed: Sequence[int] | None = None) -> np.ndarray:
    """The bias vector float32 [V] of a mapping id -> number; banned ids get -inf, and so do all ids but the `allowed`
    ones where those are given (one allowed id is a forced token). ConfigError for an id outside the vocabulary, a
    bias that is not finite, or when nothing is left to sample."""
    bias = dict(bias or {})
    for name, ids in (("bias", bias), ("banned", banned), ("allowed", allowed or ())):
        for number in ids:
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not 0 <= number < vocab_size:
                raise ConfigError(f"token_bias({name}=): found id {number!r}, allowed: ids in 0 .. {vocab_size - 1}")
    out = np.zeros((vocab_size,), np.float32)
    for number, value in bias.items():
        if not _static_number(value) or not np.isfinite(value):
            raise ConfigError(f"token_bias(bias=): found {value!r} for id {number}, allowed: a finite number; "
                              "`banned` excludes a token")
        out[number] = value
    if allowed is not None:
        out[np.setdiff1d(np.arange(vocab_size), np.asarray(list(allowed), np.int64))] = -np.inf
    out[list(banned)] = -np.inf
    if not np.isfinite(out).any():
        raise ConfigError(f"token_bias: all {vocab_size} ids are banned, allowed: at least one is left")
    return out


def apply_repetition_penalty(logits: Array, seen: Array, penalty) -> Array:
    """Repetition penalty of CTRL (arXiv 1909.05858) as transformers computes it: the logit x of a token in `seen`
    (bool [..., V]) becomes x / penalty where x > 0 and x * penalty where x < 0. penalty 1 changes nothing."""
    _check("apply_repetition_penalty", "penalty", penalty, lambda p: 0 < p < float("inf"), "a finite number > 0")
    logits = _full(logits)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_count_penalties(logits: Array, counts: Array, *, presence=0.0, frequency=0.0) -> Array:
    """logits - presence * [count > 0] - frequency * count, with counts int [..., V] of the tokens sampled so far (the
    prompt is not counted). Both numbers may be negative, which favours repetition."""
    for name, value in (("presence", presence), ("frequency", frequency)):
        _check("apply_count_penalties", name, value, np.isfinite, "a finite number")
    logits = _full(logits)
    return logits - presence * (counts > 0).astype(logits.dtype) - frequency * counts.astype(logits.dtype)


def hold_back(logits: Array, ids: Sequence[int], when) -> Array:
    """Excludes the tokens `ids` (-inf) where `when` (a bool scalar or one per row, may be traced) is true: no end token
    before min_new_tokens."""
    logits = _full(logits)
    held = np.zeros((1,) * (logits.ndim - 1) + (logits.shape[-1],), bool)
    held[..., list(ids)] = True
    when = jnp.asarray(when)
    return jnp.where(jnp.asarray(held) & when.reshape(when.shape + (1,) * (logits.ndim - when.ndim)), -jnp.inf, logits)


# --- rules that truncate -----------------------------------------------------------------------------------------


def _finish(logits: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logits with -inf outside keep, kept mass [...]); the mass is exactly 1 where everything stays."""
    mass = jnp.sum(jnp.where(keep, jax.nn.softmax(logits, axis=-1), 0.0), axis=-1)
    mass = jnp.where(keep.all(axis=-1), 1.0, jnp.minimum(mass, 1.0)).astype(logits.dtype)
    return jnp.where(keep, logits, -jnp.inf), mass


def _keep_ranked(logits: jax.Array, rules: Sequence[Callable[[jax.Array], jax.Array]]) -> jax.Array:
    """bool [..., V]: what a chain of rules keeps, each of which keeps a number of the most probable tokens.

    A rule takes the probabilities in falling order, renormalised over what is left, and returns how many stay [...];
    at least one does. One sort serves the whole chain.
    """
    size = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    index = jnp.arange(size).reshape((1,) * (logits.ndim - 1) + (size,))
    count = jnp.full(logits.shape[:-1], size)
    for rule in rules:
        probs = jax.nn.softmax(jnp.where(index < count[..., None], ranked, -jnp.inf), axis=-1)
        count = jnp.clip(rule(probs), 1, count)
    return jnp.argsort(order, axis=-1) < count[..., None]


def _count_top_k(k) -> Callable[[jax.Array], jax.Array]:
    _check("top_k_filter", "k", k, lambda k: isinstance(k, int) and k >= 1, "an integer >= 1")
    return lambda probs: jnp.full(probs.shape[:-1], 1, jnp.int32) * jnp.asarray(k, jnp.int32)


def _count_top_p(p) -> Callable[[jax.Array], jax.Array]:
    _check("top_p_filter", "p", p, lambda p: 0 < p <= 1, "a number in (0, 1]")

    def count(probs):
        before = jnp.cumsum(probs, axis=-1)
        before = jnp.concatenate([jnp.zeros_like(before[..., :1]), before[..., :-1]], axis=-1)
        # The running sum reaches 1 before the tail does: p = 1 has to be its own case to keep everything.
        return jnp.where(p >= 1, probs.shape[-1], jnp.sum(before < p, axis=-1))

    return count


def _count_min_p(p) -> Callable[[jax.Array], jax.Array]:
    _check("min_p_filter", "p", p, lambda p: 0 <= p <= 1, "a number in [0, 1]")
    return lambda probs: jnp.sum(probs >= p * probs[..., :1], axis=-1)


def _count_epsilon(epsilon) -> Callable[[jax.Array], jax.Array]:
    _check("epsilon_filter", "epsilon", epsilon, lambda e: 0 <= e < 1, "a number in [0, 1)")
    return lambda probs: jnp.sum(probs >= epsilon, axis=-1)


def top_k_filter(logits: Array, k) -> tuple[Array, Array]:
    """Keeps the k most probable tokens, exactly k: (filtered logits [..., V], kept mass [...]). The others become
    -inf; equal logits rank by token id; k >= V keeps everything. ConfigError for a static k that is no integer >= 1."""
    logits = _full(logits)
    return _finish(logits, _keep_ranked(logits, [_count_top_k(k)]))


def top_p_filter(logits: Array, p) -> tuple[Array, Array]:
    """Nucleus filter (arXiv 1904.09751): (filtered logits [..., V], kept mass [...]), in float32 (or wider).

    Keeps the smallest set of most probable tokens whose mass reaches p: token i stays iff the mass of those ranked
    before it is below p; equal logits rank by token id. The others become -inf; kept logits are unchanged, and the
    kept mass is the sum of their probabilities before renormalisation. The most probable token always stays. p: a
    number or traced scalar in (0, 1]; at 1 everything stays, exactly, whatever the rounding of the sum, and the mass
    is 1. ConfigError for a static p outside (0, 1].
    """
    logits = _full(logits)
    return _finish(logits, _keep_ranked(logits, [_count_top_p(p)]))


def min_p_filter(logits: Array, p) -> tuple[Array, Array]:
    """Keeps the tokens whose probability is at least p times that of the most probable one (arXiv 2407.01082):
    (filtered logits [..., V], kept mass [...]). ConfigError for a static p outside [0, 1]; 0 keeps everything."""
    logits = _full(logits)
    return _finish(logits, _keep_ranked(logits, [_count_min_p(p)]))


def epsilon_filter(logits: Array, epsilon) -> tuple[Array, Array]:
    """Keeps the tokens of probability >= epsilon (arXiv 2210.15191), and the most probable one always: (filtered
    logits [..., V], kept mass [...]). ConfigError for a static epsilon outside [0, 1)."""
    logits = _full(logits)
    return _finish(logits, _keep_ranked(logits, [_count_epsilon(epsilon)]))


def _keep_typical(logits: jax.Array, p) -> jax.Array:
    _check("typical_filter", "p", p, lambda p: 0 < p <= 1, "a number in (0, 1]")
    logp = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logp)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * logp, 0.0), axis=-1, keepdims=True)
    distance = jnp.abs(-logp - entropy)
    order = jnp.argsort(distance, axis=-1, stable=True)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    last = jnp.minimum(jnp.sum(mass < p, axis=-1, keepdims=True), logits.shape[-1] - 1)
    bound = jnp.take_along_axis(distance, jnp.take_along_axis(order, last, axis=-1), axis=-1)
    return (distance <= bound) | jnp.asarray(p >= 1).reshape((1,) * logits.ndim)


def typical_filter(logits: Array, p) -> tuple[Array, Array]:
    """Locally typical sampling (arXiv 2202.00666): (filtered logits [..., V], kept mass [...]).

    Keeps the smallest set, in order of |-log prob - entropy|, whose mass reaches p, and whatever is equally far as
    its last member. At p = 1 everything stays. ConfigError for a static p outside (0, 1].
    """
    logits = _full(logits)
    return _finish(logits, _keep_typical(logits, p))


# --- the draw -----------------------------------------------------------------------------------------------------

_BLOCK = 256  # tokens; sums over some hundreds of tokens keep their low bits


def categorical(keys: Array, logits: Array) -> Array:
    """One token id per row, int32 [M], from softmax(logits [M, V]) with a key for each row, keys [M, ...].

    The inverse of the distribution function in two steps, each with a uniform number of its own: which block of 256
    tokens, then which token of it. One exponential per logit, where the Gumbel trick takes a random number and two
    logarithms. A token of probability 0 (logit -inf) is never drawn; one less probable than 2^-23 of its block may
    never be.
    """
    rows, size = logits.shape
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    blocks = jnp.pad(weight, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), logits.dtype))(keys)
    block = _invert(blocks.sum(axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _invert(inside, uniform[:, 1])


def _invert(weight: Array, uniform: Array) -> Array:
    """int32 [M]: the first place whose running sum of weight [M, n] exceeds uniform [M] in [0, 1) of the whole; its
    weight is above 0, since a number below 1 times the last sum is below that sum."""
    running = jnp.cumsum(weight, axis=-1)
    return jnp.sum(running <= uniform[:, None] * running[:, -1:], axis=-1, dtype=jnp.int32)


# --- all of them, in order ----------------------------------------------------------------------------------------


def shape(rules: Rules, logits: Array, *, seen: Array | None = None, counts: Array | None = None,
          held: Array | None = None, eos_ids: Sequence[int] = ()) -> Array:
    """The rules before the temperature that are on: bias, repetition penalty, presence and frequency penalties, end
    tokens held back. logits [M, V]; seen: bool [M, V], the tokens of prompt and completion; counts: int [M, V] of the
    sampled tokens; held: bool scalar, whether the end tokens are excluded now."""
    logits = _full(logits)
    if rules.bias is not None:
        logits = logits + jnp.asarray(rules.bias, logits.dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
    if rules.repetition_penalty is not None:
        logits = apply_repetition_penalty(logits, seen, rules.repetition_penalty)
    if rules.presence_penalty is not None or rules.frequency_penalty is not None:
        presence, frequency = (0.0 if n is None else n for n in (rules.presence_penalty, rules.frequency_penalty))
        logits = apply_count_penalties(logits, counts, presence=presence, frequency=frequency)
    if rules.min_new_tokens is not None and eos_ids:
        logits = hold_back(logits, eos_ids, held)
    return logits


def truncate(rules: Rules, logits: Array) -> tuple[Array, Array]:
    """The truncating rules that are on, in order: (filtered logits [..., V], kept mass [...] of all of them together,
    relative to softmax(logits))."""
    logits = _full(logits)
    chain = [rule(value) for rule, value in ((_count_top_k, rules.top_k), (_count_top_p, rules.top_p),
                                             (_count_min_p, rules.min_p)) if value is not None]
    if not chain and rules.typical_p is None and rules.epsilon is None:
        return logits, jnp.ones(logits.shape[:-1], logits.dtype)
    keep = jnp.ones(logits.shape, bool)
    # Typical sets are not made of the most probable tokens: the chain is cut there, and goes on after it.
    if rules.typical_p is not None:
        if chain:
            keep = _keep_ranked(logits, chain)
        keep &= _keep_typical(jnp.where(keep, logits, -jnp.inf), rules.typical_p)
        chain = []
    if rules.epsilon is not None:
        chain.append(_count_epsilon(rules.epsilon))
    if chain:
        keep &= _keep_ranked(jnp.where(keep, logits, -jnp.inf), chain)
    return _finish(logits, keep)
