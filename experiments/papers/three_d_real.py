"""The three properties on a real pretrained model (arXiv 2406.07327, section 4).

Claim: under plain DPO the rejected falls far faster than the chosen moves, late updates no longer lift the chosen, and
mass goes to responses outside the pairs; a weaker push on the rejected or a likelihood term on the chosen helps.

Published: MATH with a 33-billion-parameter model, share of right answers: base 25.7, DPO 29.9, Flex-DPO 30.1, SLiC
29.3; curves of log-likelihood without a baseline.

Here: the 260-thousand-parameter story model, pairs of its own samples labelled by a sentiment lexicon, DPO at beta 0.05
for six epochs, and from the same start Flex-DPO (beta 0.05 chosen, 0.02 rejected) and RPO (DPO plus the likelihood of
the chosen); the excess of every curve over -KL(start||policy) on fresh samples of the same prompts. --model names
another place of the model.

Command: python -m experiments.papers.three_d_real

Small models: the mechanism, and how much of a falling curve is the baseline. Not the effect on right answers.

At scale: `alignax report RUN` on any run with `diagnostics=("displacement",)`. Prediction: with pairs of the model's
own samples most of the chosen's fall is the baseline; with pairs of another model the excess itself is negative.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from alignax import configs, examine, metrics, train
from alignax.diagnostics import report_run, style
from alignax.launch import compilation_cache
from experiments.papers import harness

MODEL = Path(__file__).resolve().parents[3] / "shared/models/stories260K"
REMEDIES = {"dpo": ("dpo", {"beta": 0.05}), "flex_dpo": ("flex_dpo", {"beta_chosen": 0.05, "beta_rejected": 0.02}),
            "rpo": ("rpo", {"beta": 0.05, "eta": 5.0})}


def lacking() -> str:
    """What the machine has to have and has not; empty where it can run."""
    return "" if MODEL.is_dir() else f"the story model is not at {MODEL.name} of the shared material"


def config(model: str | Path, quick: bool = False):
    """The run: pairs of the model's own samples, then the three losses from one start."""
    out = configs.base()
    out.model = configs.model_section(path=str(model), unroll=8)
    out.sample = configs.sample_stage(
        policy="model", prompts="builtin:openings", num_prompts=16 if quick else 160, num_samples=4 if quick else 6,
        max_new_tokens=16 if quick else 48, batch_size=16 if quick else 40, pairs="best_worst", label_scale=1.0)
    for name, (loss, hyper) in REMEDIES.items():
        out[name] = configs.train_stage(
            loss, hyper=hyper, init="model", data=dict(path="stage:sample", eval_records=16),
            optim=dict(learning_rate=4e-4, schedule="linear"), batch_size=8 if quick else 16, epochs=1 if quick else 6,
            eval_every=500, log_every=5, checkpoint_every=500, diagnostics=("displacement",),
            diagnose_every=1 if quick else 6)
    out.stages = ("sample", *REMEDIES)
    return out


def run(out_folder: str | Path, quick: bool = False, model: str | Path = MODEL) -> dict[str, Any]:
    """Figure and report; quick: a few steps on a few prompts. Raises ConfigError where the model is not there."""
    with tempfile.TemporaryDirectory() as place:
        folder, quiet = Path(place) / "run", Console(quiet=True)
        train.run(config(model, quick), folder, console=quiet)
        ctx, settings = examine.open_run(folder, quiet)
        rows = metrics.read_metrics(folder)
        told = {name: examine.stage(ctx, settings, name, prompts=8 if quick else 64, samples=2 if quick else 4)
                for name in REMEDIES}
        found = {name: report_run.summary(measured, rows) for name, measured in told.items()}
    path = Path(out_folder) / "three_d_real.png"
    _figure(found, path)
    excess = {name: {side: one["excess"][side] for side in ("chosen", "rejected")} for name, one in found.items()}
    raw = {name: float(np.mean(measured["change"]["chosen"])) for name, measured in told.items()}
    base = {name: float(np.mean(measured["baseline"])) for name, measured in told.items()}
    plain = excess["dpo"]
    checks = {
        "under DPO the rejected's excess lies below 0": plain["rejected"].high < 0,
        "under DPO the chosen's likelihood falls, and over half of the fall is the baseline":
            raw["dpo"] < 0 and base["dpo"] < 0.5 * raw["dpo"],
        "both remedies leave the chosen likelier than DPO, as published":
            min(raw["flex_dpo"], raw["rpo"]) > raw["dpo"],
        "they do so in excess of the baseline too":
            min(excess[name]["chosen"].mean for name in ("flex_dpo", "rpo")) > plain["chosen"].mean,
        "they move the policy less, KL(start||policy)": max(-base["flex_dpo"], -base["rpo"]) < -base["dpo"],
        "the fresh samples' own excess is within 2 nats of 0": all(abs(one["check"].mean) < 2
                                                                  for one in found.values()),
    }
    ours = {f"{name}, {side}: excess in nats": str(value) for name, both in excess.items()
            for side, value in both.items()}
    ours |= {f"{name}: chosen's change, of which baseline": f"{raw[name]:+.1f}, {base[name]:+.1f}" for name in found}
    ours |= {f"{name}: {verdict.name}": verdict.verdict for name, one in found.items() for verdict in one["verdicts"]}
    return harness.report(figures=[path], published="33B on MATH: DPO 29.9, Flex-DPO 30.1 % right answers", ours=ours,
                          seeds=1, checks=checks)


def _figure(found: dict[str, Any], path: Path) -> None:
    """One column per loss: raw curves with the baseline above, the excess below."""
    titles = {"dpo": "DPO", "flex_dpo": "Flex-DPO", "rpo": "RPO (DPO + likelihood of the chosen)"}
    figure = style.figure(11.5, 6.0)
    panels = {}
    for column, (name, one) in enumerate(found.items()):
        seen = one["seen"]
        for row in range(2):
            axes = style.axes(figure, 2, 3, 1 + 3 * row + column)
            panels.setdefault(row, []).append(axes)
            axes.axhline(0, color=style.MUTED, linewidth=0.8)
            for side in ("chosen", "rejected", "unseen", *(["baseline"] if not row else [])):
                values = seen[side] - (seen["baseline"] if row else 0)
                axes.plot(seen["step"], values, color=report_run.SIDE_COLOURS[side], linewidth=1.8,
                          linestyle="--" if side == "baseline" else "-", label=side)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if row:
                axes.set_xlabel("update")
            else:
                style.title(axes, titles[name])
            if not column:
                axes.set_ylabel("excess over the baseline\n(nats per sequence)" if row else
                                "change since the start\n(nats per sequence)")
    for row in panels.values():  # one scale along a row, so that columns can be compared
        low, high = min(a.get_ylim()[0] for a in row), max(a.get_ylim()[1] for a in row)
        for axes in row:
            axes.set_ylim(low, high)
    style.legend(panels[0][0], loc="lower left")
    style.save(figure, path, dpi=harness.PNG_DPI)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face folder of a story model")
    parser.add_argument("--out", type=Path, default=harness.OUT, help=f"folder of the figure (default: {harness.OUT})")
    parser.add_argument("--quick", action="store_true", help="a check that it runs, no result")
    arguments = parser.parse_args()
    compilation_cache()
    for name, value in run(arguments.out, quick=arguments.quick, model=arguments.model).items():
        Console(soft_wrap=True).print(f"{name}: {value}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
