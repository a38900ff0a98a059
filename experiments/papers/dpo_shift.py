"""DPO-Shift: the chosen likelihood against the margin (arXiv 2502.07599).

Claim: scaling the rejected term by f below 1 lifts the likelihood of the chosen and costs reward margin and accuracy; f
sets the trade, and values close to 1 already stop the displacement.

Published: for every f between 0.5 and 0.95 the mean chosen log-prob ends higher and the reward accuracy lower than with
DPO (f = 1); 0.95 is recommended. Figures only.

Here: the toy table of 3D-properties (its own network, four pairs, start S4, both off-policy) for the likelihood, and
256 noisy Bradley-Terry pairs of a random bandit for the accuracy on all pairs; f 0.5 to 1, 8 seeds in one program each.

Command: python -m experiments.papers.dpo_shift

Small models: the trade-off of likelihood and margin is in the loss and shows; how much accuracy it costs depends on how
hard the ranking is.

At scale: `alignax train --config experiments/dpo.py:loss=dpo_shift --config.loss.shift=0.75` and 0.95 beside DPO.
Prediction: the chosen log-prob is ordered by falling f at every checkpoint, the margin by rising f.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy, toy_curves
from experiments.papers import harness, worlds

SHIFTS = (0.5, 0.75, 0.9, 0.95, 1.0)


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 100 steps."""
    seeds, steps, every = (2, 100, 10) if quick else (harness.SEEDS, toy.DPO["steps"], 50)
    loss, pairs = losses.get("dpo_shift", beta=0.1), toy.published_pairs()
    params, _ = harness.starts(seeds)
    shifts = jnp.array(SHIFTS)

    def table(params, shift):
        return toy.train(loss, params, pairs, steps=steps, every=every, hyper={"shift": shift})[1].log_pi

    def bandit(key, shift):
        place = worlds.world(key, 8, 12, spread=1.5)
        data = worlds.draw(jax.random.fold_in(key, 1), place, 256)
        log_pi = toy.train(loss, worlds.zeros(place), data, policy=worlds.anchored(place.log_ref), lr=0.02,
                           hyper={"shift": shift}, steps=steps // 4, every=steps // 4)[1].log_pi[-1]
        return worlds.ranking_accuracy(log_pi, place)

    grid = jax.jit(jax.vmap(lambda s: jax.vmap(lambda p: table(p, s))(jax.tree.map(lambda x: x[3], params))))
    log_pi = np.asarray(grid(shifts), np.float64)
    keys = jax.random.split(jax.random.key(4), seeds)
    accuracy = np.asarray(jax.jit(jax.vmap(lambda s: jax.vmap(lambda k: bandit(k, s))(keys)))(shifts))
    chosen = toy_curves.five(log_pi, pairs)["avg chosen"]
    ratio = log_pi - log_pi[..., :1, :, :]
    margin = (ratio[..., np.arange(4), toy.CHOSEN] - ratio[..., np.arange(4), toy.REJECTED]).mean(-1)

    figure = style.figure(11.2, 3.5)
    first, second, third = (style.axes(figure, 1, 3, i) for i in (1, 2, 3))
    epochs = np.arange(0, steps + 1, every)
    for index, (shift, colour) in enumerate(zip(SHIFTS, style.COLOURS, strict=False)):
        style.band(first, epochs, np.exp(chosen[index]), colour=colour, label=f"f = {shift:g}",
                   line="--" if shift == 1 else "-")
        (x, across), (y, up) = (harness.mean_ci(v[index, :, -1]) for v in (margin, np.exp(chosen)))
        second.errorbar(x, y, xerr=across, yerr=up, fmt="o", color=colour, capsize=2)
        second.annotate(f"{shift:g}", (x, y), xytext=(7, 7 if index % 2 else -13), textcoords="offset points",
                        fontsize=style.TICK, color=colour)
    style.legend(first, loc="lower right")
    first.set_xlabel("epoch (full-batch updates)")
    first.set_ylabel("average chosen probability")
    second.set_xlabel("margin of log-ratios at the end (nats)")
    second.set_ylabel("average chosen probability at the end")
    second.set_ylim(top=1.08)
    style.title(second, "the trade-off, f at the points")
    half = [harness.mean_ci(a)[1] for a in accuracy]
    middle = accuracy.mean(1)
    style.band(third, SHIFTS, accuracy.T, colour=style.COLOURS[2], low=middle - half, high=middle + half)
    third.set_xlabel("f")
    third.set_ylabel("ranking accuracy on all pairs\n(noisy bandit)")
    path = style.save(figure, Path(out_folder) / "dpo_shift.png", dpi=harness.PNG_DPI)
    ends, gap = np.exp(chosen[..., -1]), margin[..., -1]
    checks = {
        "every f below 1 ends with a more likely chosen than DPO, in the mean":
            (ends[:-1].mean(1) > ends[-1].mean()).all(),
        "every f below 1 ends with a smaller margin than DPO, in the mean": (gap[:-1].mean(1) < gap[-1].mean()).all(),
        "the margin is ordered by f": (np.diff(gap.mean(1)) > 0).all(),
        "f = 0.95 already doubles DPO's chosen probability, or takes it over 0.9":
            ends[3].mean() > min(2 * ends[-1].mean(), 0.9),
        "ranking accuracy is lower at f = 0.5 than with DPO, paired over seeds (95% interval excludes 0)":
            np.subtract(*harness.mean_ci(accuracy[-1] - accuracy[0])) > 0,
    }
    ours = {f"f = {s:g}: chosen, margin (nats), accuracy":
            f"{harness.said(ends[i])}, {harness.said(gap[i], 1)}, {harness.said(accuracy[i], 3)}"
            for i, s in enumerate(SHIFTS)}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="higher chosen log-prob and lower accuracy for every f below 1; 0.95 recommended")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
