"""Flipped labels under DPO, cDPO, robust DPO and LCPO (2305.18290, 2403.00409, 2509.24159).

Claim: at a flip rate e, robust DPO's corrected loss is unbiased and degrades less than DPO; conservative DPO (label
smoothing e) only limits the margin; LCPO needs no rate: its expectation step recovers the reliability 1 - e.

Published: robust DPO ahead of DPO and cDPO at every flip rate up to 0.4; LCPO's estimated reliability follows the true
one. Curves on language models; no number fits a table.

Here: 8 prompts, 8 responses, 1,000 pairs drawn uniformly whose better response wins before flipping at 0 to 0.4; free
table, Adam 0.05, 1,000 updates, beta 2; cDPO and robust DPO are told e, LCPO starts at 0.9 and moves its estimate by
0.02 of the way per update, or by the published 0.1. 8 seeds by 5 rates, one program per loss.

Command: python -m experiments.papers.label_noise

Small models: bias, margins and the recovered rate are those of the losses. A free table sees each response many times;
what a network's own smoothing adds is not here.

At scale: flip 20% of the pairs of a set and run `loss=dpo`, `robust_dpo`, `cdpo`, `lcpo`. Prediction: LCPO's logged
reliability settles within 0.05 of 0.8, and robust DPO's held-out accuracy ends above DPO's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy
from experiments.papers import harness, worlds

RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
BETA = 2.0
METHODS = {"DPO": ("dpo", {}), "cDPO, told e": ("cdpo", {}), "robust DPO, told e": ("robust_dpo", {}),
           "LCPO": ("lcpo", {"rate": 0.02}), "LCPO, rate 0.1": ("lcpo", {"rate": 0.1})}


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 40 steps."""
    seeds, steps, every = (2, 40, 4) if quick else (harness.SEEDS, 1000, 20)

    def member(key, rate, id, own):
        place = worlds.world(key, 8, 8)
        even = jnp.full_like(place.log_ref, -jnp.log(8.0))
        data = worlds.draw(jax.random.fold_in(key, 1), place, 1000, log_pi=even, scale=jnp.inf, flip=rate)
        hyper = {"beta": BETA} | ({"label_smoothing": rate} if id in ("cdpo", "robust_dpo") else {})
        record = toy.train(losses.get(id, **own), worlds.zeros(place), data, policy=worlds.anchored(place.log_ref),
                           lr=0.05, steps=steps, every=every, hyper=hyper)[1]
        eta = record.state["eta"][0] if id == "lcpo" else jnp.nan
        return worlds.ranking_accuracy(record.log_pi, place), toy.expected(record.log_pi, place.reward), eta

    keys, rates = jax.random.split(jax.random.key(6), seeds), jnp.array(RATES)
    found = {}
    for name, (id, own) in METHODS.items():
        grid = jax.jit(jax.vmap(lambda r, i=id, o=own: jax.vmap(lambda k: member(k, r, i, o))(keys)))
        found[name] = [np.asarray(x) for x in grid(rates)]

    figure = style.figure(11.2, 3.6)
    first, second, third = (style.axes(figure, 1, 3, i) for i in (1, 2, 3))
    epochs = np.arange(0, steps + 1, every)
    shown = zip(list(found.items())[:4], style.COLOURS[:4], style.DASHES, strict=True)
    for (name, (accuracy, _, _)), colour, line in shown:
        half = np.array([harness.mean_ci(a)[1] for a in accuracy[..., -1]])
        middle = accuracy[..., -1].mean(1)
        style.band(first, RATES, accuracy[..., -1].T, colour=colour, label=name, line=line, low=middle - half,
                   high=middle + half)
        second.plot(epochs[1:], accuracy[3].mean(0)[1:], color=colour, linestyle=line, linewidth=1.8, label=name)
    first.set_xlabel("flip rate e")
    first.set_ylabel("ranking accuracy at the end")
    style.legend(first, loc="lower left")
    second.set_xlabel("update step")
    second.set_ylabel("ranking accuracy")
    style.title(second, "e = 0.3, mean over seeds")
    eta = found["LCPO"][2]
    third.plot([0, 0.4], [1, 0.6], color=style.MUTED, linewidth=1)
    third.annotate("truth, 1 − e", (0.3, 0.7), xytext=(4, 6), textcoords="offset points", fontsize=style.TICK,
                   color=style.MUTED)
    style.band(third, RATES, eta.T, colour=style.COLOURS[3], line=":", label="rate 0.02")
    style.band(third, RATES, found["LCPO, rate 0.1"][2].T, colour=style.INK, label="rate 0.1")
    style.legend(third, loc="lower left")
    third.set_xlabel("flip rate e")
    third.set_ylabel("reliability estimated by LCPO")
    path = style.save(figure, Path(out_folder) / "label_noise.png", dpi=harness.PNG_DPI)
    ends = {name: value[0][..., -1] for name, value in list(found.items())[:4]}

    def ahead(one: str, other: str, rate: int) -> bool:
        mean, half = harness.mean_ci(ends[one][rate] - ends[other][rate])
        return mean - half > 0

    off = np.abs(eta.mean(1) - (1 - np.array(RATES)))
    checks = {
        "LCPO's reliability is within 0.05 of the true one at every rate up to 0.3, in the mean": off[:4].max() < 0.05,
        "LCPO's reliability falls as the flip rate rises": (np.diff(eta.mean(1)) < 0).all(),
        "robust DPO ranks better than DPO at rates of 0.2 and 0.3 (paired 95% intervals exclude 0)":
            ahead("robust DPO, told e", "DPO", 2) and ahead("robust DPO, told e", "DPO", 3),
        "robust DPO ranks better than cDPO at rates of 0.2 and 0.3 (paired)":
            ahead("robust DPO, told e", "cDPO, told e", 2) and ahead("robust DPO, told e", "cDPO, told e", 3),
        "LCPO ranks better than DPO at rates of 0.2 and 0.3 (paired)":
            ahead("LCPO", "DPO", 2) and ahead("LCPO", "DPO", 3),
        "without flips all four agree to 0.01 in the mean": np.ptp([e[0].mean() for e in ends.values()]) < 0.01,
    }
    ours = {f"e = {r:g}: accuracy of DPO, cDPO, robust DPO, LCPO; reliability by LCPO at rates 0.02, 0.1":
            ", ".join(harness.said(e[i], 3) for e in ends.values()) + "; " + harness.said(eta[i], 3)
            + ", " + harness.said(found["LCPO, rate 0.1"][2][i], 3)
            for i, r in enumerate(RATES)}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="robust DPO above DPO and cDPO; LCPO's reliability follows 1 − e (curves)")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
