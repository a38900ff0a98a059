"""Sampling with continuous refill: a row that has ended takes the next completion that waits.

No row idles while others go on. Worth it where lengths differ much: `generate` runs every batch to the end of its
longest completion.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax import models
from alignax.rollout import checks
from alignax.rollout.sampler import (
    CUT,
    History,
    Inputs,
    Plan,
    Samples,
    apart,
    before,
    empty,
    in_prompt,
    prefill,
    prepare,
    row_keys,
    shaped,
    slot,
)
from alignax.types import Array, ConfigError


class _Prompts(NamedTuple):
    """Every prompt, run once: the hidden state of its last token [B,D], its cache of P slots, its mask bool [B,P], its
    tokens bool [B,V] (None without a repetition penalty); and a key per completion [M]."""

    hidden: Array
    cache: list[models.LayerCache]
    mask: Array
    seen: Array | None
    keys: Array


class _Lanes(NamedTuple):
    """Between two steps. row: int32 [L], the completion of each lane, M where it has none; step: int32 [L], its slots
    that are sampled; token: int32 [L], the last of them, which is not in the cache yet; waiting: the first completion
    that no lane has had."""

    row: Array
    step: Array
    token: Array
    waiting: Array
    lengths: Array
    key_valid: Array
    cache: list[models.LayerCache]
    out: Samples
    history: History


def _load(plan: Plan, lanes: _Lanes, prompts: _Prompts, hidden) -> tuple[_Lanes, Array]:
    """Gives lanes without a completion the ones that wait, and their hidden states [L,D] those of their prompts."""
    total, count = lanes.out.reason.shape[0], plan.num_samples
    idle = lanes.row == total
    wanted = lanes.waiting + jnp.cumsum(idle, dtype=jnp.int32) - 1
    fresh = idle & (wanted < total)
    row = jnp.where(fresh, wanted, lanes.row)
    prompt = jnp.minimum(row, total - 1) // count
    order = jnp.argsort(~fresh, stable=True)

    def copy(number, cache):
        lane = order[number]
        take = lambda kept, given: jax.lax.dynamic_update_slice(
            kept, jax.lax.dynamic_slice_in_dim(given, prompt[lane], 1, axis=0), (lane, 0, 0, 0))
        return jax.tree.map(take, cache, prompts.cache)

    cache = jax.lax.fori_loop(0, jnp.sum(fresh, dtype=jnp.int32), copy, lanes.cache)
    mask = prompts.mask[prompt]
    valid = jnp.concatenate([mask, jnp.ones((mask.shape[0], plan.max_new_tokens), bool)], axis=1)
    pick = lambda new, old: None if old is None else jnp.where(fresh.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    lanes = lanes._replace(
        row=row, step=pick(0, lanes.step), waiting=lanes.waiting + jnp.sum(fresh, dtype=jnp.int32),
        lengths=pick(jnp.sum(mask, axis=1, dtype=jnp.int32), lanes.lengths), key_valid=pick(valid, lanes.key_valid),
        cache=cache, history=History(None if prompts.seen is None else pick(prompts.seen[prompt], lanes.history.seen),
                                     pick(0, lanes.history.counts), pick(0, lanes.history.stop)))
    return lanes, pick(prompts.hidden[prompt], hidden)


def _sample(plan: Plan, inputs: Inputs, lanes: _Lanes, prompts: _Prompts, hidden) -> _Lanes:
    """Draws one slot of every lane that has a completion, and records it; a completion that ends leaves its lane."""
    out, total = lanes.out, lanes.out.reason.shape[0]
    live, own = lanes.row < total, jnp.minimum(lanes.row, total - 1)
    rules = inputs.rules
    if rules.temperature is not None and jnp.ndim(rules.temperature) == 1:
        rules = dataclasses.replace(rules, temperature=rules.temperature[own // plan.num_samples][:, None])
    drawn, why, history = slot(plan, inputs, rules, prompts.keys[own], lanes.step, hidden, live, lanes.history)
    # Row M of lanes without a completion is outside: what they drew is dropped.
    write = lambda table, column: table.at[lanes.row, lanes.step].set(column.astype(table.dtype), mode="drop")
    stats = (write(table, column) for table, column in zip(out[2:5], drawn[1:], strict=True))
    out = Samples(write(out.tokens, drawn[0]), write(out.mask, live), *stats,
                  out.reason.at[lanes.row].set(why, mode="drop"))
    done = (why != CUT) | (lanes.step + 1 == plan.max_new_tokens)
    return lanes._replace(row=jnp.where(live & done, total, lanes.row), step=lanes.step + 1, token=drawn[0], out=out,
                          history=history)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(plan: Plan, size: int, inputs: Inputs, prompts, prompt_mask, prompt_ids, seed_key) -> Samples:
    (batch, width), new = prompts.shape, plan.max_new_tokens
    total, inputs = batch * plan.num_samples, apart(plan, inputs)
    hidden, cache = jax.lax.map(lambda one: jax.tree.map(lambda a: a[0], prefill(plan, inputs, one[0][None],
                                                                                  one[1][None])),
                                (prompts, prompt_mask), batch_size=min(size, batch))
    seen = in_prompt(plan, inputs, prompts, prompt_mask)
    ready = _Prompts(hidden, cache, prompt_mask, seen, row_keys(seed_key, prompt_ids, plan.num_samples))
    unseen = None if seen is None else jnp.zeros((size, plan.config.vocab_size), bool)
    lanes = _Lanes(
        jnp.full((size,), total, jnp.int32), jnp.zeros((size,), jnp.int32), jnp.zeros((size,), jnp.int32), jnp.int32(0),
        jnp.ones((size,), jnp.int32), jnp.ones((size, width + new), bool),
        models.init_cache(plan.config, size, width + new, inputs.params["embedding"].dtype), empty(plan, total),
        before(plan, inputs, size, unseen))

    def advance(lanes: _Lanes) -> _Lanes:
        last = jnp.maximum(lanes.step - 1, 0)  # a lane that never had a completion has no last slot
        hidden, cache = models.decode_step(plan.config, inputs.params, lanes.token[:, None],
                                           (lanes.lengths + last)[:, None], lanes.cache, width + last, lanes.key_valid,
                                           adapters=inputs.adapters)
        lanes, hidden = _load(plan, lanes._replace(cache=cache), ready, hidden[:, 0])
        return _sample(plan, inputs, lanes, ready, hidden)

    lanes, hidden = _load(plan, lanes, ready, jnp.zeros((size, hidden.shape[-1]), hidden.dtype))
    lanes = _sample(plan, inputs, lanes, ready, hidden)
    lanes = jax.lax.while_loop(lambda lanes: jnp.any(lanes.row < total) | (lanes.waiting < total), advance, lanes)
    return shaped(plan, lanes.out)


def refill(config: models.DecoderConfig, params: dict[str, Any], prompts: Array, prompt_mask: Array, prompt_ids: Array,
           seed_key: Array, *, lanes: int, **settings) -> Samples:
    """The Samples of `generate`, whose arguments these are, with at most `lanes` completions in work at once.

    The same draws: a completion is equal to that of `generate` up to the rounding of matrix products of another size.
    Every prompt is run first, `lanes` at a time, and its cache kept (P slots per prompt and layer); a lane holds P + N
    slots, and copies its prompt's when it takes a completion. Compiled once per shape, `lanes` and what `generate` is
    compiled for. Raises ConfigError as `generate` does, for lanes below 1, and for prompts that are cut over a mesh.
    """
    checks.integer("lanes", lanes, 1)
    plan, inputs = prepare(config, params, prompts, prompt_mask, prompt_ids, **settings)
    if plan.rows is not None:
        raise ConfigError(f"refill(prompts=): found prompts cut as {plan.rows.spec}, allowed: prompts on one device; "
                          "generate() takes the others")
    return _run(plan, min(lanes, prompts.shape[0] * plan.num_samples), inputs, prompts, prompt_mask, prompt_ids,
                seed_key)
