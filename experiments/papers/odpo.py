"""ODPO with few pairs (arXiv 2402.10571).

Claim: an offset that grows with the difference of the scores makes DPO use how much better the chosen is; the gain over
DPO is largest where there are few pairs.

Published: on sentiment, toxicity and TL;DR the frontier of reward against KL lies above DPO's, most with few pairs;
figures only.

Here: 4 prompts, 12 responses, 8 to 128 pairs drawn from the reference with the better one chosen and the gold scores
given; free table, beta 0.5, alpha 1, Adam 0.02, 400 updates; gold reward at a KL of 0.5 nats on each run's own path, 24
paired seeds.

Command: python -m experiments.papers.odpo

Small models: the offset's information shows; a free table generalises to no unseen response, a network does.

At scale: `loss=odpo` against `loss=dpo` on 1% and on all of a scored preference set. Prediction: the difference in
reward at equal KL is larger at 1%.
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

COUNTS, KL = (8, 16, 32, 64, 128), 0.5
METHODS = {"DPO": "dpo", "ODPO": "odpo"}


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 300 steps."""
    seeds, steps, every = (2, 300, 10) if quick else (24, 400, 5)
    keys = jax.random.split(jax.random.key(8), seeds)

    def member(key, count, id):
        place = worlds.world(key, 4, 12)
        data = worlds.draw(jax.random.fold_in(key, 1), place, COUNTS[-1], scale=jnp.inf)
        used = jnp.arange(COUNTS[-1]) < count  # one program for all sizes: the first pairs have weight 1, the rest 0
        log_pi = toy.train(losses.get(id, beta=0.5), worlds.zeros(place), data, policy=worlds.anchored(place.log_ref),
                           lr=0.02, steps=steps, every=every, weights=used.astype(jnp.float32))[1].log_pi
        return toy.kl(log_pi, place.log_ref[None]).mean(-1), toy.expected(log_pi, place.reward[None])

    found = {}
    for name, id in METHODS.items():
        grid = jax.jit(jax.vmap(lambda n, i=id: jax.vmap(lambda k: member(k, n, i))(keys)))
        found[name] = [np.asarray(x, np.float64) for x in grid(jnp.array(COUNTS))]
    at = {name: harness.at_kl(kl, reward, KL) for name, (kl, reward) in found.items()}
    figure = style.figure(8.8, 3.6)
    first, second = style.axes(figure, 1, 2, 1), style.axes(figure, 1, 2, 2)
    for (name, (kl, reward)), colour, line in zip(found.items(), style.COLOURS, style.DASHES, strict=False):
        for index, alpha in ((0, 0.55), (len(COUNTS) - 1, 1.0)):
            first.plot(kl[index].mean(0), reward[index].mean(0), color=colour, linestyle=line, alpha=alpha,
                       linewidth=1.8, label=f"{name}, {COUNTS[index]} pairs")
    first.set_xlabel("KL(policy ‖ ref) (nats)")
    first.set_ylabel("expected gold reward")
    style.legend(first)
    difference = at["ODPO"] - at["DPO"]
    summary = [harness.mean_ci(d) for d in difference]
    second.errorbar(COUNTS, [m for m, _ in summary], yerr=[h for _, h in summary], fmt="o-", color=style.COLOURS[0],
                    capsize=3)
    second.axhline(0, color=style.MUTED, linewidth=0.8)
    second.set_xscale("log", base=2)
    second.set_xticks(COUNTS, [str(n) for n in COUNTS])
    second.set_xlabel("preference pairs")
    second.set_ylabel(f"ODPO − DPO, reward at KL {KL:g}\n(paired, 95% interval)")
    path = style.save(figure, Path(out_folder) / "odpo.png", dpi=harness.PNG_DPI)
    checks = {
        "ODPO's reward at the same KL is above DPO's at 8, 16 and 32 pairs (paired 95% intervals exclude 0)":
            all(m - h > 0 for m, h in summary[:3]),
        "the gain is larger at 8 pairs than at 128": summary[0][0] > summary[-1][0],
        "ODPO is nowhere below DPO beyond the interval": all(m + h >= 0 for m, h in summary),
    }
    ours = {f"{n} pairs: reward at KL {KL:g}, DPO and ODPO; difference":
            f"{harness.said(at['DPO'][i])}, {harness.said(at['ODPO'][i])}; {harness.said(difference[i], 3)}"
            for i, n in enumerate(COUNTS)}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="ODPO's frontier above DPO's, most with few pairs (figures)")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
