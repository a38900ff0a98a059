"""What a sweep says: configurations over their seeds, and what each factor does, with bootstrap intervals.

The location is the interquartile mean, the mean of the middle half (scipy.stats.trim_mean at 0.25; up to three values
it is their mean): less noisy than the median, and not moved by a few extreme seeds, as Agarwal et al. recommend for
few runs (arXiv 2108.13264). Intervals are 95% percentile intervals of bootstrap samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignax.diagnostics.compare import bootstrap

MOST_LEVELS = 8
_BINS = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A location with its 95% interval over `n` values; low and high are None for a single value."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Members that differ in the seed alone. values: of the metric, in the order of members; failed: those without."""

    factors: Mapping[str, Any]
    members: tuple[str, ...]
    values: tuple[float, ...]
    failed: int
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Level:
    """One value (or range of values) of a factor. behind: mean over pairs of members alike in all else of this level's
    value minus the best level's, with its interval; None for the best level itself and where there are no pairs."""

    label: str
    estimate: Estimate
    failed: int
    behind: Estimate | None


@dataclasses.dataclass(frozen=True)
class Effect:
    """A factor with its levels, in order, and the difference of the best and the worst level's location."""

    factor: str
    levels: tuple[Level, ...]
    spread: float


def interquartile_mean(values: Any, axis: int = -1) -> np.ndarray:
    """The mean of the middle half along an axis; float64."""
    from scipy import stats

    return stats.trim_mean(np.asarray(values, np.float64), 0.25, axis=axis)


def estimate(strata: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """The interquartile mean of all values with a stratified bootstrap interval.

    strata: values by configuration. Where every stratum has two values or more, seeds are drawn again inside each one,
    so that the interval is about seeds and the grid stands as it is; else values are drawn from all alike.
    Raises ValueError where there is no value.
    """
    groups = [np.asarray(stratum, np.float64) for stratum in strata if len(stratum)]
    if not groups:
        raise ValueError("an estimate needs at least one value")
    pooled = np.concatenate(groups)
    value = float(interquartile_mean(pooled))
    if pooled.size < 2:
        return Estimate(value, None, None, 1)
    if min(group.size for group in groups) < 2:
        groups = [pooled]
    return Estimate(value, *bootstrap(groups, interquartile_mean, seed), pooled.size)


def mean_difference(pairs: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of differences of matched members, with its bootstrap interval over pairs; ValueError without any."""
    values = np.asarray(pairs, np.float64)
    if not values.size:
        raise ValueError("a mean difference needs at least one pair")
    if values.size < 2:
        return Estimate(float(values.mean()), None, None, 1)
    return Estimate(float(values.mean()), *bootstrap([values], np.mean, seed), values.size)


def value_of(row: Mapping[str, Any], metric: str) -> float | None:
    """A member's metric, or None where it is absent or not finite."""
    value = row["metrics"].get(metric)
    return None if value is None or not math.isfinite(value) else float(value)


def factors_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The factors, in the order first met, that have two values or more and are not the seed."""
    names = dict.fromkeys(key for row in rows for key in row["factors"])
    return [n for n in names if n != "seed" and len({_key(row["factors"].get(n)) for row in rows}) > 1]


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _others(row: Mapping[str, Any], *without: str) -> tuple:
    """Everything else that tells a member apart, to be compared with that of others."""
    return tuple(sorted((k, repr(v)) for k, v in row["factors"].items() if k not in without))


def configurations(rows: Sequence[Mapping[str, Any]], metric: str, *, lower: bool = False) -> list[Configuration]:
    """The configurations with a value of the metric, best first."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_others(row, "seed"), []).append(row)
    out = []
    for held in groups.values():
        known = [(row["member"], value) for row in held if (value := value_of(row, metric)) is not None]
        if known:
            names, values = zip(*known, strict=True)
            factors = {k: v for k, v in held[0]["factors"].items() if k != "seed"}
            out.append(Configuration(factors, names, values, len(held) - len(known), estimate([values])))
    return sorted(out, key=lambda c: c.estimate.value if lower else -c.estimate.value)


def levels_of(rows: Sequence[Mapping[str, Any]], factor: str) -> tuple[list[str], dict[str, str]]:
    """(labels in order, member -> label): the values of a factor, or four ranges where numbers are many.

    Members without the factor have no label. Numbers are ordered by size, other values as first met.
    """
    held = {row["member"]: _key(row["factors"][factor]) for row in rows if row["factors"].get(factor) is not None}
    distinct = list(dict.fromkeys(held.values()))
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in distinct)
    if numeric and len(distinct) > MOST_LEVELS:
        edges = np.quantile(list(held.values()), np.linspace(0, 1, _BINS + 1))
        labels = [f"{a:.3g} to {b:.3g}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
        place = lambda v: labels[min(int(np.searchsorted(edges, v, side="right")) - 1, _BINS - 1)]
        return list(dict.fromkeys(labels)), {member: place(v) for member, v in held.items()}
    distinct = sorted(distinct) if numeric else distinct
    return [show(v) for v in distinct], {member: show(v) for member, v in held.items()}


def show(value: Any) -> str:
    """A factor's value as the report writes it."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def effects(rows: Sequence[Mapping[str, Any]], metric: str, *, lower: bool = False) -> list[Effect]:
    """Every factor's marginal effect, the largest spread first.

    A level's location is over all members that have it, whatever else they have; `Level.behind` compares only members
    that are alike in everything else, the seed included, so that a factor that other factors depend on is not blamed
    for them.
    """
    sign = 1 if lower else -1
    out = []
    for factor in factors_of(rows):
        labels, label_of = levels_of(rows, factor)
        found: dict[str, dict] = {}
        for label in labels:
            mine = [row for row in rows if label_of.get(row["member"]) == label]
            strata: dict[tuple, list[float]] = {}
            cells: dict[tuple, list[float]] = {}
            for row in mine:
                if (value := value_of(row, metric)) is not None:
                    strata.setdefault(_others(row, "seed"), []).append(value)
                    cells.setdefault(_others(row, factor), []).append(value)
            if strata:
                missing = len(mine) - sum(map(len, strata.values()))
                found[label] = {"estimate": estimate(list(strata.values())), "failed": missing,
                                "cells": {k: float(np.mean(v)) for k, v in cells.items()}}
        if len(found) < 2:
            continue
        ranked = sorted(found, key=lambda label: sign * found[label]["estimate"].value)
        best = found[ranked[0]]["cells"]
        levels = []
        for label, entry in found.items():
            pairs = [v - best[k] for k, v in entry["cells"].items() if k in best] if label != ranked[0] else []
            levels.append(Level(label, entry["estimate"], entry["failed"], mean_difference(pairs) if pairs else None))
        spread = abs(found[ranked[0]]["estimate"].value - found[ranked[-1]]["estimate"].value)
        out.append(Effect(factor, tuple(levels), spread))
    return sorted(out, key=lambda effect: -effect.spread)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """key -> the shortest end of its dotted path that no other key ends with: `method.loss.beta` -> `beta`."""
    out = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            if not any(other != key and (other == tail or other.endswith("." + tail)) for other in keys):
                break
        out[key] = tail
    return out
