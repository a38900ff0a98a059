"""Comparing two sets of samples: win rates with an interval, diversity, KL on samples, and best-of-n in closed form.

Plain numpy on the host, in float64: these run once per evaluation, on numbers that have left the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_Z95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution


def bootstrap(groups: Sequence[np.ndarray], location, seed: int) -> tuple[float, float]:
    """The percentiles 2.5 and 97.5 of the location of RESAMPLES bootstrap samples, drawn group by group.

    groups: float64 [n] each; location(samples, axis=1), as np.mean.
    """
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([g[rng.integers(g.size, size=(RESAMPLES, g.size))] for g in groups], axis=1)
    low, high = np.percentile(location(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _vector(name: str, value) -> np.ndarray:
    """`value` as finite float64 [N], N >= 1; raises ValueError naming the argument otherwise."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must have shape [N] with N >= 1, found {list(array.shape)}")
    bad = int(np.size(array) - np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name} must be finite, found {bad} of {array.size} values that are not")
    return array


def _pair(a_name: str, a, b_name: str, b) -> tuple[np.ndarray, np.ndarray]:
    """Two finite float64 vectors of one length; raises ValueError otherwise."""
    a, b = _vector(a_name, a), _vector(b_name, b)
    if a.shape != b.shape:
        raise ValueError(f"{a_name} and {b_name} must have one length, found {a.size} and {b.size}")
    return a, b


def win_rate(a, b) -> tuple[float, float, float]:
    """How often `a` beats `b`, a tie counting half, with a 95% interval.

    a, b: [N] scores of two answers to the same N prompts. Returns (rate, lo, hi), rate = mean(1[a > b] + 1[a = b]/2).
    The interval is Wilson's score interval (Wilson 1927) at the observed rate: it stays inside [0, 1] and keeps a
    width at rates 0 and 1, where the plain normal interval has none. It treats every comparison as win-or-loss,
    whose variance is at least that of outcomes with ties, so that with ties it is on the wide side. It assumes that
    the N comparisons are independent: average several samples of one prompt first.
    Raises ValueError on empty, unequal or non-finite input.
    """
    a, b = _pair("a", a, "b", b)
    n = a.size
    rate = float(np.mean((a > b) + 0.5 * (a == b)))
    return rate, *wilson(rate, n)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """(lo, hi), Wilson's 95% score interval of a rate in [0, 1] that was observed in n >= 1 independent trials."""
    z2 = _Z95 * _Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # At rate 0 or 1 the end equals the rate exactly on paper; rounding must not push it to the other side.
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


def distinct_n(token_lists: Sequence[Sequence], n: int) -> float:
    """Share of n-grams that are distinct, pooled over all lists (corpus-level distinct-n; Li et al., 1510.03055).

    token_lists: token ids or strings, one list per text, without padding; n-grams do not cross texts. Returns
    unique / total in (0, 1], or NaN where no list has n tokens. It falls with the amount of text: compare equal
    numbers of tokens. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}")
    seen, total = set(), 0
    for tokens in token_lists:
        tokens = list(tokens)
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def kl_on_policy(logps_policy_sum, logps_ref_sum) -> tuple[float, float]:
    """KL(policy || reference) in nats per sequence, estimated on samples of the policy.

    Both arguments: [N] sums of log-probs over the completion tokens of the same N samples, drawn from the policy at
    temperature 1 without truncation (otherwise this is not the KL of the sampled distribution). Returns (mean of the
    log-ratio, its standard error); the mean can be negative by chance. The standard error is NaN for N = 1.
    Raises ValueError on empty, unequal or non-finite input.
    """
    policy, reference = _pair("logps_policy_sum", logps_policy_sum, "logps_ref_sum", logps_ref_sum)
    ratio = policy - reference
    error = float(np.std(ratio, ddof=1) / math.sqrt(ratio.size)) if ratio.size > 1 else math.nan
    return float(np.mean(ratio)), error


def _best_of(n) -> np.ndarray:
    """`n` as float64; raises ValueError below 1."""
    array = np.asarray(n, dtype=np.float64)
    if not (array >= 1).all():
        raise ValueError(f"best-of-n needs n >= 1, found {array.min()}")
    return array


def best_of_n_kl(n):
    """KL(best-of-n || reference) = log n - (n-1)/n nats (n >= 1, any shape; real n interpolates).

    Exact where no two samples tie in score, an upper bound otherwise (2401.01879). Raises ValueError for n < 1.
    """
    n = _best_of(n)
    return np.log(n) - (n - 1) / n


def best_of_n_win_rate(n):
    """Probability n/(n+1) that the best of n samples beats one more sample of the reference (n >= 1, any shape).

    By symmetry: the opponent is the best of all n + 1 with probability 1/(n+1). Exact where no two samples tie.
    Raises ValueError for n < 1.
    """
    n = _best_of(n)
    return n / (n + 1)
