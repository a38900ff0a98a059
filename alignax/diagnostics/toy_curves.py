"""What one reads off a record of the toy table: the five curves, gradient magnitudes, and the theory beside them.

Everything is computed from log-probs in float64 with masks that depend on the pairs alone, so that no entry leaves a
mean when its probability underflows. Source: arXiv 2406.07327.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import logsumexp

from alignax.diagnostics.toy import Pairs, unseen_mask

CURVES = ("avg chosen", "min chosen", "avg rejected", "max rejected", "avg unseen")


def _sides(log_pi: np.ndarray, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """log pi of the chosen and of the rejected responses, [..., N] each."""
    prompt = np.asarray(pairs.prompt)
    return log_pi[..., prompt, np.asarray(pairs.chosen)], log_pi[..., prompt, np.asarray(pairs.rejected)]


def log_mean(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """log of the mean of e^x along an axis, exact where e^x underflows."""
    return logsumexp(x, axis=axis) - np.log(x.shape[axis])


def five(log_pi: object, pairs: Pairs) -> dict[str, np.ndarray]:
    """The natural logs of the five curves, [...] each, from log pi [..., P, A].

    Averages are means of probabilities over the pairs; `avg unseen` is the mean over every (prompt, response) that is
    in none of that prompt's pairs.
    """
    log_pi = np.asarray(log_pi, np.float64)
    chosen, rejected = _sides(log_pi, pairs)
    unseen = log_pi[..., unseen_mask(pairs, *log_pi.shape[-2:])]
    return dict(zip(CURVES, (log_mean(chosen), chosen.min(-1), log_mean(rejected), rejected.max(-1), log_mean(unseen)),
                    strict=True))


def log_magnitudes(log_pi: object, slopes: object, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(log mean |dl/dp|, log mean |dl/dq|), [...] each: the mean over pairs, l a pair's loss, p and q probabilities.

    slopes: [..., N, 2], the derivatives by log p and log q; dl/dp = slope / p, divided in logs. A slope of 0 is -inf.
    """
    chosen, rejected = _sides(np.asarray(log_pi, np.float64), pairs)
    with np.errstate(divide="ignore"):
        size = np.log(np.abs(np.asarray(slopes, np.float64)))
    return log_mean(size[..., 0] - chosen), log_mean(size[..., 1] - rejected)


def theory(log_pi: object, log_ref: object, pairs: Pairs, *, beta_chosen: float = 0.1,
           beta_rejected: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What `log_magnitudes` is by the formula: mean of beta+ sigmoid(-h) / p and of beta- sigmoid(-h) / q, in logs.

    h = beta+ log(p / p0) - beta- log(q / q0); DPO where both strengths are equal (the default), else Flex-DPO.
    """
    beta_rejected = beta_chosen if beta_rejected is None else beta_rejected
    chosen, rejected = _sides(np.asarray(log_pi, np.float64), pairs)
    ref_chosen, ref_rejected = _sides(np.asarray(log_ref, np.float64), pairs)
    pull = -np.logaddexp(0.0, beta_chosen * (chosen - ref_chosen) - beta_rejected * (rejected - ref_rejected))
    return (log_mean(np.log(beta_chosen) + pull - chosen), log_mean(np.log(beta_rejected) + pull - rejected))


def vanishing_unseen(log_pi: object, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(mean of the unseen probabilities that are not zero in float32, how many there are), [...] each.

    The mistake behind the jump in the published curves: entries that underflow leave the mean. `five` has none of it.
    """
    with np.errstate(under="ignore"):
        unseen = np.exp(np.asarray(log_pi, np.float32))[..., unseen_mask(pairs, *np.shape(log_pi)[-2:])]
    tiny = np.finfo(np.float32).tiny
    left = unseen >= tiny  # subnormal numbers are flushed to zero on accelerators
    return np.where(left, unseen, 0).sum(-1) / np.maximum(left.sum(-1), 1), left.sum(-1)


def properties(log_pi: object, pairs: Pairs) -> Mapping[str, np.ndarray]:
    """Numbers of one run (or many, [...]) from its record [..., T, P, A]: one per property of the study.

    drop: how much faster the rejected fell than the chosen moved, mean |change of log q| / mean |change of log p|.
    chosen start, peak, end and the record's index of the peak; rejected end (log); unseen start and end. All but
    `rejected end` are probabilities.
    """
    curves = five(log_pi, pairs)
    chosen, rejected = _sides(np.asarray(log_pi, np.float64), pairs)
    moved = np.abs(chosen[..., -1, :] - chosen[..., 0, :]).mean(-1)
    fell = np.abs(rejected[..., -1, :] - rejected[..., 0, :]).mean(-1)
    average = np.exp(curves["avg chosen"])
    return {
        "drop": fell / np.maximum(moved, 1e-12), "chosen start": average[..., 0], "chosen peak": average.max(-1),
        "peak at": average.argmax(-1), "chosen end": average[..., -1], "rejected end": rejected[..., -1, :].mean(-1),
        "unseen start": np.exp(curves["avg unseen"])[..., 0], "unseen end": np.exp(curves["avg unseen"])[..., -1],
    }
