"""Preference labels drawn from scores by the Bradley-Terry model.

P(i is preferred to j) = sigmoid(scale (r_i - r_j)) (Bradley & Terry 1952); scale = inf labels by the sign, and ties
are a fair coin. Completions with identical texts state no preference and are never paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alignax.types import ConfigError, DataError

STRATEGIES = ("best_worst", "random", "all")


class Pairs(NamedTuple):
    """Labelled pairs.

    chosen, rejected: int64 [m], completion indices. prompt: int64 [m], the row of `scores` that each belongs to.
    ties: pairs whose scores are equal. flipped: pairs whose label contradicts the scores. identical: candidate
    pairs left out because their texts are the same. without_pair: prompts for which no pair was left.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    prompt: np.ndarray
    ties: int
    flipped: int
    identical: int
    without_pair: int


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function of float64 without overflow, also at +-inf."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def bradley_terry_pairs(scores: np.ndarray, rng: np.random.Generator, scale: float = 1.0, *,
                        strategy: str = "best_worst", texts: Sequence[Sequence[str]] | None = None) -> Pairs:
    """Draws pairs and their labels for n prompts with K scored completions each.

    scores: [n, K], finite. strategy: `best_worst` pairs the highest with the lowest score, `random` any two
    (uniformly), `all` every two, K (K - 1) / 2 per prompt. texts: n rows of K completions; identical ones are not
    paired. best_worst takes the pair of distinct texts that is furthest apart, at random among equals, so that K
    tied scores do not favour the first index. A prompt's random numbers depend on its row and on
    K only, not on the strategy or on later prompts.

    Raises ConfigError on an unknown strategy or a negative or NaN scale, DataError on scores that are not finite
    or not [n, K >= 2], and on texts of another shape.
    """
    scores = np.asarray(scores, np.float64)
    if strategy not in STRATEGIES:
        raise ConfigError(f"bradley_terry_pairs: strategy is {strategy!r}, allowed are {list(STRATEGIES)}")
    if not scale >= 0:
        raise ConfigError(f"bradley_terry_pairs: scale is {scale}, expected a number >= 0 (inf is legal)")
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise DataError(f"bradley_terry_pairs: scores has shape {scores.shape}, expected [n, K] with K >= 2")
    if not np.isfinite(scores).all():
        n_bad, k_bad = np.argwhere(~np.isfinite(scores))[0]
        raise DataError(f"bradley_terry_pairs: scores[{n_bad}, {k_bad}] is {scores[n_bad, k_bad]}, expected finite")
    n, K = scores.shape
    first, second = np.triu_indices(K, 1)  # the M candidate pairs of a prompt
    allowed = np.ones((n, len(first)), bool)
    if texts is not None:
        sizes = {len(row) for row in texts}
        if len(texts) != n or not sizes <= {K}:
            raise DataError(f"bradley_terry_pairs: texts has {len(texts)} rows of {sorted(sizes)}, "
                            f"scores {scores.shape}")
        allowed = np.asarray([[row[i] != row[j] for i, j in zip(first, second, strict=True)] for row in texts],
                             bool).reshape(n, len(first))
    draws = rng.random((n, len(first), 2))  # prompt by prompt, so that later prompts change nothing for earlier ones
    priority, coin = draws[..., 0], draws[..., 1]
    gap = scores[:, first] - scores[:, second]
    if strategy == "all":
        taken = allowed
    else:
        distance = np.abs(gap) if strategy == "best_worst" else np.zeros_like(gap)
        distance = np.where(allowed, distance, -1.0)
        leaders = distance == distance.max(axis=1, keepdims=True)
        pick = np.where(leaders, priority, -1.0).argmax(axis=1)
        taken = np.zeros_like(allowed)
        taken[np.arange(n), pick] = True
        taken &= allowed
    prompt, pair = np.nonzero(taken)
    gap, coin = gap[prompt, pair], coin[prompt, pair]
    logit = np.zeros_like(gap)
    # inf * 0 is undefined; a tie is a fair coin at any scale
    np.multiply(scale, gap, out=logit, where=gap != 0)
    first_wins = coin < _sigmoid(logit)
    chosen = np.where(first_wins, first[pair], second[pair])
    rejected = np.where(first_wins, second[pair], first[pair])
    return Pairs(chosen, rejected, prompt, int((gap == 0).sum()), int((first_wins == (gap < 0)).sum(where=gap != 0)),
                 int((~allowed).sum()), int((~taken.any(axis=1)).sum()))
