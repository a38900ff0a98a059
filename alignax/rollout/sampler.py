"""Sampling completions: one jitted program that prefills each prompt once and continues it K times.

A completion is a function of (parameters, its prompt, seed, prompt id, sample index) and of the settings; it does not
depend on its neighbours, on its place in the batch, or on how many samples are drawn beside it: bit for bit where the
shapes are the same, else up to the rounding with which the backend multiplies matrices of another size.

Under a mesh the program is the same: prompts cut over devices along B keep everything with a row axis cut that way,
caches included, and parameters stay as they are cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from alignax import models
from alignax.rollout import checks, decoding
from alignax.types import Array, ConfigError

CUT, ENDED, STOPPED = 0, 1, 2
REASONS = ("cut at the limit", "end token", "stop string")


class Samples(NamedTuple):
    """K completions of B prompts, N slots each.

    tokens: int32 [B,K,N], pad_id after the end. mask: bool [B,K,N], the sampled slots, the end token included.
    logps: float32 [B,K,N] under the policy itself (temperature 1, whole vocabulary, no penalties). behaviour_logps:
    float32 [B,K,N] under the distribution that was sampled (bias, penalties, temperature, renormalised over the kept
    set). kept_mass: float32 [B,K,N], the kept set's mass under the distribution after bias, penalties and temperature.
    Greedy decoding is the limit of temperature 0: a point mass, so behaviour_logps is 0 and kept_mass 1. Outside the
    mask: logps and behaviour_logps 0, kept_mass 1.
    reason: int8 [B,K], why a completion ended: CUT 0 (it did not within N), ENDED 1 by an end token, STOPPED 2 by the
    token that completes a stop string. finished: bool [B,K], whether it ended at all.
    """

    tokens: Array
    mask: Array
    logps: Array
    behaviour_logps: Array
    kept_mass: Array
    reason: Array

    @property
    def finished(self) -> Array:
        """bool [B,K]: an end token or a stop string was sampled within N."""
        return self.reason > CUT


class Plan(NamedTuple):
    """What one compiled program is made for; hashable. `rows`: how the row axis is cut over devices, or None."""

    config: models.DecoderConfig
    num_samples: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    rows: NamedSharding | None


class Inputs(NamedTuple):
    """What its values depend on beside the prompts. stops: int32 [S,V] or None."""

    params: Any
    adapters: Any
    rules: decoding.Rules
    stops: Any


class History(NamedTuple):
    """What the draws of M rows depend on beside their states; what a program does not need is None.

    seen: bool [M,V], the tokens of prompt and completion. counts: int32 [M,V], how often each was sampled. stop: int32
    [M], the state of the table of stop strings.
    """

    seen: Array | None
    counts: Array | None
    stop: Array | None


class _State(NamedTuple):
    """Between two steps, with M = B*K rows: slots before `step` are sampled, and the token at step - 1 is not in the
    cache yet."""

    step: Array
    keys: Array
    lengths: Array
    key_valid: Array
    cache: list[models.LayerCache]
    out: Samples
    history: History


def _pick(table: Array, token: Array) -> Array:
    return jnp.take_along_axis(table, token[:, None], axis=-1)[:, 0]


def _draw(keys, logits, rules: decoding.Rules, **history):
    """One token per row of logits [M,V]: (token int32 [M], logp, behaviour_logp, kept_mass, float32 [M] each)."""
    logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    chance = lambda table, token: _pick(table, token) - jax.nn.logsumexp(table, axis=-1)
    plain = logits
    logits = decoding.shape(rules, logits, **history)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    zero = jnp.zeros(best.shape, logits.dtype)
    if rules.greedy == "all":
        return best, chance(plain, best), zero, zero + 1
    temperature, greedy = rules.temperature, None
    if rules.greedy == "some":
        greedy, temperature = temperature == 0, jnp.where(temperature == 0, 1, temperature)
    kept, mass = decoding.truncate(rules, decoding.apply_temperature(logits, temperature))
    # A key per row, not one key for the batch: the row's draw then ignores the rest of the batch.
    token = decoding.categorical(keys, kept)
    if greedy is not None:
        token = jnp.where(greedy[:, 0], best, token)
    behaviour = chance(kept, token)
    if greedy is not None:
        behaviour, mass = jnp.where(greedy[:, 0], zero, behaviour), jnp.where(greedy[:, 0], zero + 1, mass)
    return token, chance(plain, token), behaviour, mass


def _pin(plan: Plan, tree):
    """Keeps the leading axis of every leaf cut over devices as the prompts are; nothing on one device."""
    if plan.rows is None:
        return tree
    free = PartitionSpec.UNCONSTRAINED
    along = lambda leaf: NamedSharding(plan.rows.mesh, PartitionSpec(plan.rows.spec[0], *[free] * (leaf.ndim - 1)))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, along(leaf)), tree)


def apart(plan: Plan, inputs: Inputs) -> Inputs:
    """Inputs with the layers apart where the backend would copy each out of the stack at every step: CPUs, on which a
    step of few rows waits for memory. Elsewhere a second copy of the weights would cost more than it saves."""
    if jax.default_backend() != "cpu":
        return inputs
    return inputs._replace(params=models.layers_apart(plan.config, inputs.params))


def row_keys(seed_key, prompt_ids, count: int):
    """A key for each of `count` samples of every prompt, [B * count], rows b * count + k."""
    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(seed_key, prompt_ids)
    per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        per_prompt, jnp.arange(count, dtype=jnp.uint32))
    return per_sample.reshape(-1, *per_sample.shape[2:])


def prefill(plan: Plan, inputs: Inputs, prompts, prompt_mask) -> tuple[Array, list[models.LayerCache]]:
    """Runs prompts [B,P]: (the hidden state of their last column [B,D], the cache of P slots)."""
    position = jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = _pin(plan, models.init_cache(plan.config, *prompts.shape, inputs.params["embedding"].dtype))
    hidden, cache = models.decode_step(plan.config, inputs.params, prompts, position, cache, 0, prompt_mask,
                                       adapters=inputs.adapters)
    return hidden[:, -1], cache


def in_prompt(plan: Plan, inputs: Inputs, prompts, prompt_mask) -> Array | None:
    """bool [B,V]: the tokens of each prompt; None where no rule asks for them."""
    if inputs.rules.repetition_penalty is None:
        return None
    seen = jnp.zeros((prompts.shape[0], plan.config.vocab_size), bool)
    return seen.at[jnp.arange(prompts.shape[0])[:, None], prompts].max(prompt_mask)


def before(plan: Plan, inputs: Inputs, rows: int, seen: Array | None) -> History:
    """The history of rows of which nothing is sampled; seen: bool [M,V], see in_prompt."""
    counted = inputs.rules.presence_penalty is not None or inputs.rules.frequency_penalty is not None
    return History(seen, jnp.zeros((rows, plan.config.vocab_size), jnp.int32) if counted else None,
                   None if inputs.stops is None else jnp.zeros((rows,), jnp.int32))


def empty(plan: Plan, rows: int) -> Samples:
    """Nothing sampled yet, rows on one axis."""
    full = lambda value, kind: jnp.full((rows, plan.max_new_tokens), value, kind)
    return Samples(full(plan.pad_id, jnp.int32), full(False, bool), full(0, jnp.float32), full(0, jnp.float32),
                   full(1, jnp.float32), jnp.full((rows,), CUT, jnp.int8))


def _first(plan: Plan, inputs: Inputs, prompts, prompt_mask, prompt_ids, seed_key) -> _State:
    """Runs the prompts and samples slot 0."""
    count, new = plan.num_samples, plan.max_new_tokens
    batch, width = prompts.shape
    rows = batch * count
    repeat = lambda a: jnp.repeat(a, count, axis=0)

    keys = row_keys(seed_key, prompt_ids, count)
    hidden, cache = prefill(plan, inputs, prompts, prompt_mask)
    # The last token has no successor, so its key and value are never needed: width + N - 1 slots would do, but a round
    # length keeps one shape for all.
    cache = models.extend_cache(cache, repeats=count, length=width + new)
    key_valid = jnp.concatenate([repeat(prompt_mask), jnp.ones((rows, new), bool)], axis=1)

    seen = jax.tree.map(repeat, in_prompt(plan, inputs, prompts, prompt_mask))
    state = _State(jnp.int32(0), keys, repeat(jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)), key_valid, cache,
                   empty(plan, rows), before(plan, inputs, rows, seen))
    return _sample(plan, inputs, state, repeat(hidden))


def slot(plan: Plan, inputs: Inputs, rules: decoding.Rules, keys, step, hidden, live, history: History):
    """Draws one slot of every row from its hidden state [M,D]: ((token, logp, behaviour_logp, kept_mass) [M] each, with
    what fills a row that is not `live`; why it ends int8 [M]; the history after it).

    step: the slot, a number or int32 [M]; keys [M], one per row; rules: with a temperature [M,1] where it has one.
    """
    rows, (seen, counts, stop) = hidden.shape[0], history
    token, *stats = _draw(jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(step) else None))(keys, step),
                          models.logits(plan.config, inputs.params, hidden), rules, seen=seen, counts=counts,
                          eos_ids=plan.eos_ids,
                          held=None if rules.min_new_tokens is None else step < rules.min_new_tokens)
    # A comparison, not a scatter: it stays on the device that holds the row.
    drawn = None
    if seen is not None or counts is not None:
        drawn = token[:, None] == jnp.arange(plan.config.vocab_size)[None, :]
    stop = None if stop is None else inputs.stops[stop, token]
    ends = jnp.zeros((rows,), bool)
    for number in plan.eos_ids:
        ends |= token == number
    why = jnp.full((rows,), CUT, jnp.int8)
    if stop is not None:
        why = jnp.where(stop == inputs.stops.shape[0] - 1, jnp.int8(STOPPED), why)
    why = jnp.where(ends, jnp.int8(ENDED), why)
    filled = tuple(jnp.where(live, new, jnp.asarray(old, new.dtype))
                   for new, old in zip((token, *stats), (plan.pad_id, 0.0, 0.0, 1.0), strict=True))
    return filled, why, History(None if seen is None else seen | drawn,
                                None if counts is None else counts + drawn.astype(jnp.int32), stop)


def _sample(plan: Plan, inputs: Inputs, state: _State, hidden) -> _State:
    """Draws slot `step` of every row that has not ended from its hidden state [M,D], and records it."""
    step, out, rules = state.step, state.out, inputs.rules
    if rules.temperature is not None and jnp.ndim(rules.temperature) == 1:
        per_row = jnp.repeat(rules.temperature, plan.num_samples)[:, None]
        rules = dataclasses.replace(rules, temperature=per_row)
    live = out.reason == CUT
    drawn, why, history = slot(plan, inputs, rules, state.keys, step, hidden, live, state.history)
    write = lambda table, column: table.at[:, step].set(column.astype(table.dtype))
    stats = (write(table, column) for table, column in zip(out[2:5], drawn[1:], strict=True))
    out = Samples(write(out.tokens, drawn[0]), write(out.mask, live), *stats, jnp.where(live, why, out.reason))
    new = state._replace(step=step + 1, out=out, history=history)
    return new._replace(**_pin(plan, {name: getattr(new, name) for name in _State._fields if name != "step"}))


@jax.custom_batching.custom_vmap
def _unfinished(reason: Array) -> Array:
    """Whether any row goes on. Under vmap: any row of all that are mapped. With an answer for each, the loop would
    choose between the old and the new of everything, caches included, at every step."""
    return jnp.any(reason == CUT)


@_unfinished.def_vmap
def _(axis_size, in_batched, reason):
    del axis_size, in_batched
    return _unfinished(reason), False


def _more(plan: Plan, inputs: Inputs, state: _State, until) -> _State:
    """Samples on until slot `until` is reached or every row has ended."""
    width = state.key_valid.shape[1] - plan.max_new_tokens

    inputs = apart(plan, inputs)

    def advance(state: _State) -> _State:
        # Finished rows decode padding beside the others; nothing they compute is recorded.
        last = state.step - 1
        token = jax.lax.dynamic_slice_in_dim(state.out.tokens, last, 1, axis=1)
        hidden, cache = models.decode_step(plan.config, inputs.params, token, (state.lengths + last)[:, None],
                                           state.cache, width + last, state.key_valid, adapters=inputs.adapters)
        return _sample(plan, inputs, state._replace(cache=cache), hidden[:, 0])

    return jax.lax.while_loop(lambda state: (state.step < until) & _unfinished(state.out.reason), advance, state)


def shaped(plan: Plan, out: Samples) -> Samples:
    """Rows [B * K, ...] as [B, K, ...]."""
    return Samples(*(a.reshape(-1, plan.num_samples, *a.shape[1:]) for a in out))


@functools.partial(jax.jit, static_argnums=0)
def _generate(plan: Plan, inputs: Inputs, prompts, prompt_mask, prompt_ids, seed_key) -> Samples:
    inputs = apart(plan, inputs)
    state = _first(plan, inputs, prompts, prompt_mask, prompt_ids, seed_key)
    return shaped(plan, _more(plan, inputs, state, plan.max_new_tokens).out)


_start = functools.partial(jax.jit, static_argnums=0)(_first)
_continue = functools.partial(jax.jit, static_argnums=0, donate_argnums=2)(_more)


def prepare(config: models.DecoderConfig, params, prompts, prompt_mask, prompt_ids, *, num_samples: int = 1,
             max_new_tokens: int = 32, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, epsilon=0.0,
             repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, bias=None, min_new_tokens=0,
             eos_ids=(), stops=None, pad_id: int = 0, adapters=None) -> tuple[Plan, Inputs]:
    """Checks the settings of generate and sorts them into what is compiled for and what is passed."""
    checks.integer("num_samples", num_samples, 1)
    checks.integer("max_new_tokens", max_new_tokens, 1)
    eos_ids = checks.ids(config.vocab_size, eos_ids, pad_id)
    rules = checks.rules(
        vocab_size=config.vocab_size, batch=prompts.shape[0], max_new_tokens=max_new_tokens, eos_ids=eos_ids,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, epsilon=epsilon,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        bias=bias, min_new_tokens=min_new_tokens)
    checks.arrays(prompts, prompt_mask, prompt_ids)
    if prompts.shape[1] + max_new_tokens > config.max_positions:
        raise ConfigError(f"generate(max_new_tokens=): found {prompts.shape[1]} prompt columns + {max_new_tokens} new "
                          f"tokens, allowed: at most max_positions = {config.max_positions} together")
    cut = None if isinstance(prompts, jax.core.Tracer) else getattr(prompts, "sharding", None)
    if not isinstance(cut, NamedSharding) or cut.mesh.size == 1 or not cut.spec or cut.spec[0] is None:
        cut = None
    return (Plan(config, num_samples, max_new_tokens, eos_ids, pad_id, cut),
            Inputs(params, adapters, rules, checks.stops(stops, config.vocab_size)))


def generate(config: models.DecoderConfig, params: dict[str, Any], prompts: Array, prompt_mask: Array,
             prompt_ids: Array, seed_key: Array, *, num_samples: int = 1, max_new_tokens: int = 32,
             temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0, typical_p: Any = 1.0,
             epsilon: Any = 0.0, repetition_penalty: Any = 1.0, presence_penalty: Any = 0.0,
             frequency_penalty: Any = 0.0, bias: Array | None = None, min_new_tokens: Any = 0,
             eos_ids: tuple[int, ...] = (), stops: Array | None = None, pad_id: int = 0,
             adapters: Any = None) -> Samples:
    """Samples K = num_samples completions of up to N = max_new_tokens tokens for each of B prompts.

    prompts: int32 [B,P], left-padded; prompt_mask: bool [B,P], True on real tokens; prompt_ids: uint32 [B], stable
    ids. Draw (b,k,n) uses the key fold_in(fold_in(fold_in(seed_key, prompt_ids[b]), k), n). adapters: low-rank
    adapters as models.decode_step takes them.

    Rules, applied in this order (see alignax.rollout.decoding; the value that switches one off in brackets): bias [V]
    (None; token_bias makes one), repetition_penalty (1) over prompt and completion, presence_penalty and
    frequency_penalty (0) over the completion, min_new_tokens (0) before which no end token comes, temperature, top_k
    (0), top_p (1), min_p (0), typical_p (1), epsilon (0). temperature 0 is greedy, and truncation then changes nothing;
    an array [B] gives each prompt its own.

    A row ends with the first token in eos_ids, or with the token that completes a stop string (`stops`, int32 [S,V]
    from stop_table; only the completion's text is searched, and text beyond the string in that token stays); both
    count in the mask, and the loop stops once every row has ended. pad_id only fills tokens after the end: it may
    equal an end token, since masks are explicit.

    Compiled once per shape, config, num_samples, max_new_tokens, eos_ids, pad_id and set of rules that are on; their
    values are traced (and may be traced scalars of the caller's, which are then on and unchecked). Memory: each
    layer's cache is B*K*(P+N) slots; penalties keep a table [B*K,V]. prompts that are cut over a mesh along B keep all
    of that cut. Raises ConfigError for a setting out of range, also where P + N exceeds config.max_positions;
    DataError for arrays of the wrong shape, dtype or padding side (the side only when the mask is not traced).
    """
    plan, inputs = prepare(
        config, params, prompts, prompt_mask, prompt_ids, num_samples=num_samples, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, epsilon=epsilon,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        bias=bias, min_new_tokens=min_new_tokens, eos_ids=eos_ids, stops=stops, pad_id=pad_id, adapters=adapters)
    return _generate(plan, inputs, prompts, prompt_mask, prompt_ids, seed_key)


def stream(config: models.DecoderConfig, params: dict[str, Any], prompts: Array, prompt_mask: Array,
           prompt_ids: Array, seed_key: Array, *, chunk: int = 8, **settings) -> Iterator[Samples]:
    """The completions of `generate` (which says what the arguments are) while they grow: yields what there is after
    every `chunk` tokens, and last the whole: the same tokens, and log-probs equal to rounding, since its two programs
    are compiled apart. Costs a pause of the device per chunk."""
    checks.integer("chunk", chunk, 1)
    plan, inputs = prepare(config, params, prompts, prompt_mask, prompt_ids, **settings)
    return _chunks(plan, inputs, (prompts, prompt_mask, prompt_ids, seed_key), chunk)


def _chunks(plan: Plan, inputs: Inputs, arrays, chunk: int) -> Iterator[Samples]:
    state = _start(plan, inputs, *arrays)
    for until in (*range(chunk, plan.max_new_tokens, chunk), plan.max_new_tokens):
        state = _continue(plan, inputs, state, until)
        out = shaped(plan, jax.tree.map(jnp.copy, state.out))  # the state's own buffers go to the next chunk
        yield out
        if bool(out.finished.all()):
            return
