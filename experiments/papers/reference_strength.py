"""Strength of the reference in DPO (arXiv 2407.13709).

Claim: a smaller beta helps until the policy collapses; the reference is worth having (the reference-free reward is
worse); a stronger reference helps only where it is compatible with the policy.

Published: length-controlled win rates over beta 0.1 to 0.005 for one model 14.03, 13.29, 16.06, 16.25, 12.36; reward
without reference 12.84 against 16.25; a compatible stronger reference up to 20.25, an incompatible one lower or
degenerate.

Here: 8 prompts, 16 responses; the policy starts at a reference with little knowledge of the gold reward; 128 noisy
pairs from it; references: the start, none, the start tilted towards the gold reward (compatible), a table from other
logits with the same tilt (incompatible); beta 0.03 to 3, free table, Adam 0.02, 500 updates, 8 seeds in one program.

Command: python -m experiments.papers.reference_strength

Small models: the effect of the reference on the optimum shows. Degeneration of text does not.

At scale: DPO from one SFT model with its own reference, with a stronger model of the same family and with one of
another family. Prediction: gain for the first, none for the second.
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

BETAS = (0.03, 0.1, 0.3, 1.0, 3.0)
TILT = 1.0
REFERENCES = ("the start", "none", "stronger, compatible", "stronger, incompatible")


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 40 steps."""
    seeds, steps, every = (2, 40, 20) if quick else (harness.SEEDS, 500, 100)
    keys = jax.random.split(jax.random.key(10), seeds)
    loss = losses.get("dpo")

    def member(key, beta):
        place = worlds.world(key, 8, 16, spread=1.5, agreement=0.2)
        data = worlds.draw(jax.random.fold_in(key, 1), place, 128, scale=1.0)
        # The other family: its own likes and dislikes on the same responses.
        other = jax.nn.log_softmax(4.0 * jax.random.normal(jax.random.fold_in(key, 2), place.log_ref.shape))
        choices = jnp.stack([place.log_ref, jnp.zeros_like(place.log_ref),
                             *(worlds.tilted(logits, place.reward, TILT) for logits in (place.log_ref, other))])

        def one(log_ref):
            return toy.train(loss, worlds.zeros(place), data, policy=worlds.anchored(place.log_ref), log_ref=log_ref,
                             lr=0.02, steps=steps, every=every, hyper={"beta": beta})[1].log_pi[-1]

        log_pi = jax.vmap(one)(choices)
        return (toy.expected(log_pi, place.reward[None]), toy.entropy(log_pi).mean(-1),
                toy.expected(choices[2:], place.reward[None]), toy.expected(place.log_ref, place.reward))

    reward, entropy, strong, start = (np.asarray(x) for x in jax.jit(jax.vmap(
        lambda b: jax.vmap(lambda k: member(k, b))(keys)))(jnp.array(BETAS)))
    figure = style.figure(9.4, 3.7)
    first, second = style.axes(figure, 1, 2, 1), style.axes(figure, 1, 2, 2)
    for axes, values in ((first, reward), (second, entropy)):
        for index, (name, colour, line) in enumerate(zip(REFERENCES, style.COLOURS, style.DASHES, strict=False)):
            half = np.array([harness.mean_ci(v)[1] for v in values[..., index]])
            middle = values[..., index].mean(1)
            style.band(axes, BETAS, values[..., index].T, colour=colour, label=name, line=line, low=middle - half,
                       high=middle + half)
        axes.set_xscale("log")
        axes.set_xlabel("β")
    first.axhline(start.mean(), color=style.MUTED, linewidth=0.8)
    first.annotate("before training", (BETAS[0], start.mean()), xytext=(0, 3), textcoords="offset points",
                   fontsize=style.NOTE, color=style.MUTED)
    first.set_ylabel("expected gold reward (deviations)")
    second.set_ylabel("entropy (nats)")
    style.legend(second, title="reference")
    path = style.save(figure, Path(out_folder) / "reference_strength.png", dpi=harness.PNG_DPI)
    # Each reference at its own best beta, compared seed by seed.
    best = {name: reward[reward[..., i].mean(1).argmax(), :, i] for i, name in enumerate(REFERENCES)}
    own = reward[..., 0]

    def above(one: np.ndarray, other: np.ndarray) -> bool:
        mean, half = harness.mean_ci(one - other)
        return mean - half > 0

    checks = {
        "with its own reference an intermediate beta beats the smallest and the largest (paired 95% intervals)":
            above(best["the start"], own[0]) and above(best["the start"], own[-1]),
        "the own reference beats none, each at its best beta (paired)": above(best["the start"], best["none"]),
        "the compatible stronger reference beats the own one, each at its best beta (paired)":
            above(best["stronger, compatible"], best["the start"]),
        "the incompatible one does not": not above(best["stronger, incompatible"], best["the start"]),
        "both stronger references score above the start themselves": strong.mean((0, 1)).min() > start.mean(),
    }
    ours = {f"reference {name}: reward over beta {', '.join(f'{b:g}' for b in BETAS)}":
            ", ".join(harness.said(v) for v in reward[..., i]) for i, name in enumerate(REFERENCES)}
    ours["rewards of the start and of the two stronger references"] = ", ".join(
        f"{v:.2f}" for v in (start.mean(), *strong.mean((0, 1))))
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="16.25 with, 12.84 without a reference; up to 20.25 with a compatible stronger one")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
