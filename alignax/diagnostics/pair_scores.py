"""Scores of preference pairs, their ranks and what a rule keeps: arithmetic on numbers that a model gave, in float64.

What each score says of training on the pair: CHES how far its chosen completion would be displaced (2410.08847), the
reference margin whether the reference already prefers the chosen one, the difficulty how much DPO still has to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy import special, stats

from alignax.diagnostics import style
from alignax.types import ConfigError

ABOUT = {
    "ches": "CHES: <H_w, H_l> - |H_w|^2 of summed hidden states",
    "ches_normalised": "CHES of mean hidden states, free of length",
    "margin": "log pi_ref(chosen) - log pi_ref(rejected), nats per sequence",
    "margin_per_token": "the same with each log-prob divided by its tokens, nats per token",
    "reward_margin": "beta times the difference of the log-ratios policy / reference",
    "difficulty": "DPO's loss, -log sigmoid(reward margin), nats",
}
"""Score -> what it is. The last two need a reference beside the policy."""

BY = {"ches": "ches_normalised", "ches_sum": "ches", "margin": "margin", "margin_per_token": "margin_per_token",
      "difficulty": "difficulty"}
"""What a user may filter by -> the score; `ches` is the length-normalised one, which the paper filters by."""


def scores(values: Mapping[str, np.ndarray], *, beta: float = 0.1) -> dict[str, np.ndarray]:
    """Names of ABOUT -> float64 [n], in its order.

    values: ches, ches_normalised [n]; logp, tokens and, where there is a reference, ref_logp: [n,2], chosen first.
    The margin is the reference's, or the policy's own where there is none: it would be the reference of a training
    that starts from it.
    """
    logp, tokens = (np.asarray(values[name], np.float64) for name in ("logp", "tokens"))
    ref = np.asarray(values.get("ref_logp", logp), np.float64)
    out = {name: np.asarray(values[name], np.float64) for name in ("ches", "ches_normalised")}
    out["margin"] = ref[:, 0] - ref[:, 1]
    out["margin_per_token"] = ref[:, 0] / tokens[:, 0] - ref[:, 1] / tokens[:, 1]
    if "ref_logp" in values:
        ratio = logp - ref
        out["reward_margin"] = beta * (ratio[:, 0] - ratio[:, 1])
        out["difficulty"] = -special.log_expit(out["reward_margin"])
    return out


def ranks(values: np.ndarray) -> np.ndarray:
    """int [n]: 1 for the highest; equal values share the smallest of their ranks."""
    return stats.rankdata(-np.asarray(values, np.float64), method="min").astype(int)


class Keep(NamedTuple):
    """A rule: lowest or highest (a share of the pairs), below or above (a bound, included), between (two bounds)."""

    kind: str
    low: float
    high: float = math.nan

    def __str__(self) -> str:
        """As it is written on a command line."""
        return f"{self.kind}:{self.low:g}" + (f":{self.high:g}" if self.kind == "between" else "")


KEEP = "lowest:SHARE, highest:SHARE, below:BOUND, above:BOUND or between:LOW:HIGH"


def parse_keep(text: str) -> Keep:
    """The rule that a text such as lowest:0.9 or between:-1:2 names. Raises ConfigError for any other."""
    kind, *parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError as error:
        raise ConfigError(f"--keep={text}: {error}; allowed: {KEEP}") from error
    wanted = {"lowest": 1, "highest": 1, "below": 1, "above": 1, "between": 2}
    if wanted.get(kind) != len(numbers) or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--keep={text}; allowed: {KEEP}")
    if kind in ("lowest", "highest") and not 0 < numbers[0] <= 1:
        raise ConfigError(f"--keep={text}; allowed: a share above 0 and at most 1")
    if kind == "between" and numbers[0] > numbers[1]:
        raise ConfigError(f"--keep={text}; allowed: the lower bound first")
    return Keep(kind, *numbers)


def kept(values: np.ndarray, rule: Keep) -> np.ndarray:
    """bool [n]: what the rule keeps. Of n pairs a share s keeps round(s n), one at least; of equal values at the cut
    the first ones stay."""
    values = np.asarray(values, np.float64)
    if rule.kind == "below":
        return values <= rule.low
    if rule.kind == "above":
        return values >= rule.low
    if rule.kind == "between":
        return (rule.low <= values) & (values <= rule.high)
    order = np.argsort(values if rule.kind == "lowest" else -values, kind="stable")
    out = np.zeros(len(values), bool)
    out[order[:max(1, math.floor(rule.low * len(values) + 0.5))]] = True
    return out


def summary(found: Mapping[str, np.ndarray], tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """Score -> mean, sd, low, median, high (5%, 50%, 95%) and length: Spearman's correlation with the difference of
    lengths, chosen less rejected, which a filter would also select by; NaN where one of the two is constant."""
    gap = tokens[:, 0] - tokens[:, 1]
    out = {}
    for name, values in found.items():
        low, median, high = np.percentile(values, [5, 50, 95])
        tied = np.ptp(values) == 0 or np.ptp(gap) == 0
        out[name] = {"mean": float(values.mean()), "sd": float(values.std()), "low": float(low),
                     "median": float(median), "high": float(high),
                     "length": math.nan if tied else float(stats.spearmanr(values, gap).statistic)}
    return out


_AXES = {"ches": "CHES", "ches_normalised": "length-normalised CHES", "margin": "reference margin (nats)",
         "margin_per_token": "reference margin (nats per token)", "reward_margin": "implicit reward margin",
         "difficulty": "difficulty: DPO's loss (nats)"}


def histograms(found: Mapping[str, np.ndarray], keep: np.ndarray, by: str, path: str | Path) -> Path:
    """One histogram per score, what is kept under what is dropped; the score that was filtered by is marked.

    keep: bool [n]; by: a name of `found`, or "" where nothing was filtered. The outermost 0.5% on either side are
    drawn into the first and last bar, so that a few extreme pairs do not flatten the rest.
    """
    columns = min(3, len(found))
    count = -(-len(found) // columns)
    figure = style.figure(3.9 * columns, 2.7 * count)
    for place, (name, values) in enumerate(found.items()):
        axes = style.axes(figure, count, columns, place + 1)
        edges = _edges(values)
        shown = np.clip(values, edges[0], edges[-1])
        parts = [shown[keep], shown[~keep]] if by else [shown]
        colours = [style.COLOURS[0], style.COLOURS[1]][:len(parts)]
        axes.hist(parts, bins=edges, stacked=True, color=colours, label=["kept", "dropped"][:len(parts)])
        axes.axvline(np.median(values), color=style.INK, linewidth=1.2, linestyle="--", label="median of all")
        axes.set_xlabel(_AXES[name])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("pairs" if place % columns == 0 else "")
        if name == by:
            style.title(axes, "filtered by this score")
        if not place:
            style.legend(axes, fontsize=style.NOTE)
    return style.save(figure, path)


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of 30 bars over the inner 99% of the values."""
    low, high = np.percentile(values, [0.5, 99.5])
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 31)
