"""On-policy samples and negative gradients on a bandit (arXiv 2404.14367).

Claim: where the best action lies in a region that the reference hardly visits, cloning the best of the reference's
samples stalls near the reference; a negative gradient (DPO, IPO) or fresh on-policy samples carry the policy there.
Where the best action is near the reference's mode, both kinds work.

Published: 100 actions, reference a Cauchy with its mode near action 15, reward peaks at 70 (R1, low density) and 20
(R2); curves only: on R1 offline best-of-N cloning stays near the reference, the others reach the peak.

Here: the same bandit, one state, a network 1-64-100 fitted to the reference, 32 groups of N = 10 samples, best of each
group as chosen, another of it at random as rejected; Adam 3e-3, 400 updates; on-policy variants draw 32 groups per
update. 8 seeds in one program per method.

Command: python -m experiments.papers.on_policy_bandit

Small models: the bandit is the paper's own. What stays open at scale is the cost of the samples.

At scale: best-of-8 cloning against DPO (best against worst of the same 8), offline and with samples made anew at every
round. Prediction: the gap between cloning and DPO is larger the rarer the good responses are under the reference.
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

ACTIONS, SAMPLES, GROUPS = 100, 10, 32
PEAKS = {"R1, peak in a low-density region": 70, "R2, peak near the reference's mode": 20}
METHODS = {"best-of-N cloning, offline": ("sft", {}, False), "DPO, offline": ("dpo", {"beta": 0.1}, False),
           "IPO, offline": ("ipo", {"tau": 0.05}, False), "best-of-N cloning, on-policy": ("sft", {}, True),
           "DPO, on-policy": ("dpo", {"beta": 0.1}, True)}


def reference() -> np.ndarray:
    """A Cauchy density (location -0.7, scale 0.4) on [-1, 1] in 100 bins, normalised."""
    place = (np.arange(ACTIONS) + 0.5) / ACTIONS * 2 - 1
    density = 1 / (1 + ((place + 0.7) / 0.4) ** 2)
    return density / density.sum()


def groups(key: jax.Array, log_pi: jax.Array, reward: jax.Array) -> toy.Pairs:
    """Pairs (best of N samples, another of the same group with less reward where there is one); log_pi [1, A]."""
    first, second = jax.random.split(key)
    drawn = jax.random.categorical(first, log_pi[0], shape=(GROUPS, SAMPLES))
    scores = reward[drawn]
    best = scores.argmax(1)
    worse = jnp.where(scores < scores.max(1, keepdims=True), 0.0, -jnp.inf)
    other = jax.random.categorical(second, jnp.where(jnp.isneginf(worse).all(1, keepdims=True), 0.0, worse))
    rows = jnp.arange(GROUPS)
    return toy.Pairs(jnp.zeros(GROUPS, jnp.int32), drawn[rows, best], drawn[rows, other],
                     jnp.stack([scores[rows, best], scores[rows, other]], -1))


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 40 steps."""
    seeds, steps, every = (2, 40, 4) if quick else (harness.SEEDS, 400, 10)
    table = jnp.asarray(reference(), jnp.float32)
    rewards = jnp.stack([jnp.exp(-jnp.square((jnp.arange(ACTIONS) - peak) / 10.0)) for peak in PEAKS.values()])
    keys = jax.random.split(jax.random.key(5), seeds)
    params = jax.jit(jax.vmap(lambda k: toy.fit(toy.mlp(k, (1, 64, ACTIONS)), table, steps=400, lr=1e-2)))(keys)

    def member(key, params, reward, loss, fresh):
        data = groups(key, jnp.log(table)[None], reward)
        made = (lambda k, log_pi: groups(k, log_pi, reward)) if fresh else None
        return toy.train(loss, params, data, steps=steps, every=every, lr=3e-3, key=key, pairs_of=made)[1].log_pi[:, 0]

    runs = {}
    for name, (id, hyper, fresh) in METHODS.items():
        loss = losses.get(id, **hyper)
        one = jax.vmap(lambda k, p, r, loss=loss, f=fresh: member(k, p, r, loss, f), (0, 0, None))
        runs[name] = np.asarray(jax.jit(jax.vmap(one, (None, None, 0)))(keys, params, rewards), np.float64)
    gained = {name: (np.exp(x) * np.asarray(rewards)[:, None, None]).sum(-1) for name, x in runs.items()}

    figure = style.figure(11.0, 5.6)
    epochs, lines = np.arange(0, steps + 1, every), ("-", "-", "-", "--", "--")
    colours = (style.COLOURS[1], style.COLOURS[0], style.COLOURS[2], style.COLOURS[1], style.COLOURS[0])
    for row, (name, peak) in enumerate(PEAKS.items()):
        left, right = style.axes(figure, 2, 2, 2 * row + 1), style.axes(figure, 2, 2, 2 * row + 2)
        for (method, values), colour, line in zip(gained.items(), colours, lines, strict=True):
            style.band(left, epochs, values[row], colour=colour, label=method, line=line)
            right.plot(np.exp(runs[method][row, :, -1]).mean(0), color=colour, linestyle=line, linewidth=1.5)
        right.plot(reference(), color=style.INK, linewidth=1.5)
        right.annotate("reference", (15, reference()[15]), xytext=(0, 6), textcoords="offset points",
                       fontsize=style.TICK, color=style.INK)
        right.axvline(peak, color=style.MUTED, linestyle=":", linewidth=1.2)
        right.set_yscale("log")
        right.set_ylim(1e-5, 2)
        left.set_ylim(0, 1.02)
        left.set_ylabel("expected reward")
        right.set_ylabel("probability at the end")
        style.title(left, name)
        style.title(right, "policies at the end (dotted: best action)")
        if row == 1:  # the panel with room
            style.legend(left, fontsize=style.NOTE, loc="center right")
    left.set_xlabel("update step")
    right.set_xlabel("action")
    path = style.save(figure, Path(out_folder) / "on_policy_bandit.png", dpi=harness.PNG_DPI)
    ends = {name: values[:, :, -1] for name, values in gained.items()}
    starts = {name: values[:, :, 0] for name, values in gained.items()}
    cloning, dpo = ends["best-of-N cloning, offline"], ends["DPO, offline"]
    checks = {
        "R2: offline cloning and offline DPO both at least double the reward, in every seed":
            all((ends[m][1] > 2 * starts[m][1]).all() for m in ("best-of-N cloning, offline", "DPO, offline")),
        "R1: offline DPO ends above offline cloning in every seed": (dpo[0] > cloning[0]).all(),
        "R1: offline IPO ends above offline cloning in every seed": (ends["IPO, offline"][0] > cloning[0]).all(),
        "R1: on-policy cloning ends above offline cloning in every seed":
            (ends["best-of-N cloning, on-policy"][0] > cloning[0]).all(),
        "R1: on-policy DPO reaches 0.8 in the mean": ends["DPO, on-policy"][0].mean() > 0.8,
        "R1: offline cloning stalls below 0.5 in the mean": cloning[0].mean() < 0.5,
    }
    ours = {f"{m}: reward on R1, R2": f"{harness.said(v[0])}, {harness.said(v[1])}" for m, v in ends.items()}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="R1: offline cloning stays near the reference, the others reach the peak (curves)")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
