"""The figures of docs/losses.md: landscapes over the two log-ratios, and loss and slope along the margin.

Command: python experiments/docs/losses.py --write
Cost: about two minutes on two cores. Expected result: an SVG file per family and kind, two landscapes where
a family is large, below 200 KB each; the same bytes for the same versions of the code, matplotlib and JAX.

A loss is drawn where everything it asks for is a sum of log-probs, a length, or data that FIXED can state. A batch is
one prompt with two completions. matplotlib is imported where it is used: the text needs none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.ops.reductions import reduce_terms

SPAN = 40.0
"""The landscape shows log-ratios from -SPAN to SPAN nats; the line charts the diagonal of that square."""

PIXELS, ARROWS, POINTS = 61, 7, 321
PANELS = 18
"""Panels of one figure."""

FLAT = 1e-6
"""A gradient below this gets no arrow."""

SCALE = tuple(10.0 ** (k / 2) for k in range(-8, 5))
"""Borders of the colours of the gradient's size: half decades from 1e-4 to 100."""

REFERENCE = (-60.0, -90.0)
FIXED: Mapping[str, Any] = {
    "lengths": (40.0, 60.0), "valid": (True, True), "labels": (1.0, 0.0), "scores": (0.8, 0.2), "margins": 1.0,
    "weights": 1.0, "kl_logps": REFERENCE, "kl_ref_logps": REFERENCE, "aux_prompt_logps": (-50.0, -90.0),
    "aux_prompt_ref_logps": REFERENCE, "reference_sample_logps": (-75.0, -75.0),
}

LEGEND = (
    "One pair, all hyper-parameters at their defaults. In every panel the horizontal axis is the log-ratio of the "
    f"chosen completion, log pi - log pi_ref, the vertical one that of the rejected, both from {-SPAN:g} to {SPAN:g} "
    "nats; the dot marks policy = reference. Lines join equal loss: nine of them, at the loss's deciles over the "
    "square, so that equal parts of the square lie between neighbours. Colour is the length of the gradient with "
    "respect to the two log-ratios, on one scale for all panels of all families. Arrows of one length point where "
    f"gradient descent goes (none where the gradient is below {FLAT:g}). Under the name: least and greatest loss in "
    "the square. The line charts go through the square from the upper left to the lower right: chosen +D/2, rejected "
    "-D/2; losses that agree along that path share a line, though they may differ elsewhere; losses beyond 100 and "
    "slopes beyond 10 leave the chart.\n\n"
    "Fixed, where a loss asks for it: reference log-probs -60 and -90, lengths 40 and 60 (chosen, rejected); labels 1 "
    "and 0; scores 0.8 and 0.2; margin 1; weight 1; KTO's mismatched log-ratios 0; under the other prompt log-ratios "
    "10 and 0; samples of the reference -75. A loss that depends on its batch sees this pair alone."
)


def why_not(name: str) -> str:
    """Why a loss has no panel; empty where it has one."""
    requests, _ = losses.split_signature(losses.INDEX[name])
    others = [r for r in requests if r not in ("logps", "ref_logps", *FIXED)]
    if others:
        return "needs " + ", ".join(others)
    return "" if "logps" in requests else "reads no log-probs"


