"""The loss along the line between the two ends of a stage, and between its end and another run's."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from alignax import step
from alignax.analyses.of_run import Result, Stage, loss_of_pairs
from alignax.diagnostics import landscape, style
from alignax.ops.reductions import reduce_terms
from alignax.types import ConfigError

ALPHAS = np.linspace(-0.5, 1.5, 21)
_SHOWN = {"loss": "loss", "margin": "margin of the log-ratios (nats)", "chosen": "log π(chosen) (nats per token)",
          "rejected": "log π(rejected) (nats per token)"}


def analyse(stage: Stage, *, other: Stage | None = None) -> Result:
    """The stage's loss, its margin and the log-probs on its pairs at 21 points from half a step before its start (0) to
    half a step beyond its end (1). other: the line leads from the stage's end to that of the other run's stage instead.

    Raises ConfigError for a loss that `loss_of_pairs` refuses and an other run with a model of another shape.
    """
    if other is not None and other.ctx.spec.config != stage.ctx.spec.config:
        raise ConfigError(f"--other: {other.ctx.workdir} has a model of another shape than {stage.ctx.workdir}")
    ends = (stage.before, stage.after) if other is None else (stage.after, other.after)
    names = (stage.init, stage.name) if other is None else (stage.ctx.workdir.name, other.ctx.workdir.name)
    found = along(stage, *ends)
    wall = landscape.barrier(ALPHAS, found["loss"])
    rows = [[f"{alpha:+.1f}", *(found[name][i] for name in _SHOWN)] for i, alpha in enumerate(ALPHAS)]
    best = int(found["loss"].argmin())
    notes = [f"barrier between the ends: {wall.height:.4g} (loss above the chord), at {wall.alpha:.1f}",
             f"lowest loss on the line: {found['loss'][best]:.4g}, at {ALPHAS[best]:+.1f}"]
    numbers = {"stage": stage.name, "ends": names, "pairs": len(stage.records), "alpha": ALPHAS.tolist(),
               **{name: values.tolist() for name, values in found.items()}, "barrier": wall._asdict()}
    return Result(numbers, f"{stage.name}: the line from {names[0]} (0) to {names[1]} (1)",
                  ["alpha", "loss", "margin", "chosen / token", "rejected / token"], rows, notes,
                  lambda path: draw(found, names, path))


def along(stage: Stage, start: Any, end: Any) -> dict[str, np.ndarray]:
    """Means over the stage's pairs at every alpha: loss, margin, chosen and rejected (per token), float64 [21]."""
    loss = loss_of_pairs(stage)
    wanted = set(loss.requests) | {"logps", "ref_logps", "lengths"}

    @jax.jit
    def inputs(alpha, start, end, reference, batch):
        return step.compute(stage.ctx.spec, landscape.interpolate(start, end, alpha), reference, batch, wanted)

    value = jax.jit(lambda held: reduce_terms(loss(held))[0])
    out: dict[str, list[float]] = {name: [] for name in _SHOWN}
    for alpha in ALPHAS:
        # Losses may couple the batch: its arrays are gathered first, and the loss sees all pairs at once.
        held = stage.each(lambda batch, alpha=alpha: inputs(np.float32(alpha), start, end, stage.before, batch))
        logps, ratio = held["logps"].astype(np.float64), held["logps"].astype(np.float64) - held["ref_logps"]
        per_token = logps / held["lengths"]
        for name, number in (("loss", value({n: held[n] for n in loss.requests})),
                             ("margin", (ratio[:, 0] - ratio[:, 1]).mean()), ("chosen", per_token[:, 0].mean()),
                             ("rejected", per_token[:, 1].mean())):
            out[name].append(float(number))
    return {name: np.asarray(values) for name, values in out.items()}


def draw(found: dict[str, np.ndarray], ends: tuple[str, str], path: pathlib.Path) -> pathlib.Path:
    """Loss, margin and log-probs over alpha, the ends marked."""
    figure = style.figure(11.0, 3.2)
    for place, names in enumerate((("loss",), ("margin",), ("chosen", "rejected"))):
        axes = style.axes(figure, 1, 3, place + 1)
        for name, colour in zip(names, style.COLOURS, strict=False):
            axes.plot(ALPHAS, found[name], color=colour, linewidth=1.8, label=name)
        if place == 0:
            chord = ALPHAS[(ALPHAS > -1e-9) & (ALPHAS < 1 + 1e-9)]
            low, high = (np.interp(x, ALPHAS, found["loss"]) for x in (0, 1))
            axes.plot(chord, low + (high - low) * chord, color=style.MUTED, linewidth=1.2, linestyle=":",
                      label="chord of the ends")
        for at in (0, 1):
            axes.axvline(at, color=style.MUTED, linewidth=1, linestyle="--")
        axes.set_ylabel(_SHOWN[names[0]] if len(names) == 1 else "log π (nats per token)")
        axes.set_xlabel(f"position on the line (0: {ends[0]}, 1: {ends[1]})")
        if place != 1:
            style.legend(axes, fontsize=style.NOTE)
    return style.save(figure, path)
