"""3D-properties of every pairwise loss: the four starts of the toy table, one sheet (after arXiv 2406.07327).

Claim: the rejected falling further than the chosen moves and the chosen's rise dying out are properties of losses that
are a function of the difference of the two log-ratios, whatever its shape: their gradients on the two probabilities
stand in the ratio -p/q. Those without a target turn; a term that pulls on the chosen alone removes both.

Published: four-scenario curves for DPO and, in the first version, IPO and SLiC; Flex-DPO and SFT-DPO by their end.

Here: every loss of the index that is about two completions and runs on the table, at its default hyper-parameters;
network 4-128-10, Adam 2e-4, 2000 steps, 3 seeds, the four starts, one program per loss. Losses whose curves agree to
1e-4 everywhere share a row, since one-token responses, even margins and unit weights make many cousins the same.
Probabilities stay in logs and masks are fixed. Default strengths differ between losses, so that rows compare shapes,
not speeds. DiscoPOP stands apart: its loss has a minimum at a difference of -2.37 (2406.08414), below the 0 that
training starts from, and full batches of a deterministic table go there. The statements were put into this form after
a first look at the curves.

Command: python -m experiments.papers.three_d_losses

Small models: the sheet shows which way each loss moves chosen, rejected and unseen on a table without shared tokens;
length terms, token masks and normalisation have nothing to act on here.

At scale: train the losses of one row and of two different rows on the same off-policy pairs with `alignax sweep` and
read `alignax report`. Prediction: verdicts agree within a row of losses of the difference, and "degradation into
suppression" is absent where a term pulls on the chosen alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy, toy_curves
from experiments.papers import harness
from experiments.papers.compare_losses import QUICK_COMPILE

SEEDS, EVERY = 3, 50
PULLED = ("sft_dpo", "rpo", "cpo", "orpo", "slic_hf")
"""Losses with a term that pulls on the chosen alone."""
TARGETLESS = ("dpo", "robust_dpo", "exo", "focal_po")
"""Losses that are a function of the difference of the two log-ratios and fall without end as it grows."""
OF_DIFFERENCE = (*TARGETLESS, "cdpo", "ipo", "rso:hinge_norm", "gpo")
"""These and those with a target: a difference beyond which the loss is 0 or rises again."""
SHOWN = {"avg chosen": style.COLOURS[0], "avg rejected": style.COLOURS[1], "avg unseen": style.INK}
BLOCKS, PAGE, SHEET_DPI = 3, 21, 85
"""Blocks of panels beside each other, blocks on a page."""
QUICK = ("dpo", "ipo", "sft_dpo", "cdpo", "rpo")


def pairwise() -> tuple[str, ...]:
    """Ids of the losses of two completions that the table can train, in the order of the index."""
    return tuple(name for name in toy.usable()
                 if losses.INDEX[name].info.completions == 2 and not losses.INDEX[name].info.chosen_only)


def curves(name: str, params: Any, steps: int, every: int) -> np.ndarray:
    """log pi [scenario, seed, T, P, A] of a loss trained from the starts, one program."""
    pairs, loss = toy.published_pairs(), losses.get(name)
    run = jax.vmap(jax.vmap(lambda p: toy.train(loss, p, pairs, steps=steps, every=every)[1].log_pi))
    return np.asarray(jax.jit(run, compiler_options=QUICK_COMPILE)(params), np.float64)


def rows(found: Mapping[str, np.ndarray], tolerance: float = 1e-4) -> dict[tuple[str, ...], np.ndarray]:
    """Losses of the same curves together: ids -> log pi of the first; agreement in every recorded probability."""
    out: dict[tuple[str, ...], np.ndarray] = {}
    for name, log_pi in found.items():
        same = next((ids for ids, other in out.items()
                     if np.abs(np.exp(other) - np.exp(log_pi)).max() < tolerance), None)
        if same is None:
            out[(name,)] = log_pi
        else:  # in its place, so that the order stays
            out = {(*ids, name) if ids == same else ids: value for ids, value in out.items()}
    return out


def sheet(epochs: np.ndarray, groups: Mapping[tuple[str, ...], np.ndarray], path: Path) -> Path:
    """Blocks of four small panels, one block per row of `rows`, BLOCKS beside each other."""
    lines = -(-len(groups) // BLOCKS)
    figure = style.figure(5.6 * BLOCKS, 1.28 * lines + 0.7)
    blocks = figure.subfigures(lines, BLOCKS, squeeze=False, wspace=0.03)
    pairs = toy.published_pairs()
    for place, (ids, log_pi) in enumerate(groups.items()):
        line, column = divmod(place, BLOCKS)
        block = blocks[line, column]
        named = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        block.suptitle(named, fontsize=style.TICK, x=0.02, ha="left", color=style.INK)
        last = place + BLOCKS >= len(groups)
        for start in range(len(toy.SCENARIOS)):
            axes = style.axes(block, 1, 4, start + 1)
            five = toy_curves.five(log_pi[start], pairs)
            for (name, colour), dash in zip(SHOWN.items(), style.DASHES, strict=False):
                style.band(axes, epochs, np.exp(five[name]), colour=colour, line=dash, label=name)
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.5, 1], ["0", "", "1"] if start == 0 else ["", "", ""])
            axes.set_xticks([0, epochs[-1] // 2, epochs[-1]], ["0", "", str(epochs[-1])] if last else ["", "", ""])
            axes.tick_params(labelsize=style.NOTE - 1, length=2)
            axes.text(0.04, 0.86, f"S{start + 1}", transform=axes.transAxes, fontsize=style.NOTE - 1, color=style.MUTED)
    handles, labels = blocks[0, 0].axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=style.LABEL,
                  title="probability over epochs (full-batch updates); line: mean, band: all seeds")
    return style.save(figure, path, dpi=SHEET_DPI)


def ends(groups: Mapping[tuple[str, ...], np.ndarray], path: Path) -> Path:
    """Every row's chosen probability at its peak (ring) and at the end (dot), by start."""
    pairs = toy.published_pairs()
    figure = style.figure(12.0, 0.2 * len(groups) + 1.3)
    names = [", ".join(ids[:2]) + (" …" if len(ids) > 2 else "") for ids in groups]
    for start, title in enumerate(toy.SCENARIOS):
        axes = style.axes(figure, 1, 4, start + 1)
        found = [toy_curves.properties(log_pi[start], pairs) for log_pi in groups.values()]
        peak, end = (np.asarray([f[f"chosen {k}"].mean() for f in found]) for k in ("peak", "end"))
        y = np.arange(len(groups))
        axes.hlines(y, end, peak, color=style.MUTED, linewidth=1)
        axes.plot(peak, y, "o", markerfacecolor="white", markeredgecolor=style.COLOURS[0], markersize=4.5,
                  label="highest")
        axes.plot(end, y, "o", color=style.COLOURS[0], markersize=4.5, label="at the end")
        axes.set_yticks(y, names if start == 0 else [""] * len(names), fontsize=style.NOTE - 1)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(-0.02, 1.04)
        style.title(axes, f"S{start + 1}: {title}")
        axes.set_xlabel("average probability of the chosen")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=style.TICK)
    return style.save(figure, path, dpi=harness.PNG_DPI)


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figures and report; quick: a few losses, two seeds, 200 steps."""
    folder = Path(out_folder)
    seeds, steps, every = (2, 200, 50) if quick else (SEEDS, toy.DPO["steps"], EVERY)
    params, _ = harness.starts(seeds)
    names = QUICK if quick else pairwise()
    found = {name: curves(name, params, steps, every) for name in names}
    broken = [name for name, log_pi in found.items() if not np.isfinite(log_pi).all()]
    groups = rows({name: log_pi for name, log_pi in found.items() if name not in broken})
    pairs, epochs = toy.published_pairs(), np.arange(0, steps + 1, every)
    told = {name: toy_curves.properties(log_pi, pairs) for name, log_pi in found.items() if name not in broken}
    rejected = {name: log_pi[..., np.arange(4), toy.REJECTED].mean(-1) for name, log_pi in found.items()}
    fell = [name for name in told if (rejected[name][..., -1] < rejected[name][..., 0]).all()]
    faster = [name for name in told if (told[name]["drop"] > 1).all()]
    average = {name: np.exp(toy_curves.five(found[name], pairs)["avg chosen"]).mean(1) for name in told}
    turned = [name for name in told if (average[name].argmax(-1) < len(epochs) - 1).all()]
    of_difference = [name for name in OF_DIFFERENCE if name in told]
    pulled = [name for name in PULLED if name in told]
    apart = "discopop" not in told or (rejected["discopop"][..., -1] > rejected["discopop"][..., 0]).all()
    higher = lambda name: (told[name]["chosen end"].mean(1) > told["dpo"]["chosen end"].mean(1)).all()
    checks = {
        "every loss stays finite": not broken,
        "the rejected falls and moves further than the chosen (in nats) under every loss of the difference, in every "
        "start and seed": all(name in faster and name in fell for name in of_difference),
        "no loss of the difference brings the chosen above 0.9, in any start (mean over seeds)":
            all((average[name] < 0.9).all() for name in of_difference),
        "under those without a target the chosen has a maximum before the end, in every start (mean over seeds)":
            all(name in turned for name in TARGETLESS if name in told),
        "DiscoPOP raises the rejected, in every start and seed": apart,
        "every loss that also pulls on the chosen alone ends with a higher chosen probability than DPO, in every "
        "start": all(higher(name) for name in pulled)}
    ours = {"losses, rows of different curves": f"{len(found)}, {len(groups)}",
            "the rejected moves further in every start and seed": f"{len(faster)} of {len(told)}",
            "the chosen has a maximum before the end in every start":
                f"{len(turned)} of {len(told)}: {', '.join(turned)}",
            "the rejected does not fall everywhere": ", ".join(n for n in told if n not in fell) or "none"}
    ours |= {f"{name}: chosen at the end, S1 to S4": ", ".join(f"{x:.2f}" for x in told[name]["chosen end"].mean(1))
             for name in ("dpo", *pulled)}
    pages = [dict(list(groups.items())[first:first + PAGE]) for first in range(0, len(groups), PAGE)]
    figures = [sheet(epochs, page, folder / f"three_d_losses_{number}.png") for number, page in enumerate(pages, 1)]
    return harness.report(figures=[*figures, ends(groups, folder / "three_d_losses_ends.png")], seeds=seeds, ours=ours,
                          checks=checks, published="shapes only, for DPO, IPO, SLiC, Flex-DPO and SFT-DPO")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
