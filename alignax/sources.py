"""Where completions come from: rollouts of a policy on prompts, cut into batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignax.models import DecoderConfig
from alignax.rollout import generate


class Rollouts(NamedTuple):
    """Completions of n prompts, K each. tokens: nested lists of int32 ids, the end token included where it came.
    logps: float32 [n,K], sums under the policy. finished: bool [n,K], whether an end token was sampled."""

    tokens: list[list[np.ndarray]]
    logps: np.ndarray
    finished: np.ndarray


def rollout(config: DecoderConfig, params, prompts: Sequence[np.ndarray], numbers: Sequence[int], key: jax.Array, *,
            num_samples: int, max_new_tokens: int, temperature: float, top_p: float, eos_ids: Sequence[int],
            pad_id: int, batch_size: int, advance: Callable[[int], None] | None = None) -> Rollouts:
    """Samples `num_samples` completions of every prompt.

    prompts: int32 id arrays; numbers: their uint32 record numbers, from which each draw's key is folded, so that a
    completion depends on neither its batch nor its position. The last batch is filled with repeats that are cut off
    again, so that one program serves all. `advance` is called with the number of prompts that were done.
    """
    width = -(-max(len(p) for p in prompts) // 8) * 8
    batch_size = min(batch_size, len(prompts))
    tokens, logps, finished = [], [], []
    for start in range(0, len(prompts), batch_size):
        index = np.arange(start, start + batch_size) % len(prompts)
        real = min(batch_size, len(prompts) - start)
        grid = np.full((batch_size, width), pad_id, np.int32)
        mask = np.zeros((batch_size, width), bool)
        for i, j in enumerate(index):
            grid[i, width - len(prompts[j]):] = prompts[j]
            mask[i, width - len(prompts[j]):] = True
        out = generate(config, params, grid, mask, np.asarray([numbers[j] for j in index], np.uint32), key,
                       num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                       eos_ids=tuple(eos_ids), pad_id=pad_id)
        out = jax.device_get(out)
        for i in range(real):
            tokens.append([out.tokens[i, k][out.mask[i, k]] for k in range(num_samples)])
        logps.append((out.logps * out.mask).sum(-1)[:real])
        finished.append(out.finished[:real])
        if advance:
            advance(real)
    return Rollouts(tokens, np.concatenate(logps), np.concatenate(finished))
