"""Where completions come from: rollouts of a policy on prompts, cut into batches of one shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.models import DecoderConfig
from alignax.rollout import CUT, Samples, generate, refill
from alignax.types import ConfigError


class Rollouts(NamedTuple):
    """Completions of n prompts, K each. tokens: nested lists of int32 ids, the end token included where it came.
    logps: float32 [n,K], sums under the policy. reason: int8 [n,K], why each ended (rollout.REASONS). token_logps,
    behaviour_logps, kept_mass: nested lists of float32, one number for each token, as rollout.Samples defines them."""

    tokens: list[list[np.ndarray]]
    logps: np.ndarray
    reason: np.ndarray
    token_logps: list[list[np.ndarray]]
    behaviour_logps: list[list[np.ndarray]]
    kept_mass: list[list[np.ndarray]]

    @property
    def finished(self) -> np.ndarray:
        """bool [n,K]: an end token or a stop string was sampled."""
        return self.reason > CUT


def rollout(config: DecoderConfig, params, prompts: Sequence[np.ndarray], numbers: Sequence[int], key: jax.Array, *,
            num_samples: int, max_new_tokens: int, eos_ids: Sequence[int], pad_id: int, batch_size: int,
            temperature: Any = 1.0, rows: jax.sharding.NamedSharding | None = None, lanes: int = 0,
            advance: Callable[[int], None] | None = None, **rules) -> Rollouts:
    """Samples `num_samples` completions of every prompt.

    prompts: int32 id arrays; numbers: their uint32 record numbers, from which each draw's key is folded, so that a
    completion depends on neither its batch nor its position. The last batch is filled with repeats that are cut off
    again, so that one program serves all. temperature: a number, or one for each prompt. rows: how a batch is cut over
    devices along its prompts; a batch is then filled up to a multiple of the pieces. lanes: above 0, at most so many
    completions of a batch are in work at once, and one that ends makes room for the next (rollout.refill); the
    completions are the same. rules: the other decoding rules, `stops` and `adapters` of rollout.generate. `advance` is
    called with the number of prompts that were done. Raises ConfigError where there are no prompts, not one temperature
    for each, or lanes beside rows.
    """
    if not len(prompts):
        raise ConfigError("rollout(prompts=): found none, allowed: one prompt or more")
    if np.ndim(temperature) and np.shape(temperature) != (len(prompts),):
        raise ConfigError(f"rollout(temperature=): found the shape {np.shape(temperature)}, allowed: a number, or one "
                          f"for each of {len(prompts)} prompts")
    if lanes and rows is not None:
        raise ConfigError(f"rollout(lanes=): found {lanes} beside rows cut over devices, allowed: 0, or no rows=")
    size = min(batch_size, len(prompts))
    if lanes:  # Batches of even size: in a lane, a repeat costs as much as a prompt.
        size = -(-len(prompts) // -(-len(prompts) // size))
    if rows is not None:
        pieces = math.prod(rows.mesh.shape[a] for a in np.atleast_1d(rows.spec[0]).tolist())
        size = -(-size // pieces) * pieces
    sampled = functools.partial(refill, lanes=lanes) if lanes else generate
    out, place = [], (lambda a: a) if rows is None else (lambda a: jax.device_put(a, rows))
    width = columns(config, prompts, max_new_tokens)
    for grid, mask, ids, index, real in batches(prompts, numbers, width=width, size=size, pad_id=pad_id):
        samples = sampled(config, params, place(grid), place(mask), place(ids), key, num_samples=num_samples,
                          max_new_tokens=max_new_tokens, eos_ids=tuple(eos_ids), pad_id=pad_id,
                          temperature=np.asarray(temperature)[index] if np.ndim(temperature) else temperature, **rules)
        out.append(jax.tree.map(lambda a, real=real: a[:real], jax.device_get(samples)))
        if advance:
            advance(real)
    return joined(out)


def columns(config: DecoderConfig, prompts: Sequence[np.ndarray], max_new_tokens: int) -> int:
    """The width of the prompts' grid: rounded up, so that few shapes are compiled for, but never at the cost of a
    position that the model has."""
    longest = max(len(p) for p in prompts)
    return max(longest, min(-(-longest // 8) * 8, config.max_positions - max_new_tokens))


def batches(prompts: Sequence[np.ndarray], numbers: Sequence[int], *, width: int, size: int, pad_id: int
            ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]]:
    """Batches of `size` prompts: (tokens int32 [size,width] padded on the left, their mask bool, record numbers uint32
    [size], which prompts they are, how many of them are no repeats that fill the last batch)."""
    for start in range(0, len(prompts), size):
        index = np.arange(start, start + size) % len(prompts)
        grid = np.full((size, width), pad_id, np.int32)
        mask = np.zeros((size, width), bool)
        for i, j in enumerate(index):
            grid[i, width - len(prompts[j]):] = prompts[j]
            mask[i, width - len(prompts[j]):] = True
        yield grid, mask, np.asarray([numbers[j] for j in index], np.uint32), index, min(size, len(prompts) - start)


def joined(parts: Sequence[Samples]) -> Rollouts:
    """The completions of consecutive batches; parts: NumPy, without the repeats."""

    def scored(name: str) -> list[list[np.ndarray]]:
        return [[a[m] for a, m in zip(*row, strict=True)]
                for batch in parts for row in zip(getattr(batch, name), batch.mask, strict=True)]

    join = lambda arrays: np.concatenate(list(arrays))
    return Rollouts(scored("tokens"), join((b.logps * b.mask).sum(-1) for b in parts), join(b.reason for b in parts),
                    scored("logps"), scored("behaviour_logps"), scored("kept_mass"))
