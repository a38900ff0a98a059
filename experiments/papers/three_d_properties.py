"""3D-properties: drastic drop, degradation and dispersion under DPO (arXiv 2406.07327, ICLR 2025).

Claim: under DPO the rejected likelihood falls far faster than the chosen moves; then the pull on the chosen dies out
and its probability falls again, while the push on the rejected goes on; the freed mass goes to responses outside the
pair. All is worst where the pair is off-policy. Slowing the fall of the rejected (Flex-DPO) or an SFT term cures it.

Published: toy table, average probability of the chosen 0.12, 0.41 at 500, a peak of 0.58 near 1000, 0.35 at 2000 (both
on-policy); peaks 0.49, 0.49 and 0.40 in the other starts; the gradient of the rejected rises to 10^30 while that of the
chosen falls to 10^-2; a jump of "unseen" near 1300.

Here: the same 4 x 10 table, four starts and permutation of pairs; network 4-128-10, Adam 2e-4, beta 0.1, 2000 steps,
8 seeds in one program. The paper gives none of network width, optimiser, learning rate and beta, so the steps are not
comparable one to one. Probabilities stay in logs and the masks are fixed. The underflow figure is a faster run (Adam
2e-3): once rejected responses of other prompts reach float32 zero and are left out of the mean, it divides by 5 terms
of 8 and comes out up to 8/5 too high, which is the jump of the published curves.

Command: python -m experiments.papers.three_d_properties

Small models: the table shows the mechanism and the identities exactly; the paper's order of the starts by benchmark
score needs real models.

At scale: train DPO, Flex-DPO and SFT-DPO on on-policy and on off-policy pairs of one prompt set (`alignax train
--config experiments/dpo.py:loss=flex_dpo`). Prediction: the rejected log-prob falls faster off-policy, and the final
chosen log-prob is higher with either remedy than with DPO.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy, toy_curves
from experiments.papers import harness

METHODS = {"DPO": ("dpo", {}), "IPO": ("ipo", {}), "SLiC": ("slic_hf", {}), "Flex-DPO": ("flex_dpo", {}),
           "SFT-DPO": ("sft_dpo", {})}
COLOUR = {"avg chosen": style.COLOURS[0], "min chosen": style.COLOURS[5], "avg rejected": style.COLOURS[1],
          "max rejected": style.COLOURS[4], "avg unseen": style.INK}
FAST = {"lr": 2e-3, "steps": 4000, "every": 20}
"""The run that underflows: ten times the learning rate."""


def records(loss: losses.Loss, params: Any, **options: Any) -> Any:
    """Record of the published pairs from the starts [scenario, seed]: one program, leading axes kept."""
    pairs = toy.published_pairs()
    return jax.jit(jax.vmap(jax.vmap(lambda p: toy.train(loss, p, pairs, **options)[1])))(params)


def heat_maps(log_pi: np.ndarray, epochs: tuple[int, ...], path: Path) -> Path:
    """Optimal policy, preference data, and the probabilities [E, 4, 10] of one run at the epochs."""
    figure = style.figure(8.4, 4.6)
    best = np.eye(toy.PROMPTS, toy.RESPONSES)
    data = np.full(best.shape, np.nan)
    data[np.arange(4), toy.CHOSEN], data[np.arange(4), toy.REJECTED] = 1, 0
    panels = [("optimal policy", best), ("preference data: 1 chosen, 0 rejected", data),
              *((f"probabilities at epoch {e}", np.exp(x)) for e, x in zip(epochs, log_pi, strict=True))]
    for place, (name, values) in enumerate(panels):
        axes = style.axes(figure, 2, 2, place + 1)
        style.heat_map(axes, values, rows="prompt" if place % 2 == 0 else "",
                       columns="response" if place > 1 else "")
        style.title(axes, name)
    return style.save(figure, path, dpi=harness.PNG_DPI)


def curve_panels(epochs: np.ndarray, record: Any, path: Path) -> Path:
    """Probabilities, gradient magnitudes with the theory, and probabilities on a log axis; record: axes [seed, T]."""
    pairs = toy.published_pairs()
    log_pi = np.asarray(record.log_pi, np.float64)
    curves = toy_curves.five(log_pi, pairs)
    figure = style.figure(11.4, 3.7)
    ten = np.log(10)
    first, second, third = (style.axes(figure, 1, 3, i) for i in (1, 2, 3))
    for name, values in curves.items():
        style.band(first, epochs, np.exp(values), colour=COLOUR[name], label=name)
        style.band(third, epochs, values / ten, colour=COLOUR[name], label=name)
    style.legend(first, loc="upper left")
    measured = toy_curves.log_magnitudes(log_pi, record.slopes, pairs)
    predicted = toy_curves.theory(log_pi, log_pi[:, :1], pairs)
    for name, colour, seen, told in zip(("|∂l/∂p| (chosen)", "|∂l/∂q| (rejected)"), style.COLOURS, measured, predicted,
                                        strict=False):
        style.band(second, epochs, seen / ten, colour=colour, label=f"{name}, measured")
        second.plot(epochs, told.mean(0) / ten, color=style.INK, linewidth=1.2, linestyle=(0, (1, 4)),
                    label="β σ(−h) / probability" if colour == style.COLOURS[1] else None)
    style.legend(second, loc="upper left")
    for axes, name, label in ((first, "probability", "probability"), (second, "size of the gradient", "log10"),
                              (third, "probability, log axis", "log10 probability")):
        style.title(axes, name)
        axes.set_xlabel("epoch (full-batch updates)")
        axes.set_ylabel(label)
    first.set_ylim(0, 1)
    return style.save(figure, path, dpi=harness.PNG_DPI)


def scenario_panels(epochs: np.ndarray, log_pi: np.ndarray, path: Path) -> Path:
    """The four starts as heat maps over their five curves; log_pi [scenario, seed, T, P, A]."""
    figure = style.figure(12.4, 4.6)
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.9))
    for column, name in enumerate(toy.SCENARIOS):
        axes = style.axes(figure, grid[0, column])
        style.heat_map(axes, np.exp(log_pi[column, 0, 0]), rows="prompt" if not column else "", columns="response")
        style.title(axes, f"S{column + 1}: {name}")
        axes = style.axes(figure, grid[1, column])
        for curve, values in toy_curves.five(log_pi[column], toy.published_pairs()).items():
            style.band(axes, epochs, np.exp(values), colour=COLOUR[curve], label=curve)
        axes.set_ylim(0, 1)
        axes.set_xlabel("epoch (full-batch updates)")
        axes.set_ylabel("probability" if not column else "")
        if not column:
            style.legend(axes, loc="upper left", fontsize=style.NOTE)
    return style.save(figure, path, dpi=harness.PNG_DPI)


def method_panels(epochs: np.ndarray, runs: dict[str, np.ndarray], path: Path) -> Path:
    """Methods by starts: average chosen, rejected and unseen probability; runs: name -> log_pi."""
    figure = style.figure(9.2, 1.5 * len(runs) + 0.5)
    shown = ("avg chosen", "avg rejected", "avg unseen")
    for row, (method, log_pi) in enumerate(runs.items()):
        for column in range(4):
            axes = style.axes(figure, len(runs), 4, 4 * row + column + 1)
            curves = toy_curves.five(log_pi[column], toy.published_pairs())
            for name, line in zip(shown, style.DASHES, strict=False):
                style.band(axes, epochs, np.exp(curves[name]), colour=COLOUR[name], label=name, line=line)
            axes.set_ylim(0, 1)
            if row == 0:
                style.title(axes, f"S{column + 1}: {list(toy.SCENARIOS)[column]}")
            if column == 0:
                axes.set_ylabel(f"{method}\nprobability")
            if row == len(runs) - 1:
                axes.set_xlabel("epoch")
            if row == column == 0:
                style.legend(axes, loc="upper left", fontsize=style.NOTE)
    return style.save(figure, path, dpi=harness.PNG_DPI)


def artefact(epochs: np.ndarray, log_pi: np.ndarray, path: Path) -> tuple[Path, float]:
    """The mean over unseen responses with a fixed mask, and with float32 zeros left out; log_pi [T, P, A], one run.

    Also the largest ratio of the two.
    """
    pairs = toy.published_pairs()
    fixed = np.exp(toy_curves.five(log_pi, pairs)["avg unseen"])
    wrong, left = toy_curves.vanishing_unseen(log_pi, pairs)
    figure = style.figure(8.4, 3.4)
    first, second = style.axes(figure, 1, 2, 1), style.axes(figure, 1, 2, 2)
    first.plot(epochs, fixed, color=style.INK, linewidth=1.8, label="fixed mask, in logs")
    first.plot(epochs, wrong, color=style.COLOURS[1], linewidth=1.8, linestyle="--",
               label="zeros of float32 left out")
    style.legend(first, loc="upper left")
    first.set_ylabel("average unseen probability")
    second.plot(epochs, left, color=style.COLOURS[1], linewidth=1.8)
    second.set_ylabel("unseen entries above zero (of 32)")
    second.set_ylim(0, 34)
    for axes in (first, second):
        axes.set_xlabel("epoch (full-batch updates)")
    return style.save(figure, path, dpi=harness.PNG_DPI), float((wrong / fixed).max())


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figures and report; quick: two seeds, 200 steps."""
    folder = Path(out_folder)
    seeds, steps, every = (2, 200, 20) if quick else (harness.SEEDS, toy.DPO["steps"], 10)
    params, start = harness.starts(seeds)
    runs = {}
    for name, (id, hyper) in METHODS.items():
        runs[name] = records(losses.get(id, **hyper), params, steps=steps, every=every)
    logs = {name: np.asarray(record.log_pi, np.float64) for name, record in runs.items()}
    epochs = np.arange(0, steps + 1, every)
    middle = len(epochs) // 4
    dpo = jax.tree.map(lambda x: x[0], runs["DPO"])
    fast = {**FAST, "steps": steps} if quick else FAST
    one = jax.tree.map(lambda x: x[3, 0], params)  # both off-policy, first seed
    quickest = jax.jit(lambda p: toy.train(losses.get("dpo"), p, toy.published_pairs(), **fast)[1].log_pi)(one)
    jump, factor = artefact(np.arange(0, fast["steps"] + 1, fast["every"]), np.asarray(quickest),
                            folder / "three_d_underflow.png")
    figures = [
        heat_maps(logs["DPO"][0, 0, [0, middle]], (0, int(epochs[middle])), folder / "three_d_heat.png"),
        curve_panels(epochs, dpo, folder / "three_d_curves.png"),
        scenario_panels(epochs, logs["DPO"], folder / "three_d_scenarios.png"),
        method_panels(epochs, logs, folder / "three_d_methods.png"),
        jump,
    ]
    pairs = toy.published_pairs()
    found = {name: toy_curves.properties(log_pi, pairs) for name, log_pi in logs.items()}
    plain, rejected = found["DPO"], logs["DPO"][..., np.arange(4), toy.REJECTED].mean(-1)
    size = toy_curves.log_magnitudes(logs["DPO"], runs["DPO"].slopes, pairs)
    told = toy_curves.theory(logs["DPO"], np.asarray(start, np.float64)[:, :, None], pairs)
    agreement = max(float(np.abs(a - b).max()) for a, b in zip(size, told, strict=True))
    checks = {
        "mean log-prob of the rejected falls at every recorded epoch, in every start and seed":
            (np.diff(rejected, axis=-1) < 0).all(),
        "the rejected moves further than the chosen (in nats) in every start and seed": (plain["drop"] > 1).all(),
        "the gradient on the rejected grows and that on the chosen falls, by more than e in the mean of every start":
            (size[1][..., -1] - size[1][..., 0] > 1).all() and (size[0][..., 0] - size[0][..., -1] > 1).all(),
        "under DPO the chosen has a maximum before the end, in the mean of every start":
            (np.exp(toy_curves.five(logs["DPO"], pairs)["avg chosen"]).mean(1).argmax(-1) < len(epochs) - 1).all(),
        "a rejected response that starts off-policy falls faster (log10 at 500: S3 below S1, S4 below S2)":
            rejected[2, :, middle].mean() < rejected[0, :, middle].mean()
            and rejected[3, :, middle].mean() < rejected[1, :, middle].mean(),
        "Flex-DPO and SFT-DPO end with a higher chosen probability than DPO in every start":
            all((found[m]["chosen end"].mean(1) > plain["chosen end"].mean(1)).all() for m in ("Flex-DPO", "SFT-DPO")),
        "measured gradients equal beta sigmoid(-h) / probability to 1e-3 in the log": agreement < 1e-3,
        "the best start by peak chosen probability is S1, both on-policy": plain["chosen peak"].mean(1).argmax() == 0,
    }
    ours = {f"DPO, S{i + 1}: chosen {name}": harness.said(plain[f"chosen {name}"][i])
            for i in range(4) for name in ("peak", "end")}
    ours |= {f"{name}: chosen at the end, S1 and S4": f"{harness.said(found[name]['chosen end'][0])}, "
             f"{harness.said(found[name]['chosen end'][3])}" for name in list(METHODS)[1:]}
    ours["log10 of the rejected at epoch " + str(int(epochs[middle]))] = ", ".join(
        f"S{i + 1} {harness.said(rejected[i, :, middle] / np.log(10), 1)}" for i in range(4))
    ours["largest |log measured − log predicted| of a gradient"] = f"{agreement:.1e}"
    ours["unseen mean with float32 zeros left out, over the true one, at most"] = f"{factor:.2f}"
    return harness.report(
        figures=figures, seeds=seeds, ours=ours, checks=checks,
        published="chosen peak 0.58, 0.49, 0.49, 0.40 and end 0.35, 0.18, 0.16, 0.12 in S1 to S4")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
