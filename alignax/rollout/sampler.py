"""Sampling completions: one jitted program that prefills each prompt once and continues it K times.

A completion is a function of (parameters, its prompt, seed, prompt id, sample index) and of the static settings; it
does not depend on its neighbours, on its place in the batch, or on how many samples are drawn beside it, up to the
rounding with which the backend multiplies matrices of another batch size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.models import decoder
from alignax.rollout import decoding
from alignax.types import Array, ConfigError, DataError


class Samples(NamedTuple):
    """K completions of B prompts, N slots each.

    tokens: int32 [B,K,N], pad_id after the end. mask: bool [B,K,N], the sampled slots, the end token included.
    logps: float32 [B,K,N] under the policy itself (temperature 1, whole vocabulary). behaviour_logps: float32 [B,K,N]
    under the distribution that was sampled (tempered, renormalised over the kept set). kept_mass: float32 [B,K,N], the
    kept set's mass under the tempered distribution. Greedy decoding is the limit of temperature 0: a point mass, so
    behaviour_logps is 0 and kept_mass 1. Outside the mask: logps and behaviour_logps 0, kept_mass 1.
    finished: bool [B,K], whether an end token was sampled within N.
    """

    tokens: Array
    mask: Array
    logps: Array
    behaviour_logps: Array
    kept_mass: Array
    finished: Array


def _draw(keys, logits, temperature: float, top_p: float):
    """One token per row of logits [M,V]: (token int32 [M], logp, behaviour_logp, kept_mass, float32 [M] each)."""
    logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    pick = lambda table, token: jnp.take_along_axis(table, token[:, None], axis=-1)[:, 0]
    if temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logp = pick(jax.nn.log_softmax(logits), token)
        return token, logp, jnp.zeros_like(logp), jnp.ones_like(logp)
    kept, mass = decoding.top_p_filter(decoding.apply_temperature(logits, temperature), top_p)
    # A key per row, not one key for the batch: the row's draw then ignores the rest of the batch.
    token = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return token, pick(jax.nn.log_softmax(logits), token), pick(jax.nn.log_softmax(kept), token), mass


@functools.partial(jax.jit, static_argnames=("config", "num_samples", "max_new_tokens", "temperature", "top_p",
                                             "eos_ids", "pad_id"))
def _generate(config, params, prompts, prompt_mask, prompt_ids, seed_key, *, num_samples, max_new_tokens, temperature,
              top_p, eos_ids, pad_id) -> Samples:
    batch, width = prompts.shape
    rows, slots = batch * num_samples, width + max_new_tokens
    dtype = params["embedding"].dtype

    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(seed_key, prompt_ids)
    per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        per_prompt, jnp.arange(num_samples, dtype=jnp.uint32))
    keys = per_sample.reshape(rows, *per_sample.shape[2:])

    lengths = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    position = jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0)
    hidden, cache = decoder.decode_step(config, params, prompts, position,
                                        decoder.init_cache(config, batch, width, dtype), 0, prompt_mask)
    # The last token has no successor, so its key and value are never needed: width + N - 1 slots would do, but a round
    # length keeps one shape for all.
    cache = decoder.extend_cache(cache, repeats=num_samples, length=slots)
    hidden, lengths = jnp.repeat(hidden[:, -1], num_samples, axis=0), jnp.repeat(lengths, num_samples)
    key_valid = jnp.concatenate([jnp.repeat(prompt_mask, num_samples, axis=0),
                                 jnp.ones((rows, max_new_tokens), bool)], axis=1)

    def sample(step, hidden, out: Samples) -> Samples:
        """Draws slot `step` of every unfinished row and records it."""
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        drawn = _draw(step_keys, decoder.logits(config, params, hidden), temperature, top_p)
        live = ~out.finished
        ends = jnp.zeros((rows,), bool)
        for number in eos_ids:
            ends |= drawn[0] == number
        empty = (pad_id, 0.0, 0.0, 1.0)
        token, *stats = (jnp.where(live, new, jnp.asarray(old, new.dtype))
                         for new, old in zip(drawn, empty, strict=True))
        write = lambda table, column: table.at[:, step].set(column.astype(table.dtype))
        stats = (write(table, column) for table, column in zip(out[2:5], stats, strict=True))
        return Samples(write(out.tokens, token), write(out.mask, live), *stats, out.finished | (live & ends))

    full = lambda value, kind: jnp.full((rows, max_new_tokens), value, kind)
    out = Samples(full(pad_id, jnp.int32), full(False, bool), full(0, jnp.float32), full(0, jnp.float32),
                  full(1, jnp.float32), jnp.zeros((rows,), bool))
    out = sample(jnp.int32(0), hidden, out)

    def running(carry):
        step, _, out = carry
        return (step < max_new_tokens) & ~jnp.all(out.finished)

    def advance(carry):
        step, cache, out = carry
        # Finished rows decode padding beside the others; nothing they compute is recorded.
        token = jax.lax.dynamic_slice_in_dim(out.tokens, step - 1, 1, axis=1)
        hidden, cache = decoder.decode_step(config, params, token, (lengths + step - 1)[:, None], cache,
                                            width + step - 1, key_valid)
        return step + 1, cache, sample(step, hidden[:, 0], out)

    out = jax.lax.while_loop(running, advance, (jnp.int32(1), cache, out))[2]
    return Samples(*(a.reshape(batch, num_samples, *a.shape[1:]) for a in out))


def _is_zero(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def _number(name: str, value, low: float, high: float, *, open_low: bool = False, also: str = "") -> float:
    """value as a float in [low, high] (open below where asked), or ConfigError; `also` names what else is allowed."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not (low < value if open_low else low <= value) or not value <= high:
        also = f"{also} or " if also else ""
        raise ConfigError(f"generate({name}=): found {value!r}, allowed: {also}a Python number in "
                          f"{'(' if open_low else '['}{low}, {high}]")
    return float(value)


