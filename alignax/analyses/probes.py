"""Cognitive against expressive capability across a run's phases: does the model know the chosen, does it say so?

After 2405.16964. Cognitive: of each pair the completion with the larger projection of its mean last hidden state on the
first principal direction of chosen - rejected, a direction found on one half of the pairs and tested on the other, both
ways. Expressive: the completion with the larger log-prob per token.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from alignax import step
from alignax.analyses.of_run import Result, Stage
from alignax.diagnostics import compare, probes, style
from alignax.types import ConfigError

_LEAST = 8


def analyse(stage: Stage) -> Result:
    """Both accuracies on the stage's pairs, with 95% Wilson intervals, of the starting model and every finished stage.

    Raises ConfigError for fewer than 8 pairs.
    """
    if len(stage.records) < _LEAST:
        raise ConfigError(f"{stage.name}: found {len(stage.records)} pairs of different prompts; allowed: {_LEAST} or "
                          "more (a direction is found on one half and tested on the other)")
    spec = stage.ctx.spec

    @jax.jit
    def numbers(params, batch):
        found = step.compute(spec, params, None, batch, {"hidden", "mask", "logps", "lengths"})
        count = jnp.maximum(found["lengths"], 1)
        return {"states": found["hidden"].sum(2) / count[..., None], "per_token": found["logps"] / count}

    phases = list(dict.fromkeys(["model", *stage.stages]))
    told, rows = {}, []
    for name in phases:
        params = stage.ctx.params_of(name)
        found = stage.each(lambda batch, params=params: numbers(params, batch))
        told[name] = {"cognitive": cognitive(found["states"]),
                      "expressive": float(np.mean(found["per_token"][:, 0] > found["per_token"][:, 1]))}
    n = len(stage.records)
    for phase, values in told.items():
        bounds = {name: compare.wilson(values[name], n) for name in ("cognitive", "expressive")}
        rows.append([phase, *(f"{values[name]:.3f} [{low:.3f}, {high:.3f}]" for name, (low, high) in bounds.items())])
        values |= {f"{name}_interval": interval for name, interval in bounds.items()}
    return Result({"pairs": n, "data_of": stage.name, "phases": told}, f"accuracy on {n} pairs of {stage.name}",
                  ["phase", "cognitive [95%]", "expressive [95%]"], rows,
                  ["cognitive: by hidden states along a direction; expressive: by log-prob per token; chance: 0.5"],
                  lambda path: draw(told, path))


def cognitive(states: np.ndarray) -> float:
    """Accuracy [n pairs] of a direction found on every other pair, tested on the rest, and the reverse; states [n,2,D],
    chosen first."""
    right = []
    for fit in (0, 1):
        mine, theirs = states[fit::2], states[1 - fit::2]
        direction = probes.principal_direction(mine[:, 0], mine[:, 1])
        right.append(probes.choice_accuracy(theirs, direction, np.zeros(len(theirs))) * len(theirs))
    return float(sum(right) / len(states))


def draw(phases: dict[str, dict], path: pathlib.Path) -> pathlib.Path:
    """Both accuracies over the phases, with their intervals."""
    figure = style.figure(1.6 * len(phases) + 2.4, 3.2)
    axes = style.axes(figure)
    x = np.arange(len(phases))
    for place, (name, marker) in enumerate((("cognitive", "o"), ("expressive", "s"))):
        values = np.asarray([phase[name] for phase in phases.values()])
        bounds = np.asarray([phase[f"{name}_interval"] for phase in phases.values()])
        axes.errorbar(x + 0.06 * (2 * place - 1), values, yerr=np.abs(bounds.T - values), color=style.COLOURS[place],
                      marker=marker, linewidth=1.8, elinewidth=1, capsize=3, label=name)
    axes.axhline(0.5, color=style.MUTED, linewidth=1.2, linestyle="--", label="chance")
    axes.set_xticks(x, list(phases))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("phase of the run")
    axes.set_ylabel("share of pairs, chosen preferred")
    style.legend(axes, loc="lower right", fontsize=style.NOTE)
    return style.save(figure, path)
