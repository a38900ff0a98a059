"""Figures of a sweep: configurations with their seeds, levels, heat maps, lines, frontier, parallel coordinates.

Functions of plain numbers, in the look of alignax/diagnostics/style.py; each writes PNG and SVG and returns the PNG's
path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from alignax.diagnostics import compare, style
from alignax.diagnostics.sweep_statistics import Configuration, Effect, Estimate

WIDE_KL = 20.0
MOST_LINES = len(style.COLOURS)
_MARKS = "os^Dvp"


def best(found: Sequence[Configuration], names: Sequence[str], metric: str, path: str | os.PathLike) -> Path:
    """Configurations from the top down: each seed as a ring, the interquartile mean as a dot with its interval.

    names: [len(found)], the text beside each.
    """
    figure = style.figure(7.2, 1.1 + 0.34 * len(found))
    axes = style.axes(figure, 1, 1, 1)
    for row, one in enumerate(found):
        axes.plot(one.values, [row] * len(one.values), "o", markersize=5, markerfacecolor="white",
                  markeredgecolor=style.COLOURS[0], markeredgewidth=1.0, zorder=2.5,
                  label="one seed" if row == 0 else None)
        _interval(axes, one.estimate, row, style.COLOURS[0],
                  "interquartile mean, 95% interval" if row == 0 else None)
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(metric)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    style.legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return style.save(figure, path)


def effects(found: Sequence[Effect], short: Mapping[str, str], metric: str, path: str | os.PathLike) -> Path:
    """Every factor's levels with their interquartile mean over all members that have them, and its interval."""
    rows = sum(len(effect.levels) for effect in found) + len(found)
    figure = style.figure(7.2, 0.9 + 0.27 * rows)
    axes = style.axes(figure, 1, 1, 1)
    ticks, labels, at = [], [], 0.0
    for index, effect in enumerate(found):
        axes.text(0.008, at, short[effect.factor], transform=axes.get_yaxis_transform(), fontsize=style.TICK,
                  color=style.INK, va="center", fontweight="bold",
                  bbox=dict(facecolor="white", edgecolor="none", pad=1.0))
        for level in effect.levels:
            at += 1
            _interval(axes, level.estimate, at, style.COLOURS[index % len(style.COLOURS)])
            ticks.append(at)
            labels.append(level.label)
        at += 1
    axes.set_yticks(ticks, labels)
    axes.set_ylim(at - 0.3, -0.7)
    axes.set_xlabel(f"{metric}  (interquartile mean over all members of the level, 95% interval)")
    axes.xaxis.set_major_locator(MaxNLocator(7))
    return style.save(figure, path)


def _interval(axes: Any, one: Estimate, row: float, colour: str, label: str | None = None) -> None:
    if one.low is not None:
        axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot([one.value], [row], "o", color=colour, markersize=7, label=label, zorder=3)


def heat_maps(panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], metric: str,
              path: str | os.PathLike, *, row_name: str, column_name: str) -> Path:
    """One map per panel, all on one scale; panels: title -> [R, C], NaN where there is no member."""
    values = np.concatenate([np.asarray(v, float).ravel() for v in panels.values()])
    known = values[np.isfinite(values)]
    if not known.size:
        raise ValueError(f"no panel of {sorted(panels)} holds a number")
    low, high = float(known.min()), float(known.max())
    scale = Normalize(low, high if high > low else low + 1.0)
    width = max(1.2 + 0.75 * len(columns), 2.4)
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = style.figure(min(width * across + 1.4, 12.0), down * (1.1 + 0.42 * len(rows)) + 0.3)
    grid = []
    for index, (title, table) in enumerate(panels.items()):
        axes = style.axes(figure, down, across, index + 1)
        grid.append(axes)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.imshow(np.ma.masked_invalid(np.asarray(table, float)), cmap=style.MAP, norm=scale, aspect="auto")
        for (r, c), value in np.ndenumerate(np.asarray(table, float)):
            if np.isfinite(value):
                axes.text(c, r, f"{value:.3g}", ha="center", va="center", fontsize=style.NOTE,
                          color="white" if scale(value) < 0.55 else style.INK)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows if index % across == 0 else [""] * len(rows))
        axes.tick_params(length=0)
        if index + across >= len(panels):
            axes.set_xlabel(column_name)
        if index % across == 0:
            axes.set_ylabel(row_name)
        if title:
            style.title(axes, title)
    bar = figure.colorbar(ScalarMappable(scale, style.MAP), ax=grid, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.MUTED, labelsize=style.NOTE)
    bar.set_label(metric, color=style.INK, fontsize=style.TICK)
    return style.save(figure, path)


