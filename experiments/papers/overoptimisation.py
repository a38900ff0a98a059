"""Over-optimisation in direct alignment (arXiv 2406.02900).

Claim: without any reward model, DPO, IPO and SLiC over-optimise as RLHF does: quality rises and then falls as the KL
to the reference grows; small beta overshoots early in the run; win rate follows d (a - b log d), d = sqrt(KL), better
than a quadratic; IPO spends less KL than DPO and SLiC on the same grid of strengths.

Published: humps at every model size on TL;DR; the law about halves the quadratic's error; wide budgets are past their
best at 25% of the epoch.

Here: 4 prompts, 32 responses, 64 noisy Bradley-Terry pairs from the reference; 7 betas from 0.01 to 1 for DPO, IPO
(tau = beta/2) and the normalised hinge (gamma = beta); free table, Adam 0.02, 600 updates; exact win rate against the
reference under the gold reward and exact KL; mean over 8 seeds, one program per loss.

Command: python -m experiments.papers.overoptimisation

Small models: few noisy pairs and more responses than pairs give the null space that the paper's proposition names.
Sizes of models cannot be compared on a table.

At scale: sweep beta for `loss=dpo`, `ipo` and `slic_hf` with checkpoints at quarters of the epoch, win rate against
KL. Prediction: the best checkpoint of the smallest beta is not the last.
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

BETAS = tuple(float(b) for b in np.geomspace(0.01, 1.0, 7))
METHODS = {"DPO": ("dpo", lambda b: {"beta": b}), "IPO": ("ipo", lambda b: {"tau": b / 2}),
           "SLiC (normalised hinge)": ("rso:hinge_norm", lambda b: {"gamma": b})}


def win_rate(log_pi: jax.Array, place: worlds.World) -> jax.Array:
    """Probability that a sample of the policy beats one of the reference, ties half, mean over prompts; exact."""
    gap = place.reward[:, :, None] - place.reward[:, None, :]
    beats = (gap > 0) + 0.5 * (gap == 0)
    return jnp.einsum("...pa,pab,pb->...p", jnp.exp(log_pi), beats, jnp.exp(place.log_ref)).mean(-1)


def law(d: np.ndarray, gain: np.ndarray, basis: str) -> tuple[np.ndarray, float]:
    """((a, b), root mean square error) of gain = d (a - b log d) or, for `square`, d (a - b d); d > 0."""
    second = -d * (np.log(d) if basis == "log" else d)
    found, *_ = np.linalg.lstsq(np.stack([d, second], -1), gain, rcond=None)
    return found, float(np.sqrt(np.square(np.stack([d, second], -1) @ found - gain).mean()))


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 40 steps."""
    seeds, steps, every = (2, 40, 4) if quick else (harness.SEEDS, 600, 15)
    keys = jax.random.split(jax.random.key(9), seeds)

    def member(key, beta, id, strength):
        place = worlds.world(key, 4, 32, spread=1.0)
        data = worlds.draw(jax.random.fold_in(key, 1), place, 64, scale=2.0)
        log_pi = toy.train(losses.get(id), worlds.zeros(place), data, policy=worlds.anchored(place.log_ref), lr=0.02,
                           steps=steps, every=every, hyper=strength(beta))[1].log_pi
        return toy.kl(log_pi, place.log_ref[None]).mean(-1), win_rate(log_pi, place)

    found = {}
    for name, (id, strength) in METHODS.items():
        grid = jax.jit(jax.vmap(lambda b, i=id, s=strength: jax.vmap(lambda k: member(k, b, i, s))(keys)))
        found[name] = [np.asarray(x, np.float64).mean(1) for x in grid(jnp.array(BETAS))]  # [beta, T]

    figure = style.figure(11.6, 3.8)
    fits, panels = {}, []
    for column, (name, (kl, rate)) in enumerate(found.items()):
        axes = style.axes(figure, 1, 3, column + 1)
        panels.append(axes)
        d, gain = np.sqrt(kl[:, 1:]), rate[:, 1:] - rate[:, :1]
        fits[name] = {basis: law(d.ravel(), gain.ravel(), basis) for basis in ("log", "square")}
        shades = style.shades(len(BETAS))
        for index in range(len(BETAS)):
            axes.plot(np.sqrt(np.maximum(kl[index], 0)), rate[index], color=shades[index], linewidth=1.4, marker=".",
                      markersize=3)
        line = np.linspace(1e-3, d.max(), 200)
        for basis, dash in (("log", "--"), ("square", ":")):
            a, b = fits[name][basis][0]
            axes.plot(line, rate[0, 0] + line * (a - b * (np.log(line) if basis == "log" else line)), linestyle=dash,
                      color=style.COLOURS[1], linewidth=1.6,
                      label="d (a − b log d)" if basis == "log" else "d (a − b d)")
        style.title(axes, name)
        axes.set_xlabel("d = √KL(policy ‖ ref), nats")
        if column == 0:
            axes.set_ylabel("win rate against the reference")
            style.legend(axes, loc="lower right")
    top = max(rate.max() for _, rate in found.values())
    for axes in panels:
        axes.set_ylim(0.48, top + 0.03)
    style.colour_scale(figure, panels, np.log10(BETAS[0]), np.log10(BETAS[-1]), "log10 β")
    path = style.save(figure, Path(out_folder) / "overoptimisation.png", dpi=harness.PNG_DPI)
    drop = {name: rate.max() - rate[0, -1] for name, (_, rate) in found.items()}
    ends = {name: kl[:, -1] for name, (kl, _) in found.items()}
    best_at = {name: rate[0].argmax() / (rate.shape[1] - 1) for name, (_, rate) in found.items()}
    checks = {
        "the smallest beta ends below the best win rate of the grid by over 0.02, for every loss":
            min(drop.values()) > 0.02,
        "with the smallest beta the best checkpoint comes in the first half of the run, for every loss":
            max(best_at.values()) < 0.5,
        "the best win rate lies at an intermediate KL, for every loss":
            all(kl.ravel()[rate.argmax()] < 0.9 * kl.max() for kl, rate in found.values()),
        "the law with log d fits better than the quadratic, for every loss":
            all(f["log"][1] < f["square"][1] for f in fits.values()),
        "IPO's mean final KL over the grid is below DPO's and SLiC's":
            ends["IPO"].mean() == min(e.mean() for e in ends.values()),
    }
    what = "best win rate, at the end of the smallest beta; error of the law, of the quadratic; mean final KL"
    ours = {f"{name}: {what}":
            f"{rate.max():.3f}, {rate[0, -1]:.3f}; {fits[name]['log'][1]:.4f}, {fits[name]['square'][1]:.4f}; "
            f"{ends[name].mean():.1f}" for name, (_, rate) in found.items()}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="humps for all three losses; error of the law about half the quadratic's")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
