"""IPO against DPO on deterministic preferences (arXiv 2310.12036, section 5).

Claim: when one response always wins, DPO drives its probability to 1 whatever the regularisation, since the fitted
reward has no finite optimum; IPO stays at a finite distance from the reference that tau sets. A response that was never
compared keeps its mass under IPO and loses it under DPO.

Published: bandit of three actions, three data sets; DPO greedy for every tau, IPO between uniform and greedy. Figures
only; the paper's optimum for a total order is pi(a) : pi(b) : pi(c) = e^(1/(3 tau)) : 1 : e^(-1/(3 tau)) by least
squares.

Here: the same bandit with data sets a > b > c (total order), a > b and b > a (contradiction), a > b only; tau 0.1 to 5,
DPO with beta = tau; uniform reference, a free table, Adam 0.01, 18,000 updates.

Command: python -m experiments.papers.ipo_deterministic

Small models: the statement is about the losses' optima, so the table is the full test. A language model's early
stopping hides DPO's missing optimum.

At scale: `alignax train --config experiments/dpo.py:loss=ipo` and `loss=dpo` for many epochs on a small set.
Prediction: the margin of DPO keeps growing with the logarithm of the steps, that of IPO settles at 1/(2 tau).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy
from experiments.papers import harness

DATA = {"a > b > c": ((0, 1), (1, 2), (0, 2)), "a > b and b > a": ((0, 1), (1, 0)), "a > b, c unseen": ((0, 1),)}
TAUS = (0.1, 0.5, 1.0, 5.0)
STEPS = 18_000


def train(name: str, key: str, data: tuple[tuple[int, int], ...], steps: int) -> np.ndarray:
    """Probabilities [tau, T + 1, 3] under the loss `name`, whose strength is called `key`."""
    chosen, rejected = np.array(data).T
    pairs = toy.Pairs(np.zeros(len(data), int), chosen, rejected, np.tile([1.0, 0.0], (len(data), 1)))
    loss, start = losses.get(name), jnp.zeros((1, 3))
    runs = jax.jit(jax.vmap(lambda tau: toy.train(loss, start, pairs, steps=steps, every=steps // 60, lr=0.01,
                                                  policy=toy.table_logits, hyper={key: tau})[1].log_pi))
    return np.exp(np.asarray(runs(jnp.array(TAUS)), np.float64))[:, :, 0]


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: 600 updates."""
    steps = 600 if quick else STEPS
    runs = {loss: {name: train(id, key, data, steps) for name, data in DATA.items()}
            for loss, id, key in (("DPO", "dpo", "beta"), ("IPO", "ipo", "tau"))}
    figure = style.figure(10.6, 5.2)
    epochs = np.linspace(0, steps, 61)
    for row, (loss, by_data) in enumerate(runs.items()):
        for column, (name, values) in enumerate(by_data.items()):
            axes = style.axes(figure, 2, 3, 3 * row + column + 1)
            for path, line in zip(values, style.DASHES, strict=True):
                for action, colour in enumerate((style.COLOURS[0], style.COLOURS[1], style.INK)):
                    axes.plot(epochs, path[:, action], color=colour, linestyle=line, linewidth=1.5)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xticks(np.linspace(0, steps, 4))
            style.title(axes, f"{loss}: {name}")
            if column == 0:
                axes.set_ylabel("probability")
            if row == 1:
                axes.set_xlabel("update step")
            if row == column == 0:
                from matplotlib.lines import Line2D

                marks = [Line2D([], [], color=c, label=f"action {a}") for a, c in
                         zip("abc", (style.COLOURS[0], style.COLOURS[1], style.INK), strict=True)]
                marks += [Line2D([], [], color=style.MUTED, linestyle=line, label=f"τ = β = {t:g}")
                          for t, line in zip(TAUS, style.DASHES, strict=True)]
                style.legend(axes, handles=marks, fontsize=style.NOTE, loc="center right")
    path = style.save(figure, Path(out_folder) / "ipo_deterministic.png", dpi=harness.PNG_DPI)
    taus = np.array(TAUS)
    logits = np.stack([1 / (3 * taus), 0 * taus, -1 / (3 * taus)], -1)
    optimum = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order, lone = "a > b > c", "a > b, c unseen"
    checks = {
        "IPO on the total order ends at e^(1/(3 tau)) : 1 : e^(-1/(3 tau)) to 0.01, for every tau":
            np.abs(runs["IPO"][order][:, -1] - optimum).max() < 0.01,
        "DPO on the total order gives the best action over 0.95 for every beta":
            runs["DPO"][order][:, -1, 0].min() > 0.95,
        "DPO's best action is still rising at the end, for every beta below 5":
            (runs["DPO"][order][:3, -1, 0] >= runs["DPO"][order][:3, -10, 0]).all(),
        "both stay at the reference on contradictory data":
            max(np.abs(r["a > b and b > a"][:, -1] - 1 / 3).max() for r in runs.values()) < 0.01,
        "IPO's margin on the lone pair is 1/(2 tau) to 1%": np.allclose(
            np.log(runs["IPO"][lone][:, -1, 0] / runs["IPO"][lone][:, -1, 1]), 1 / (2 * taus), rtol=0.01),
        "the action that was never compared ends with more mass under IPO than under DPO for tau of 0.5 and more":
            (runs["IPO"][lone][1:, -1, 2] > runs["DPO"][lone][1:, -1, 2]).all(),
    }
    ours = {f"total order, tau = beta = {t:g}: best action, DPO and IPO (optimum of IPO)":
            f"{runs['DPO'][order][i, -1, 0]:.3f}, {runs['IPO'][order][i, -1, 0]:.3f} ({optimum[i, 0]:.3f})"
            for i, t in enumerate(TAUS)}
    return harness.report(figures=[path], seeds=1, ours=ours, checks=checks,
                          published="DPO greedy for every tau, IPO between uniform and greedy")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
