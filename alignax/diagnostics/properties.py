"""The three properties of preference training told from a run: excess displacement, intervals, verdicts, remedies.

A falling log-likelihood of the chosen completion is no defect in itself: over samples of the reference the mean
log-ratio is -KL(reference || policy) after any training. What is judged is the excess over that baseline, taken on
fresh samples of the same prompts. The properties are those of arXiv 2406.07327; the rules are our own and stand beside
each verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.diagnostics.compare import bootstrap

SHOWN, ABSENT, OPEN = "shown", "not shown", "not judged"


class Interval(NamedTuple):
    """A mean over prompts and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class Verdict(NamedTuple):
    """name of the property, verdict (SHOWN, ABSENT, OPEN), the rule with the numbers put in, and what to try."""

    name: str
    verdict: str
    rule: str
    remedy: str


def interval(values: object, *, seed: int = 0) -> Interval:
    """Mean of [n] and its percentile bootstrap interval over the n prompts; NaN bounds for n = 1."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    return Interval(float(values.mean()), *bootstrap([values], np.mean, seed))


def excess(change: object, baseline: object, *, seed: int = 0) -> Interval:
    """Interval of log-ratios [n] less each prompt's baseline [n], in nats per sequence."""
    return interval(np.asarray(change, np.float64) - np.asarray(baseline, np.float64), seed=seed)


def curves(rows: Sequence[Mapping[str, Any]], stage: str) -> dict[str, np.ndarray]:
    """step, chosen, rejected, unseen, baseline ([T] each; greedy too where it was watched) from the rows of a run:
    those of the live diagnostics, else those of the probe; empty where the run has neither."""
    own = [row for row in rows if row["stage"] == stage]
    for split, prefix in (("diagnostics", "displacement/"), ("probe", "")):
        found = [row for row in own if row["split"] == split and prefix + "chosen" in row and prefix + "unseen" in row]
        if found:
            names = ["chosen", "rejected", "unseen", "baseline"]
            names += ["greedy"] if prefix + "greedy" in found[0] else []
            return {"step": np.array([row["step"] for row in found], float),
                    **{name: np.array([row[prefix + name] for row in found], float) for name in names}}
    return {}


def judge(chosen: Interval, rejected: Interval, seen: Mapping[str, np.ndarray],
          raw: Interval | None = None) -> list[Verdict]:
    """The three verdicts from the excess of both sides at the end and the curves of the run (see `curves`); a fourth
    where the chosen's change without the baseline subtracted is given, `raw`.

    drastic drop: the interval of the rejected lies below 0, and its fall is at least twice the chosen's move.
    degradation: over the run's second half the rejected goes on falling, by over a nat, and the chosen gains nothing.
    dispersion: both intervals lie below 0, so that mass went to completions outside the pairs.
    drift: the chosen lost likelihood, but no more than what the start writes lost anyway; mass went to what it rarely
    writes, and no side of the pairs is the reason.
    """
    drop = rejected.high < 0 and abs(rejected.mean) >= 2 * abs(chosen.mean)
    out = [Verdict("drastic drop of the rejected", SHOWN if drop else ABSENT,
                   f"rejected below 0 with its interval, and |rejected| >= 2 |chosen|: {rejected} against {chosen}",
                   "slow the rejected's fall: flex_dpo with beta_rejected below beta_chosen, or a loss with a target "
                   "margin (ipo, slic_hf)")]
    if len(seen.get("step", ())) >= 3:
        middle = len(seen["step"]) // 2
        rise, fall = (float((seen[side] - seen["baseline"])[-1] - (seen[side] - seen["baseline"])[middle])
                      for side in ("chosen", "rejected"))
        stuck = fall < -1 and rise <= 0
        rule = (f"from step {seen['step'][middle]:.0f} to {seen['step'][-1]:.0f} the rejected's excess falls by over "
                f"1 nat and the chosen's does not rise: {fall:+.2f} and {rise:+.2f}")
        verdict = SHOWN if stuck else ABSENT
    else:
        verdict, rule = OPEN, ("needs three rows of the run in between: train with diagnostics=('displacement',)")
    out.append(Verdict("degradation into suppression", verdict, rule,
                       "keep a pull on the chosen: sft_dpo, rpo or dpop, or stop at the chosen's peak"))
    spread = rejected.high < 0 and chosen.high < 0
    out.append(Verdict("dispersion to other completions", SHOWN if spread else ABSENT,
                       f"both intervals below 0: chosen {chosen}, rejected {rejected}",
                       "take pairs from the policy itself, drop pairs of high CHES score, or add the likelihood of the "
                       "chosen (rpo, sft_dpo)"))
    if raw is not None:
        drift = raw.high < 0 <= chosen.high
        out.append(Verdict("drift from the start", SHOWN if drift else ABSENT,
                           f"the chosen's change itself below 0, its excess not: {raw} and {chosen}",
                           "a larger beta, fewer updates or a smaller learning rate; flex_dpo or rpo lift the chosen "
                           "at a smaller KL"))
    return out
