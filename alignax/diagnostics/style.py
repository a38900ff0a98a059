"""The one look of every figure: colours, sizes, axes, bands, end labels, heat maps, and saving as PNG and SVG.

Okabe and Ito's colours, told apart by readers with any colour vision. Canvases of their own with the Agg backend: no
global pyplot state, no display, no figure left open.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.cm
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"
DASHES = ("-", "--", "-.", ":")
"""Line styles, for series that colour alone would not keep apart (a second reading of the same colour)."""

MAP = "cividis"
"""The colour map of heat maps: even in lightness, the same to readers with any colour vision."""

TITLE, LABEL, TICK, NOTE = 10, 10, 9, 8
"""Sizes of type in points."""

DPI = 150


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches; its axes are laid out so that nothing overlaps."""
    return Figure(figsize=(width, height), layout="constrained")


def axes(figure: Figure, *place: int) -> Axes:
    """Axes with an open frame, a faint grid behind the data and muted ticks; place: as for add_subplot."""
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=TICK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return axes


def title(axes: Axes, text: str) -> None:
    """A title at the left edge of a panel."""
    axes.set_title(text, fontsize=TITLE, loc="left", color=INK)


def band(axes: Axes, x: object, runs: object, *, colour: str, label: str | None = None, line: str = "-",
         low: object = None, high: object = None) -> None:
    """The mean over runs as a line, inside a band from `low` to `high`: by default the least and the greatest run.

    x: [T]; runs: [N, T]; low, high: [T].
    """
    runs = np.asarray(runs, float)
    low, high = (runs.min(0) if low is None else low), (runs.max(0) if high is None else high)
    axes.fill_between(np.asarray(x), low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, runs.mean(0), color=colour, linewidth=1.8, linestyle=line, label=label)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Label heights moved apart until neighbours are at least `gap` apart, in their order and around their mean."""
    order = np.argsort(wanted, kind="stable")
    merged: list[list[float]] = []  # (mean height, labels); touching clusters merge around their mean
    for height in np.array(wanted, dtype=float)[order]:
        merged.append([height, 1])
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            (m1, c1), (m2, c2) = merged[-2], merged[-1]
            merged[-2:] = [[(m1 * c1 + m2 * c2) / (c1 + c2), c1 + c2]]
    placed = [mean + gap * (i - (count - 1) / 2) for mean, count in merged for i in range(int(count))]
    result = np.empty(len(wanted))
    result[order] = placed
    return result.tolist()


def end_labels(axes: Axes, labels: Sequence[tuple[str, str, float]], *, size: float = 9.5) -> None:
    """Names just outside the right edge, each at the height where its line ends.

    labels: (text, colour, height in data units). The limits of the axes must be final; a linear or a log axis.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((axes.get_xlim()[1], height))[1]) for _, _, height in labels]
    pixels = axes.get_window_extent().height * 0.9 or 1.0  # the layout is not done yet: a little less than it will be
    gap = 1.15 * size * axes.figure.dpi / 72 / pixels
    for (text, colour, _), height in zip(labels, spread(np.clip(heights, 0, 1), gap), strict=True):
        axes.text(1.02, height, text, color=colour, fontsize=size, va="center", clip_on=False,
                  transform=axes.transAxes)


def legend(axes: Axes, **options: object) -> None:
    """A legend without a frame."""
    axes.legend(frameon=False, fontsize=options.pop("fontsize", TICK), labelcolor=INK, **options)


def heat_map(axes: Axes, values: object, *, top: float = 1.0, rows: str = "", columns: str = "") -> None:
    """A table as coloured cells with their numbers, from 0 to `top`; values: [R, C], NaN for an empty cell."""
    values = np.asarray(values, float)
    axes.grid(False)
    axes.imshow(np.ma.masked_invalid(values), cmap=MAP, vmin=0.0, vmax=top, aspect="auto")
    axes.spines[["left", "bottom"]].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.2f}".lstrip("0") if 0 < value < 0.995 else f"{value:.0f}", ha="center",
                      va="center", fontsize=NOTE, color="white" if value < 0.55 * top else INK)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.tick_params(length=0)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)


def shades(count: int) -> list[tuple[float, ...]]:
    """`count` colours from dark to light on the colour map, its palest end left out."""
    return [tuple(colour) for colour in matplotlib.colormaps[MAP](np.linspace(0, 0.9, count))]


def colour_scale(figure: Figure, panels: Sequence[Axes], low: float, high: float, label: str) -> None:
    """A colour bar beside the panels for lines in `shades` of a quantity from `low` to `high`."""
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("shades", shades(64))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), colours)
    bar = figure.colorbar(scale, ax=list(panels), label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=TICK)


def save(figure: Figure, path: str | os.PathLike, *, vector: bool = True, dpi: int = DPI) -> Path:
    """Write `path` as PNG and, with `vector`, the same name ending in .svg; the path of the PNG.

    The same bytes for the same figure and versions: no date, fixed identifiers. The folder is made where needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    if vector:
        with matplotlib.rc_context({"svg.hashsalt": "alignax", "svg.fonttype": "none"}):
            figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None})
    return path
