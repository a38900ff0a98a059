"""How far a stage moved the weights, matrix group by matrix group."""

from __future__ import annotations

import pathlib

import numpy as np

from alignax.analyses.of_run import Result, Stage
from alignax.diagnostics import style, weights


def group(path: tuple[str, ...]) -> str:
    """layers/3/mlp for what a layer holds; the name itself elsewhere."""
    return "/".join(path[:3]) if path[0] == "layers" else path[0]


def depth(name: str) -> tuple[int, int]:
    """The place of a group on the way of a token: what stands before the layers, the layers, what stands behind."""
    if name.startswith("layers/"):
        return 1, int(name.split("/")[1])
    return (0 if name in ("embedding", "positions") else 2), int(name == "all")


def analyse(stage: Stage) -> Result:
    """Distances between the stage's two ends, per group and of all weights together; diagnostics.weights."""
    before, after = stage.before["model"], stage.after["model"]
    found = weights.distances(before, after, group=group) | weights.distances(before, after, group=lambda _: "all")
    found = dict(sorted(found.items(), key=lambda item: depth(item[0])))
    rows = [[name, d.l2, 100 * d.relative, 1 - d.cosine, None if np.isnan(d.spectral) else d.spectral]
            for name, d in found.items()]
    numbers = {"stage": stage.name, "from": stage.init, "groups": {n: d._asdict() for n, d in found.items()}}
    return Result(numbers, f"{stage.name}: weights since {stage.init}",
                  ["weights", "|change|", "% of norm", "1 - cosine", "largest singular value"], rows, [],
                  lambda path: draw(found, f"change since {stage.init} (% of the norm)", path))


def draw(found: dict[str, weights.Distance], label: str, path: pathlib.Path) -> pathlib.Path:
    """Bars of the relative change of every group; the whole as a line."""
    names = [name for name in found if name != "all"]
    figure = style.figure(6.4, 0.24 * len(names) + 0.9)
    axes = style.axes(figure)
    kinds = [name.rsplit("/", 1)[-1] for name in names]
    distinct = list(dict.fromkeys(k for name, k in zip(names, kinds, strict=True) if "/" in name))
    colours = [style.COLOURS[distinct.index(k) % len(style.COLOURS)] if k in distinct else style.MUTED for k in kinds]
    axes.barh(range(len(names)), [100 * found[name].relative for name in names], color=colours, height=0.7)
    axes.axvline(100 * found["all"].relative, color=style.INK, linewidth=1.2, linestyle="--", label="all weights")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
    style.legend(axes, loc="lower right", fontsize=style.NOTE)
    return style.save(figure, path)
