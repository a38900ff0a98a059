"""What the statements share: the arrays by name, the register, and a dozen one-line functions.

A stop-gradient sg[f(x)] is written f(x.sg): `x.sg` keeps the arrays of the point at which a derivative is taken while
`x` moves. Arrays without a gradient by contract (the reference, data) never move, so they are read from `x` anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

STATEMENTS: dict[str, Callable[..., Any]] = {}


class Arrays:
    """Named arrays as attributes; `sg` holds the same names, fixed while derivatives are taken."""

    def __init__(self, arrays: dict[str, Any], fixed: Arrays | None = None):
        self.__dict__.update(arrays)
        self.sg = self if fixed is None else fixed


def states(*ids: str) -> Callable[[Callable], Callable]:
    """Register the function below as the statement of these losses."""

    def attach(function: Callable) -> Callable:
        for id in ids:
            assert id not in STATEMENTS, id
            STATEMENTS[id] = function
        return function

    return attach


def sigmoid(z: float) -> float:
    """1 / (1 + e^-z)."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def sp(z: float) -> float:
    """log(1 + e^z)."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def relu(z: float) -> float:
    """max(0, z)."""
    return max(0.0, z)


def hold(z: float, low: float, high: float) -> float:
    """z, no less than low and no more than high."""
    return min(max(z, low), high)


def log_sum_exp(values: Iterable[float]) -> float:
    """log of the sum of e^value."""
    values = list(values)
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def softmax(values: Iterable[float]) -> list[float]:
    """e^v / sum of e^v."""
    values = list(values)
    total = log_sum_exp(values)
    return [math.exp(v - total) for v in values]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    values = list(values)
    return float(sum(values)) / len(values) if values else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    return float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))


def smoothed(m: float, e: float) -> float:
    """(1 - e) sp(-m) + e sp(m)."""
    return (1 - e) * sp(-m) + e * sp(m)


def lr(x: Arrays, b: int, k: int) -> float:
    """log pi - log pi_ref of completion k of prompt b."""
    return x.logps[b, k] - x.ref_logps[b, k]


def ratios(x: Arrays) -> list[tuple[float, float]]:
    """(lr_w, lr_l) of every pair."""
    return [(lr(x, b, 0), lr(x, b, 1)) for b in range(len(x.logps))]


def gaps(x: Arrays) -> list[float]:
    """Delta = lr_w - lr_l of every pair."""
    return [w - lo for w, lo in ratios(x)]


def live(x: Arrays, b: int, k: int) -> list[int]:
    """The scored slots of a completion, in order."""
    return [t for t in range(x.mask.shape[2]) if x.mask[b, k, t]]


def token_lr(x: Arrays, b: int, k: int, t: int) -> float:
    """l_t = log pi(y_t) - log pi_ref(y_t)."""
    return x.token_logps[b, k, t] - x.ref_token_logps[b, k, t]


def completions(x: Arrays) -> Iterator[tuple[int, int]]:
    """(b, k) of the completions that exist: those named valid, else those with scored tokens."""
    there = x.valid if hasattr(x, "valid") else x.mask.any(-1)
    for b in range(there.shape[0]):
        for k in range(there.shape[1]):
            if there[b, k]:
                yield b, k


def existing(x: Arrays, b: int) -> list[int]:
    """The completions of prompt b that exist."""
    return [k for c, k in completions(x) if c == b]


def nll_tokens(x: Arrays, k: int = 0) -> float:
    """-(sum of S over the batch) / (sum of n) of completion k of each prompt."""
    return -sum(s[k] for s in x.logps) / sum(n[k] for n in x.lengths)