def lines(series: Mapping[str, Sequence[tuple[float, Estimate]]], metric: str, path: str | os.PathLike, *,
          factor: str, by: str = "") -> Path:
    """The metric over a factor of numbers, a line per value of another one, each point with its interval as a band.

    series: name -> points (factor's value, estimate) in ascending order, at most MOST_LINES of them. The axis is
    logarithmic where the values are positive and span a factor of five or more. Raises ValueError without points.
    """
    places = sorted({x for points in series.values() for x, _ in points})
    if not places or len(series) > MOST_LINES:
        raise ValueError(f"lines draws 1 to {MOST_LINES} series with points, found {len(series)} with "
                         f"{len(places)} places")
    figure = style.figure(7.2, 4.2)
    axes = style.axes(figure, 1, 1, 1)
    for index, (name, points) in enumerate(series.items()):
        colour, dash = style.COLOURS[index], style.DASHES[index % len(style.DASHES)]
        x = [at for at, _ in points]
        y = [one.value for _, one in points]
        axes.plot(x, y, color=colour, linewidth=1.8, linestyle=dash, marker="o", markersize=4.5, label=name)
        if all(one.low is not None for _, one in points):
            axes.fill_between(x, [one.low for _, one in points], [one.high for _, one in points], color=colour,
                              alpha=0.18, linewidth=0)
    if places[0] > 0 and places[-1] / places[0] >= 5:
        axes.set_xscale("log")
    if len(places) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{x:.3g}" for x in places]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(factor)
    axes.set_ylabel(metric)
    if len(series) > 1:
        style.legend(axes, title=by, title_fontsize=style.TICK, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return style.save(figure, path)


def frontier(series: Mapping[str, Sequence[tuple[float, float]]], path: str | os.PathLike, *, by: str = "") -> Path:
    """Win rate over the KL that was spent for it, a dot per member, beside the exact curve of best-of-n sampling.

    series: name -> (KL in nats per sequence, win rate) of its members, at most MOST_LINES names. Where KLs reach beyond
    WIDE_KL, the axis is logarithmic from 1 nat on, and linear up to there. Raises ValueError without points.
    """
    points = [point for held in series.values() for point in held]
    if not points or len(series) > MOST_LINES:
        raise ValueError(f"frontier draws 1 to {MOST_LINES} series with points, found {len(series)} with "
                         f"{len(points)} points")
    figure = style.figure(7.2, 4.4)
    axes = style.axes(figure, 1, 1, 1)
    axes.axhline(0.5, color=style.MUTED, linewidth=0.8)
    limit = 1.06 * max(*(kl for kl, _ in points), 1.0)
    wide = limit > WIDE_KL
    # Flat long before exp(700), which is about the largest float; the bend is what needs the points.
    n = np.exp(np.concatenate([np.linspace(0.0, 10.0, 400), np.linspace(10.0, min(max(limit + 1.0, 11.0), 700.0),
                                                                             50)[1:]]))
    curve = compare.best_of_n_kl(n), compare.best_of_n_win_rate(n)
    axes.plot(*curve, color=style.MUTED, linewidth=1.5)
    axes.annotate("best of n samples", (limit, float(np.interp(limit, *curve))), xytext=(-2, 5), ha="right",
                  va="bottom", textcoords="offset points", fontsize=style.TICK, color=style.MUTED)
    for index, (name, held) in enumerate(series.items()):
        axes.plot([kl for kl, _ in held], [rate for _, rate in held], _MARKS[index], color=style.COLOURS[index],
                  markersize=5, alpha=0.8, markeredgecolor="white", markeredgewidth=0.5, label=name)
    left = min(0.0, *(kl for kl, _ in points))
    if wide:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left - 0.05, limit * 1.1)
    else:
        axes.set_xlim(left - 0.02 * limit, limit)
    axes.set_xlabel("KL(policy ‖ ref) on samples of the policy  (nats per sequence"
                    + (", logarithmic above 1)" if wide else ")"))
    axes.set_ylabel("win rate against the baseline")
    style.legend(axes, title=by, title_fontsize=style.TICK, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return style.save(figure, path)


def parallel(members: Sequence[tuple[Sequence[float | str | None], float]], names: Sequence[str], metric: str,
             path: str | os.PathLike, *, lower: bool = False) -> Path:
    """Parallel coordinates: an upright axis per factor and one for the metric, a line per member, best ones on top.

    members: (value of each factor, metric). Numbers stand by size, logarithmically where they are positive and span a
    factor of five or more, at most; other values in the order first met; a member without the factor stands at the
    foot of its axis. Raises ValueError without members.
    """
    if not members:
        raise ValueError("parallel draws at least one member")
    scores = np.asarray([score for _, score in members], float)
    columns = [_placed([values[i] for values, _ in members]) for i in range(len(names))]
    columns.append(_placed(scores.tolist()))
    figure = style.figure(max(1.7 * len(columns) + 1.0, 5.0), 4.4)
    axes = figure.add_subplot(1, 1, 1)
    axes.spines[:].set_visible(False)
    low, high = float(scores.min()), float(scores.max())
    scale = Normalize(low, high if high > low else low + 1.0)
    paint = matplotlib.colormaps[style.MAP]
    order = np.argsort(-scores if lower else scores)
    # Members of equal values stand side by side, not over each other.
    shift = np.linspace(-0.012, 0.012, len(members))[np.argsort(order)]
    for rank, index in enumerate(order):
        y = [heights[index] + (shift[index] if i < len(names) else 0.0) for i, (heights, _) in enumerate(columns)]
        axes.plot(range(len(columns)), y, color=paint(scale(scores[index])), linewidth=1.5,
                  alpha=0.85 if rank > 0.75 * len(members) else 0.45)
    for i, (_, ticks) in enumerate(columns):
        axes.plot([i, i], [-0.03, 1.03], color=style.MUTED, linewidth=1.0)
        for height, text in ticks:
            axes.plot([i - 0.02, i + 0.02], [height, height], color=style.MUTED, linewidth=1.0)
            last = i == len(columns) - 1  # its numbers stand outside, the others' left of their axis
            axes.text(i + (0.04 if last else -0.04), height, text, ha="left" if last else "right", va="center",
                      fontsize=style.NOTE, color=style.INK,
                      bbox=dict(facecolor="white", edgecolor="none", pad=0.6, alpha=0.8))
    axes.set_xticks(range(len(columns)), [*names, metric])
    axes.tick_params(length=0, labelsize=style.TICK, colors=style.INK)
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.06)
    axes.set_xlim(-0.45, len(columns) - 0.6)
    return style.save(figure, path)