def _check_arrays(prompts, prompt_mask, prompt_ids) -> None:
    """Shapes and dtypes always; that prompts are left-padded only where the mask's values are at hand."""
    for name, array, kind, shape in (("prompts", prompts, jnp.int32, None),
                                     ("prompt_mask", prompt_mask, jnp.bool_, prompts.shape),
                                     ("prompt_ids", prompt_ids, jnp.uint32, prompts.shape[:1])):
        rank_fits = array.ndim == 2 and array.shape[1] > 0 if shape is None else array.shape == shape
        if array.dtype != kind or not rank_fits:
            raise DataError(f"generate: {name}: found {array.dtype} {array.shape}, allowed: {jnp.dtype(kind).name} "
                            f"{'[B, P] with P >= 1' if shape is None else shape}")
    if isinstance(prompt_mask, jax.core.Tracer) or not getattr(prompt_mask, "is_fully_addressable", True):
        return
    mask = np.asarray(jax.device_get(prompt_mask))
    bad = np.flatnonzero(~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(axis=1))
    if bad.size:
        raise DataError(f"generate: prompt_mask row {bad[0]}: found {mask[bad[0]].astype(int).tolist()}, allowed: "
                        "left-padded rows, zeros and then at least one 1")


def generate(config: decoder.DecoderConfig, params: decoder.Params, prompts: Array, prompt_mask: Array,
             prompt_ids: Array, seed_key: Array, *, num_samples: int = 1, max_new_tokens: int = 32,
             temperature: float = 1.0, top_p: float = 1.0, eos_ids: tuple[int, ...] = (), pad_id: int = 0) -> Samples:
    """Samples K = num_samples completions of up to N = max_new_tokens tokens for each of B prompts.

    prompts: int32 [B,P], left-padded; prompt_mask: bool [B,P], True on real tokens; prompt_ids: uint32 [B], stable
    ids. Draw (b,k,n) uses the key fold_in(fold_in(fold_in(seed_key, prompt_ids[b]), k), n). temperature divides the
    logits before top_p filters them; temperature 0 is greedy (top_p then changes nothing). A row ends with the first
    token in eos_ids (counted in the mask); the loop stops once every row has ended. pad_id only fills tokens after
    the end: it may equal an end token, since masks are explicit.

    Compiled once per shape and set of keyword arguments (config included), which are static. Memory: each layer's
    cache is B*K*(P+N) slots. Raises ConfigError for a setting out of range, also where P + N exceeds
    config.max_positions; DataError for arrays of the wrong shape, dtype or padding side (the side only when the mask
    is not traced).
    """
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"generate({name}=): found {value!r}, allowed: an integer >= 1")
    # Below 1e-6 a division would overflow float32 for ordinary logits; exactly 0 is greedy and divides nothing.
    temperature = 0.0 if _is_zero(temperature) else _number("temperature", temperature, 1e-6, 1e6, also="0 (greedy)")
    top_p = _number("top_p", top_p, 0.0, 1.0, open_low=True)
    if isinstance(eos_ids, int):
        raise ConfigError(f"generate(eos_ids=): found {eos_ids!r}, allowed: a tuple of token ids")
    eos_ids = tuple(sorted({int(number) for number in eos_ids}))
    for name, number in [("eos_ids", number) for number in eos_ids] + [("pad_id", pad_id)]:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < config.vocab_size:
            raise ConfigError(f"generate({name}=): found {number!r}, allowed: ids in 0 .. {config.vocab_size - 1}")
    _check_arrays(prompts, prompt_mask, prompt_ids)
    if prompts.shape[1] + max_new_tokens > config.max_positions:
        raise ConfigError(f"generate(max_new_tokens=): found {prompts.shape[1]} prompt columns + {max_new_tokens} new "
                          f"tokens, allowed: at most max_positions = {config.max_positions} together")
    return _generate(config, params, prompts, prompt_mask, prompt_ids, seed_key, num_samples=num_samples,
                     max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, eos_ids=eos_ids,
                     pad_id=pad_id)
