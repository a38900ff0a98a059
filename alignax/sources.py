"""Where completions come from: rollouts of a policy on prompts, cut into batches of one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.models import DecoderConfig
from alignax.rollout import CUT, generate
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
            temperature: Any = 1.0, rows: jax.sharding.NamedSharding | None = None,
            advance: Callable[[int], None] | None = None, **rules) -> Rollouts:
    """Samples `num_samples` completions of every prompt.

    prompts: int32 id arrays; numbers: their uint32 record numbers, from which each draw's key is folded, so that a
    completion depends on neither its batch nor its position. The last batch is filled with repeats that are cut off
    again, so that one program serves all. temperature: a number, or one for each prompt. rows: how a batch is cut over
    devices along its prompts; a batch is then filled up to a multiple of the pieces. rules: the other decoding rules,
    `stops` and `adapters` of rollout.generate. `advance` is called with the number of prompts that were done.
    Raises ConfigError where there are no prompts, or not one temperature for each.
    """
    if not len(prompts):
        raise ConfigError("rollout(prompts=): found none, allowed: one prompt or more")
    if np.ndim(temperature) and np.shape(temperature) != (len(prompts),):
        raise ConfigError(f"rollout(temperature=): found the shape {np.shape(temperature)}, allowed: a number, or one "
                          f"for each of {len(prompts)} prompts")
    longest = max(len(p) for p in prompts)
    # Rounded up, so that few shapes are compiled for, but never at the cost of a position that the model has.
    width = max(longest, min(-(-longest // 8) * 8, config.max_positions - max_new_tokens))
    size = min(batch_size, len(prompts))
    if rows is not None:
        pieces = math.prod(rows.mesh.shape[a] for a in np.atleast_1d(rows.spec[0]).tolist())
        size = -(-size // pieces) * pieces
    out, place = [], (lambda a: a) if rows is None else (lambda a: jax.device_put(a, rows))
    for start in range(0, len(prompts), size):
        index = np.arange(start, start + size) % len(prompts)
        real = min(size, len(prompts) - start)
        grid = np.full((size, width), pad_id, np.int32)
        mask = np.zeros((size, width), bool)
        for i, j in enumerate(index):
            grid[i, width - len(prompts[j]):] = prompts[j]
            mask[i, width - len(prompts[j]):] = True
        ids = np.asarray([numbers[j] for j in index], np.uint32)
        samples = generate(config, params, place(grid), place(mask), place(ids), key, num_samples=num_samples,
                           max_new_tokens=max_new_tokens, eos_ids=tuple(eos_ids), pad_id=pad_id,
                           temperature=np.asarray(temperature)[index] if np.ndim(temperature) else temperature, **rules)
        out.append(jax.tree.map(lambda a, real=real: a[:real], jax.device_get(samples)))
        if advance:
            advance(real)

    def scored(name: str) -> list[list[np.ndarray]]:
        return [[a[m] for a, m in zip(*row, strict=True)]
                for batch in out for row in zip(getattr(batch, name), batch.mask, strict=True)]

    join = lambda arrays: np.concatenate(list(arrays))
    return Rollouts(scored("tokens"), join((b.logps * b.mask).sum(-1) for b in out), join(b.reason for b in out),
                    scored("logps"), scored("behaviour_logps"), scored("kept_mass"))