def _placed(values: Sequence[float | str | None]) -> tuple[list[float], list[tuple[float, str]]]:
    """(height in [0, 1] of every value, ticks (height, text)) of one upright axis."""
    known = [v for v in values if v is not None]
    absent = len(known) < len(values)
    foot = 0.15 if absent else 0.0
    ticks = [(0.0, "none")] if absent else []
    if known and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        low, high = min(known), max(known)
        to = math.log if low > 0 and high / low >= 5 else float
        span = (to(high) - to(low)) or 1.0
        height = lambda v: foot + (1.0 - foot) * ((to(v) - to(low)) / span if high > low else 0.5)
        distinct = sorted(set(known))
        shown = distinct if len(distinct) <= 6 else [low, *np.linspace(low, high, 5)[1:-1].tolist(), high]
        if len(distinct) > 6 and to is math.log:
            shown = np.exp(np.linspace(math.log(low), math.log(high), 5)).tolist()
        ticks += [(height(v), f"{v:.3g}") for v in shown]
    else:
        distinct = list(dict.fromkeys(known))
        step = (1.0 - foot) / max(len(distinct) - 1, 1)
        at = {v: foot + step * i if len(distinct) > 1 else 0.5 for i, v in enumerate(distinct)}
        height = at.__getitem__
        ticks += [(at[v], str(v)) for v in distinct]
    return [0.0 if v is None else height(v) for v in values], ticks
