"""What `generate` refuses before anything compiles, and the decoding rules that its settings mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax.rollout.decoding import Rules
from alignax.types import Array, ConfigError, DataError

# Below 1e-6 a division would overflow float32 for ordinary logits; exactly 0 is greedy and divides nothing.
_COLDEST, _HOTTEST = 1e-6, 1e6


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """value where it is an integer in [low, high], or ConfigError."""
    good = isinstance(value, (int, np.integer)) or (
        isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0 and np.issubdtype(value.dtype, np.integer))
    good = good and not isinstance(value, bool) and value >= low
    if not good or high is not None and value > high:
        raise ConfigError(f"generate({name}=): found {value!r}, allowed: an integer "
                          + (f">= {low}" if high is None else f"in {low} .. {high}"))
    return int(value)


def number(name: str, value: Any, low: float, high: float, *, opens: bool = False, closes: bool = True,
           also: str = "") -> Any:
    """value as a float between low and high, or ConfigError; a traced scalar passes unchecked. opens: low itself is
    not allowed; closes: high is; `also` names what else is allowed."""
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return value
    good = isinstance(value, (int, float, np.number)) or isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0
    good = good and not isinstance(value, bool)
    if not good or not (low < value if opens else low <= value) or not (value <= high if closes else value < high):
        raise ConfigError(f"generate({name}=): found {value!r}, allowed: {also + ' or ' if also else ''}a number in "
                          f"{'(' if opens else '['}{low}, {high}{']' if closes else ')'}")
    return float(value)


def _temperature(value: Any, batch: int) -> tuple[Any, str]:
    """(what divides the logits, Rules.greedy) of a number or of one number per prompt."""
    if np.ndim(value) == 0:
        if not isinstance(value, (jax.core.Tracer, bool)) and isinstance(value, (int, float, np.number)) and value == 0:
            return None, "all"
        return number("temperature", value, _COLDEST, _HOTTEST, also="0 (greedy)"), "none"
    if isinstance(value, jax.core.Tracer):
        return value, "some"
    value = np.asarray(jax.device_get(value), np.float32)
    if value.shape != (batch,):
        raise ConfigError(f"generate(temperature=): found the shape {value.shape}, allowed: a number, or one for each "
                          f"of {batch} prompts")
    bad = np.flatnonzero(~((value == 0) | (value >= _COLDEST) & (value <= _HOTTEST)))
    if bad.size:
        number(f"temperature[{bad[0]}]", float(value[bad[0]]), _COLDEST, _HOTTEST, also="0 (greedy)")
    return value, "some" if (value == 0).any() else "none"


def rules(*, vocab_size: int, batch: int, max_new_tokens: int, eos_ids: Sequence[int], temperature: Any, top_k: Any,
          top_p: Any, min_p: Any, typical_p: Any, epsilon: Any, repetition_penalty: Any, presence_penalty: Any,
          frequency_penalty: Any, bias: Any, min_new_tokens: Any) -> Rules:
    """The Rules of generate's settings: those at their neutral value are off. Raises ConfigError for a value out of
    range, and where the bias and min_new_tokens together leave nothing to sample."""

    def on(value, neutral):
        return value if isinstance(value, jax.core.Tracer) or value != neutral else None

    finite = float(np.finfo(np.float32).max)
    temperature, greedy = _temperature(temperature, batch)
    shaping = dict(
        repetition_penalty=on(number("repetition_penalty", repetition_penalty, 0.0, 1e6, opens=True), 1.0),
        presence_penalty=on(number("presence_penalty", presence_penalty, -finite, finite), 0.0),
        frequency_penalty=on(number("frequency_penalty", frequency_penalty, -finite, finite), 0.0))
    traced = lambda value: isinstance(value, jax.core.Tracer)
    truncating = dict(
        top_k=on(top_k if traced(top_k) else integer("top_k", top_k, 0), 0),
        top_p=on(number("top_p", top_p, 0.0, 1.0, opens=True), 1.0),
        min_p=on(number("min_p", min_p, 0.0, 1.0), 0.0),
        typical_p=on(number("typical_p", typical_p, 0.0, 1.0, opens=True), 1.0),
        epsilon=on(number("epsilon", epsilon, 0.0, 1.0, closes=False), 0.0))
    if not traced(min_new_tokens):
        min_new_tokens = on(integer("min_new_tokens", min_new_tokens, 0, max_new_tokens), 0)
    if bias is not None:
        if np.shape(bias) != (vocab_size,):
            raise ConfigError(f"generate(bias=): found the shape {np.shape(bias)}, allowed: [{vocab_size}], see "
                              "token_bias")
        if not traced(bias):
            bias = np.asarray(jax.device_get(bias), np.float32)
            _check_bias(bias, eos_ids if min_new_tokens is not None else ())
    elif min_new_tokens is not None:
        _check_bias(np.zeros((vocab_size,), np.float32), eos_ids)
    # The most probable token survives every truncation, so greedy decoding needs none.
    return Rules(temperature=temperature, bias=bias, min_new_tokens=min_new_tokens, greedy=greedy, **shaping,
                 **({} if greedy == "all" else truncating))


def _check_bias(bias: np.ndarray, held: Sequence[int]) -> None:
    if np.isnan(bias).any() or (bias == np.inf).any():
        raise ConfigError("generate(bias=): found NaN or +inf, allowed: finite numbers, and -inf for a banned token")
    left = np.isfinite(bias)
    left[list(held)] = False
    if not left.any():
        raise ConfigError("generate(bias=): every token is banned" + (" or an end token that min_new_tokens holds back"
                          if len(held) else "") + ", allowed: at least one is left")


def ids(vocab_size: int, eos_ids: Any, pad_id: Any) -> tuple[int, ...]:
    """The end tokens as a sorted tuple. Raises ConfigError for an id, pad_id included, outside the vocabulary."""
    if isinstance(eos_ids, int):
        raise ConfigError(f"generate(eos_ids=): found {eos_ids!r}, allowed: a tuple of token ids")
    eos_ids = tuple(sorted({int(number) for number in eos_ids}))
    for name, found in [("eos_ids", found) for found in eos_ids] + [("pad_id", pad_id)]:
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < vocab_size:
            raise ConfigError(f"generate({name}=): found {found!r}, allowed: ids in 0 .. {vocab_size - 1}")
    return eos_ids


def stops(table: Any, vocab_size: int) -> jax.Array | None:
    """The transition table on the device. Raises ConfigError where it is not int32 [S >= 2, V]."""
    if table is None:
        return None
    kind, size = getattr(table, "dtype", None), np.shape(table)
    if kind != jnp.int32 or len(size) != 2 or size[0] < 2 or size[1] != vocab_size:
        raise ConfigError(f"generate(stops=): found {kind} {size}, allowed: int32 [S, {vocab_size}] from stop_table")
    return jnp.asarray(table)


def arrays(prompts: Array, prompt_mask: Array, prompt_ids: Array) -> None:
    """Shapes and dtypes always; that prompts are left-padded only where the mask's values are at hand. DataError."""
    for name, array, kind, size in (("prompts", prompts, jnp.int32, None),
                                    ("prompt_mask", prompt_mask, jnp.bool_, prompts.shape),
                                    ("prompt_ids", prompt_ids, jnp.uint32, prompts.shape[:1])):
        rank_fits = array.ndim == 2 and array.shape[1] > 0 if size is None else array.shape == size
        if array.dtype != kind or not rank_fits:
            raise DataError(f"generate: {name}: found {array.dtype} {array.shape}, allowed: {jnp.dtype(kind).name} "
                            f"{'[B, P] with P >= 1' if size is None else size}")
    if isinstance(prompt_mask, jax.core.Tracer) or not getattr(prompt_mask, "is_fully_addressable", True):
        return
    mask = np.asarray(jax.device_get(prompt_mask))
    bad = np.flatnonzero(~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(axis=1))
    if bad.size:
        raise DataError(f"generate: prompt_mask row {bad[0]}: found {mask[bad[0]].astype(int).tolist()}, allowed: "
                        "left-padded rows, zeros and then at least one 1")
