"""Figures of a run: training curves, displacement, and the reward-KL frontier.

Functions of plain numbers, in the look of alignax/diagnostics/style.py. Every function writes a PNG file and an SVG
file beside it, creates their folder where needed, and returns the path of the PNG.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignax.diagnostics import style
from alignax.diagnostics.compare import best_of_n_kl, best_of_n_win_rate
from alignax.diagnostics.style import COLOURS, INK, MUTED


def _number(value) -> float | None:
    """`value` as float where it is a number (bools are not), else None."""
    if isinstance(value, (bool, np.bool_, str)) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def training_curves(
    history: Sequence[Mapping[str, object]], path: str | os.PathLike, *, keys: Sequence[str] | None = None
) -> Path:
    """One small panel per metric over the update step.

    history: rows of metrics.jsonl, each with `step` and numbers under other names; a row need not have every metric,
    and values that are not numbers are left out. keys: the metrics to draw, in order (default: all, as first met).
    Non-finite values leave a gap, and the panel says how many there are.
    Raises ValueError where there is nothing to draw, a row lacks `step`, or a key is in no row.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for index, row in enumerate(history):
        step = _number(row.get("step"))
        if step is None:
            raise ValueError(f"history[{index}] needs a number under 'step', found {row.get('step')!r}")
        for key, value in row.items():
            value = _number(value)
            if key != "step" and value is not None:
                steps, values = curves.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    missing = [key for key in keys or () if key not in curves]
    if missing:
        raise ValueError(f"no row of history has {missing}; it has {sorted(curves)}")
    names = list(keys or curves)
    if not names:
        raise ValueError(f"history has no metric to draw in its {len(history)} rows")

    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = style.figure(3.9 * columns, 2.5 * lines + 0.2)
    for index, name in enumerate(names):
        axes = style.axes(figure, lines, columns, index + 1)
        steps, values = np.array(curves[name][0]), np.array(curves[name][1])
        finite = np.isfinite(values)
        axes.plot(steps, np.where(finite, values, np.nan), color=COLOURS[0], linewidth=1.5,
                  marker="o" if len(steps) < 3 else None, markersize=4)
        axes.set_title(name, fontsize=10, loc="left", color=INK)
        if not finite.all():
            axes.set_title(f"{(~finite).sum()} of {finite.size} not finite", fontsize=8, loc="right",
                           color=COLOURS[1])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if index + columns >= len(names):
            axes.set_xlabel("update step")
    return style.save(figure, path)


