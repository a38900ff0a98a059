"""beta-DPO under mixed-quality pairs (arXiv 2407.08639).

Claim: the best beta depends on the data (larger for noisy or low-quality pairs); a beta set per batch from the gap,
with filtering of outlying pairs, is less sensitive to the starting beta and better where good and bad pairs are mixed.

Published: higher win rates than DPO for every mixture of low-gap and high-gap pairs on HH and TL;DR; figures only.

Here: 8 prompts, 12 responses, 256 pairs drawn from the reference, a share of which is replaced by pairs with random
labels; batches of 32, free table, Adam 0.01, 600 updates; beta 0.03 to 1; 8 seeds, by share and beta in one program
per loss.

Command: python -m experiments.papers.mixed_quality

Small models: the mechanism (batch beta, filter) runs as published; the size of its effect depends on how gaps are
spread in real data.

At scale: mix 30% shuffled labels into a preference set and sweep beta over 0.03 to 1 with `loss=dpo` and `beta_dpo`.
Prediction: the spread of held-out accuracy over the betas is smaller with beta_dpo.
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

BETAS, SHARES = (0.03, 0.1, 0.3, 1.0), (0.0, 0.3, 0.6)
METHODS = {"DPO": "dpo", "beta-DPO": "beta_dpo"}


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 40 steps."""
    seeds, steps = (2, 40) if quick else (harness.SEEDS, 600)

    def member(key, share, beta, id):
        place = worlds.world(key, 8, 12)
        # A share s of random labels is a flip rate of s / 2.
        data = worlds.draw(jax.random.fold_in(key, 1), place, 256, scale=3.0, flip=share / 2)
        log_pi = toy.train(losses.get(id), worlds.zeros(place), data, policy=worlds.anchored(place.log_ref), lr=0.01,
                           steps=steps, every=steps // 4, hyper={"beta": beta}, batch=32, key=key)[1].log_pi[-1]
        return toy.expected(log_pi, place.reward) - toy.expected(place.log_ref, place.reward)

    keys = jax.random.split(jax.random.key(7), seeds)

    def grid(shares, betas, id):
        by_seed = jax.vmap(lambda k, s, b: member(k, s, b, id), (0, None, None))
        return jax.vmap(jax.vmap(by_seed, (None, None, 0)), (None, 0, None))(keys, shares, betas)

    gain = {name: np.asarray(jax.jit(lambda s, b, i=id: grid(s, b, i))(jnp.array(SHARES), jnp.array(BETAS)))
            for name, id in METHODS.items()}
    figure = style.figure(10.4, 3.5)
    for column, share in enumerate(SHARES):
        axes = style.axes(figure, 1, 3, column + 1)
        for (name, values), colour, line in zip(gain.items(), style.COLOURS, style.DASHES, strict=False):
            half = np.array([harness.mean_ci(v)[1] for v in values[column]])
            middle = values[column].mean(1)
            style.band(axes, BETAS, values[column].T, colour=colour, label=name, line=line, low=middle - half,
                       high=middle + half)
        axes.set_xscale("log")
        axes.set_xlabel("β (starting β of beta-DPO)")
        style.title(axes, f"{share:.0%} of the labels random")
        means = np.array([v.mean(-1) for v in gain.values()])
        axes.set_ylim(min(0, means.min()), 1.2 * means.max())
        if column == 0:
            axes.set_ylabel("gain in gold reward (deviations)")
            style.legend(axes, loc="lower left")
    path = style.save(figure, Path(out_folder) / "mixed_quality.png", dpi=harness.PNG_DPI)
    spread = {name: np.ptp(v, axis=1) for name, v in gain.items()}  # over betas, [share, seed]
    best = {name: v.mean(-1).max(1) for name, v in gain.items()}
    narrower = [harness.mean_ci(spread["DPO"][i] - spread["beta-DPO"][i]) for i in range(len(SHARES))]
    mean = {name: v.mean(1) for name, v in gain.items()}
    better = [harness.mean_ci(mean["beta-DPO"][i] - mean["DPO"][i]) for i in range(len(SHARES))]
    checks = {
        "beta-DPO varies less over the betas than DPO at every share (paired 95% interval excludes 0)":
            all(m - h > 0 for m, h in narrower),
        "averaged over the betas beta-DPO gains more than DPO where labels are mixed (30% and 60%, paired)":
            all(m - h > 0 for m, h in better[1:]),
        "DPO's best beta is larger at 60% random labels than at none":
            gain["DPO"][2].mean(-1).argmax() > gain["DPO"][0].mean(-1).argmax(),
    }
    ours = {f"{s:.0%} random: best gain of DPO and beta-DPO; spread over betas":
            f"{best['DPO'][i]:.2f}, {best['beta-DPO'][i]:.2f}; {harness.said(spread['DPO'][i])}, "
            f"{harness.said(spread['beta-DPO'][i])}" for i, s in enumerate(SHARES)}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="beta-DPO ahead of DPO in every mixture (figures)")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