def value_and_gradient(name: str, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(loss [N], gradient [N, 2]) at the log-ratios [N, 2] (chosen, rejected), in float64."""
    with jax.enable_x64(True):
        loss = losses.get(name)
        reference = jnp.array([REFERENCE])
        fixed = {key: jnp.asarray(x)[None] for key, x in FIXED.items()}

        def at(pair: jax.Array) -> jax.Array:
            return reduce_terms(loss({**fixed, "logps": reference + pair[None], "ref_logps": reference}))[0]

        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(at)))(jnp.asarray(ratios, jnp.float64))
        return np.asarray(values), np.asarray(gradients)


def _square(count: int, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """(places on an axis [count], log-ratios of the grid [count * count, 2], rejected slowest)."""
    axis = np.linspace(-edge, edge, count)
    chosen, rejected = np.meshgrid(axis, axis)
    return axis, np.stack([chosen.ravel(), rejected.ravel()], -1)


def _style(plt: Any) -> None:
    plt.rcParams.update({
        "svg.hashsalt": "alignax", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "path.simplify": True,
    })


def _short(x: float) -> str:
    """Three digits, with a true minus sign and no useless zeros."""
    if 1e3 <= abs(x) < 1e4:
        text = f"{x:.0f}"
    else:
        text = f"{x:.3g}" if 1e-3 <= abs(x) < 1e3 or x == 0 else re.sub(r"e([+-])0?", r"e\1", f"{x:.1e}")
    return text.replace("e+", "e").replace("-", "\N{MINUS SIGN}")


def _contours(axis: np.ndarray, grid: np.ndarray, levels: np.ndarray) -> Any:
    """Lines of equal loss as one path, straight pieces reduced to their ends."""
    from contourpy import contour_generator
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    pieces = []
    lines = contour_generator(axis, axis, grid).lines
    for line in (line for level in levels for line in lines(level)):
        outline = Outline(line)
        outline.should_simplify, outline.simplify_threshold = True, 0.12  # nats, about a seventh of a point
        short = outline.cleaned(simplify=True)
        drawn = short.codes != Outline.STOP
        pieces.append(Outline(short.vertices[drawn], short.codes[drawn]))
    return PathPatch(Outline.make_compound_path(*pieces), fill=False, edgecolor="black", linewidth=0.5)


def _arrows(centres: np.ndarray, directions: np.ndarray) -> Any:
    """Arrows as one path (one element of the file): a shaft and two barbs each. Both arrays [N, 2]."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    across = directions[:, ::-1] * (-1, 1)
    tip, tail = centres + 4.2 * directions, centres - 4.2 * directions
    back = tip - 2.7 * directions
    points = np.stack([tail, tip, back + 1.7 * across, tip, back - 1.7 * across], 1).reshape(-1, 2)
    codes = [Outline.MOVETO, Outline.LINETO, Outline.MOVETO, Outline.LINETO, Outline.LINETO] * len(centres)
    return PathPatch(Outline(points, codes), fill=False, edgecolor="black", linewidth=0.75, joinstyle="miter")


def _panel(axes: Any, name: str, colours: Any, norm: Any) -> Any:
    """One landscape; the image that carries the colours."""
    axis, places = _square(PIXELS, SPAN)
    values, gradients = value_and_gradient(name, places)
    grid = values.reshape(PIXELS, PIXELS)
    size = np.hypot(*gradients.T).reshape(PIXELS, PIXELS)
    half = SPAN / (PIXELS - 1)
    edges = (-SPAN - half, SPAN + half) * 2
    image = axes.imshow(size, origin="lower", extent=edges, cmap=colours, norm=norm, interpolation="none")
    if np.ptp(grid) > 0:
        # The same lines on a logarithm, which interpolates losses that grow exponentially with fewer corners.
        grid = np.log1p(grid - grid.min())
        axes.add_patch(_contours(axis, grid, np.unique(np.round(np.quantile(grid, np.linspace(0.1, 0.9, 9)), 12))))
    _, tails = _square(ARROWS, SPAN * 0.84)
    _, slopes = value_and_gradient(name, tails)
    length = np.hypot(*slopes.T)
    live = length > FLAT
    if live.any():
        axes.add_patch(_arrows(tails[live], -slopes[live] / length[live, None]))
    axes.plot(0, 0, "o", color="white", markeredgecolor="black", markeredgewidth=0.6, markersize=3.5)
    axes.set_title(f"{name}\n{_short(values.min())} to {_short(values.max())}", fontsize=7.5, linespacing=1.35, pad=3)
    axes.set(xlim=edges[:2], ylim=edges[2:], xticks=(-40, 0, 40), yticks=(-40, 0, 40))
    axes.tick_params(length=2, pad=1.5, labelsize=7)
    return image


def pages(family: str, names: Sequence[str]) -> dict[str, Sequence[str]]:
    """File stem -> the losses of that landscape figure, at most PANELS each, which keeps a file small."""
    parts = [names[i:i + PANELS] for i in range(0, len(names), PANELS)]
    return {f"landscape_{family}" + (f"_{number}" if number > 1 else ""): part for number, part in enumerate(parts, 1)}


def landscape(family: str, names: Sequence[str]) -> Any:
    """The figure with one panel per loss, at most six in a row."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm, ListedColormap

    _style(plt)
    columns = min(6, max(3, len(names)))
    used = min(columns, len(names))
    rows = -(-len(names) // columns)
    # Inches: what surrounds the panels stays the same whatever the number of rows.
    width, height, left, bottom, top = 1.62 * columns + 1.15, 1.88 * rows + 0.75, 0.5, 0.38, 0.55
    figure = plt.figure(figsize=(width, height))
    grid = figure.add_gridspec(rows, columns, left=left / width, right=1 - 0.8 / width, bottom=bottom / height,
                               top=1 - top / height, wspace=0.14, hspace=0.36)
    # Without the dark end, on which lines and arrows would not be seen.
    colours = ListedColormap(plt.get_cmap("YlGnBu")(np.linspace(0, 0.7, len(SCALE) + 1)))
    norm = BoundaryNorm(SCALE, colours.N, extend="both")
    image = None
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        image = _panel(axes, name, colours, norm)
        axes.label_outer() if place + columns < len(names) else axes.tick_params(labelbottom=True)
        if place % columns:
            axes.tick_params(labelleft=False)
    figure.suptitle(f"{family}: lines of equal loss, colour = size of the gradient, arrows = descent", fontsize=9,
                    x=left / width, y=1 - 0.06 / height, ha="left", va="top")
    figure.text((left + 1.62 * used / 2 - 0.1) / width, 0.06 / height, "log-ratio of the chosen, nats",
                ha="center", va="bottom", fontsize=8)
    figure.text(0.08 / width, (bottom + (height - bottom - top) / 2) / height, "log-ratio of the rejected, nats",
                rotation=90, ha="left", va="center", fontsize=8)
    tall = min(height - bottom - top, 3.2)
    place = ((left + 1.62 * used) / width, 1 - (top + tall) / height, 0.11 / width, tall / height)
    bar = figure.colorbar(image, cax=figure.add_axes(place), extend="both", spacing="uniform")
    bar.set_ticks([10.0**k for k in range(-4, 3)], labels=["1e\N{MINUS SIGN}4", "1e\N{MINUS SIGN}3", "0.01", "0.1", "1",
                                                          "10", "100"])
    bar.ax.tick_params(labelsize=7, length=2, pad=1.5)
    return figure


def _alike(curves: Mapping[str, np.ndarray]) -> list[tuple[list[str], np.ndarray]]:
    """Curves that agree, as (names, the curve)."""
    groups: list[tuple[list[str], np.ndarray]] = []
    for name, curve in curves.items():
        for names, known in groups:
            if np.allclose(curve, known, rtol=1e-6, atol=1e-9):
                names.append(name)
                break
        else:
            groups.append(([name], curve))
    return groups


def _label(names: list[str]) -> str:
    """Names in lines of at most three."""
    return ",\n".join(", ".join(names[i:i + 3]) for i in range(0, len(names), 3))


def along_the_margin(family: str, names: Sequence[str]) -> Any:
    """The figure with loss and slope against the margin D, one line per loss or group of losses that agree."""
    import matplotlib.pyplot as plt

    _style(plt)
    margin = np.linspace(-2 * SPAN, 2 * SPAN, POINTS)
    places = np.stack([margin / 2, -margin / 2], -1)
    curves = {}
    for name in names:
        values, gradients = value_and_gradient(name, places)
        # Along the path both log-ratios move by half of the margin.
        curves[name] = np.stack([values - values[POINTS // 2], (gradients[:, 0] - gradients[:, 1]) / 2])
    groups = _alike(curves)
    lines = sum(-(-len(group) // 3) for group, _ in groups)
    height = max(3.4, 0.16 * lines + 0.9)
    figure, axes = plt.subplots(1, 2, figsize=(11, height))
    figure.subplots_adjust(left=0.055, right=0.76, bottom=0.42 / height, top=1 - 0.5 / height, wspace=0.2)
    palette = plt.get_cmap("tab10").colors
    styles = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1, 1.5)))
    for number, (group, curve) in enumerate(groups):
        look = dict(color=palette[number % 10], linestyle=styles[number // 10 % 4], linewidth=1.3)
        axes[0].plot(margin, curve[0], label=_label(group), **look)
        axes[1].plot(margin, curve[1], **look)
    # Smooth where it turns from linear to logarithmic: a corner in a curve is the loss's own.
    axes[0].set_yscale("asinh", linear_width=0.5)
    axes[1].set_yscale("asinh", linear_width=0.005)
    # Losses that grow beyond these limits leave the chart: the others are what it compares.
    for panel, limit, least in zip(axes, (1e2, 1e1), (1, 0.01), strict=True):
        bottom, top = panel.get_ylim()
        decades = [least * 10.0**k for k in range(4)]
        ticks = [-tick for tick in reversed(decades)] + [0.0] + decades
        panel.set_yticks(ticks, labels=[_short(tick) for tick in ticks], minor=False)
        panel.set_yticks([], minor=True)
        panel.set_ylim(max(bottom, -limit), min(top, limit))
        panel.axvline(0, color="0.6", linewidth=0.6)
        panel.axhline(0, color="0.6", linewidth=0.6)
        panel.grid(True, color="0.9", linewidth=0.5)
        panel.set_xlabel("margin D = log-ratio of the chosen less that of the rejected, nats")
        panel.set_xlim(-2 * SPAN, 2 * SPAN)
    axes[0].set_title("loss less its value at D = 0 (linear near 0, logarithmic above 1)", fontsize=8)
    axes[1].set_title("slope of the loss in D (linear near 0, logarithmic above 0.01)", fontsize=8)
    figure.legend(loc="center left", bbox_to_anchor=(0.77, 0.5), fontsize=7, frameon=False, handlelength=2.6,
                  labelspacing=0.35)
    figure.suptitle(f"{family}: along the margin", fontsize=9, x=0.055, ha="left", y=1 - 0.06 / height, va="top")
    return figure


def compact(svg: str) -> str:
    """The same picture with coordinates of one decimal (a tenth of a point) in paths, two elsewhere."""
    def shorter(match: re.Match) -> str:
        digits = 1 if match[1] == "d" else 2
        short = lambda n: f"{float(n[0]):.{digits}f}".rstrip("0").rstrip(".")
        text = " ".join(re.sub(r"-?[0-9]+[.][0-9]{2,}", short, match[2]).split())
        # Points after the first of a polygon are lines without saying so.
        return f'{match[1]}="{text if match[1] != "d" or "C" in text else text.replace(" L ", " ")}"'

    return re.sub(r'\b(d|x|y|transform)="([^"]*)"', shorter, svg)


def save(figure: Any, path: Path) -> None:
    """Write an SVG without a date, so that equal pictures are equal files."""
    import io

    import matplotlib.pyplot as plt

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    path.write_text(compact(text.getvalue()), encoding="utf-8")


def draw(families: Mapping[str, Sequence[str]], folder: Path, *, only: Sequence[str] | None = None) -> list[Path]:
    """The figures of every family that has losses to draw (of `only`, where given); the files written."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for family, names in families.items():
        shown = [name for name in names if not why_not(name)]
        if not shown or (only and family not in only):
            continue
        figures = {stem: (landscape, page) for stem, page in pages(family, shown).items()}
        for stem, (make, page) in {**figures, f"margin_{family}": (along_the_margin, shown)}.items():
            save(make(family, page), folder / f"{stem}.svg")
            written.append(folder / f"{stem}.svg")
    return written