def displacement(
    steps, series: Mapping[str, object], baseline, path: str | os.PathLike, *, per: str = "sequence"
) -> Path:
    """How the policy's log-likelihood of different completions moves while it trains.

    steps: [S]. series: name -> [S], the mean over completions of log pi(y|x) - log ref(y|x), in nats; usually
    `chosen`, `rejected` and `unseen`. baseline: [S] or a scalar, -KL(ref || policy), in nats: the mean of the same
    quantity over samples of the reference, so what every typical completion loses merely because the policy has
    moved; a series below it is pushed down, one above it is held up. None draws no baseline. per: what one value
    is summed over, for the axis label. Raises ValueError where a length differs from that of `steps`.
    """
    steps = np.asarray(steps, dtype=float)
    lines = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    if baseline is not None:
        level = np.asarray(baseline, dtype=float)
        lines["−KL(ref ‖ policy)"] = np.full(steps.shape, level) if level.ndim == 0 else level
    if steps.ndim != 1 or steps.size == 0 or not lines:
        raise ValueError(f"need steps [S] and at least one series, found shape {list(steps.shape)} and {list(lines)}")
    for name, values in lines.items():
        if values.shape != steps.shape:
            raise ValueError(f"{name!r} has shape {list(values.shape)}, steps have {list(steps.shape)}")

    figure = style.figure(7.2, 4.2)
    axes = style.axes(figure, 1, 1, 1)
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    labels = []
    for index, (name, values) in enumerate(lines.items()):
        base = baseline is not None and index == len(lines) - 1
        colour = INK if base else COLOURS[index % len(COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=1.6 if base else 2.0, linestyle="--" if base else "-",
                  marker="o" if steps.size < 3 else None, markersize=4)
        ends = values[np.isfinite(values)]
        labels.append((name, colour, float(ends[-1]) if ends.size else 0.0))
    axes.set_xlabel("update step")
    axes.set_ylabel(f"log π(y|x) − log ref(y|x)  (nats per {per})")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    heights = style.spread([end for _, _, end in labels], 0.055 * (high - low))
    for (name, colour, _), height in zip(labels, heights, strict=True):
        # Axes fraction across, data units up: the label stands just outside the frame, beside its line's end.
        axes.text(1.01, height, name, color=colour, fontsize=9.5, va="center", clip_on=False,
                  transform=axes.get_yaxis_transform())
    return style.save(figure, path)


def frontier(points: Sequence[Mapping[str, object]], path: str | os.PathLike) -> Path:
    """Win rate against the reference over the KL spent for it, beside the curve of best-of-n sampling.

    points: dicts with `kl` (nats per sequence), `kl_se`, `win_rate`, `lo`, `hi` (a 95% interval) and `label`. The KL
    is drawn with 1.96 standard errors each way. The curve is (log n - (n-1)/n, n/(n+1)) for real n >= 1, marked at
    powers of two: what best-of-n sampling from the reference reaches under the same judge where no samples tie.
    Raises ValueError where a point lacks a key or holds a number that is not finite, or an interval that does not
    hold its rate.
    """
    kl_max = 0.0
    for index, point in enumerate(points):
        values = {}
        for key in ("kl", "kl_se", "win_rate", "lo", "hi"):
            values[key] = _number(point.get(key))
            if values[key] is None or not math.isfinite(values[key]):
                raise ValueError(f"points[{index}][{key!r}] must be a finite number, found {point.get(key)!r}")
        if "label" not in point:
            raise ValueError(f"points[{index}] needs a 'label'; it has {sorted(point)}")
        if not values["lo"] <= values["win_rate"] <= values["hi"]:
            raise ValueError(f"points[{index}] needs lo <= win_rate <= hi, found {values}")
        kl_max = max(kl_max, values["kl"] + 1.96 * values["kl_se"])
    limit = 1.12 * max(kl_max, 1.7)  # at least up to n = 8 or so

    figure = style.figure(7.2, 4.6)
    axes = style.axes(figure, 1, 1, 1)
    axes.axhline(0.5, color=MUTED, linewidth=0.8)
    n = np.exp(np.linspace(0.0, limit + 1.0, 600))  # log n - 1 < KL: reaches past the limit
    axes.plot(best_of_n_kl(n), best_of_n_win_rate(n), color=MUTED, linewidth=1.5, zorder=2)
    marks = 2.0 ** np.arange(0, math.floor((limit + 1.0) / math.log(2.0)) + 1)
    marks = marks[best_of_n_kl(marks) <= limit]
    axes.plot(best_of_n_kl(marks), best_of_n_win_rate(marks), "o", color="white", markeredgecolor=MUTED, markersize=5,
              zorder=2)
    # From n = 16 on neighbours come closer to log 2 nats apart on a nearly flat line: label fewer of them.
    for exponent, mark in enumerate(marks):
        if 1 <= exponent <= 4 or (4 < exponent <= 10 and exponent % 2 == 0) or (exponent > 10 and exponent % 4 == 0):
            text = f"n = {mark:.0f}" if exponent == 1 else f"{mark:.0f}" if exponent <= 10 else f"$2^{{{exponent}}}$"
            axes.annotate(text, (best_of_n_kl(mark), best_of_n_win_rate(mark)), xytext=(6, -3),
                          textcoords="offset points", fontsize=8, color=MUTED, ha="left", va="top")
    axes.annotate("best of n samples", (limit, float(np.interp(limit, best_of_n_kl(n), best_of_n_win_rate(n)))),
                  xytext=(-2, 6), textcoords="offset points", fontsize=9.5, color=MUTED, ha="right", va="bottom")

    left = min([0.0, *(float(p["kl"]) - 1.96 * float(p["kl_se"]) for p in points)])
    for index, point in enumerate(points):
        colour = COLOURS[index % len(COLOURS)]
        kl, rate = float(point["kl"]), float(point["win_rate"])
        axes.errorbar(kl, rate, xerr=1.96 * float(point["kl_se"]),
                      yerr=[[rate - float(point["lo"])], [float(point["hi"]) - rate]],
                      fmt="o", color=colour, markersize=6, elinewidth=1.2, capsize=2.5, zorder=3)
        beyond = kl > 0.8 * limit  # no room to the right of the last points
        axes.annotate(str(point["label"]), (kl, rate), xytext=(-7 if beyond else 7, -6), textcoords="offset points",
                      fontsize=9.5, color=colour, ha="right" if beyond else "left", va="top", zorder=4)
    axes.set_xlim(left - 0.05 * limit, limit)
    lowest = min([0.5, *(float(p["lo"]) for p in points)])
    axes.set_ylim(max(-0.02, lowest - 0.05), 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("KL(policy ‖ ref) on samples of the policy  (nats per sequence)")
    axes.set_ylabel("win rate against the reference  (ties count half)")
    return style.save(figure, path)
