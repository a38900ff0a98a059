"""Every loss at equal KL on the toy: what a strength and a learning rate hide.

Claim: strengths are not comparable between losses (sums, means, 1/(2 tau)); at one setting a comparison ranks
hyper-parameters. Compared at equal KL from the reference, with the setting chosen on other seeds, most losses lie
close together, and what separates them is what they do to the chosen responses and to entropy.

Published: no single source; comparisons at one strength rank losses far apart.

Here: network 4-128-10 on the toy table's 4 prompts, added to a reference whose log-probs fall evenly over 12 nats, so
that KL 1, 3 and 10 exist; gold reward half noise, half rising where the reference is low; 64 pairs drawn evenly with
Bradley-Terry labels. Every loss of the index that needs no head: 7 strengths (its default times 0.1 to 100) by 2
learning rates by 5 paired seeds, 400 full-batch Adam updates, one program per loss. For each seed the setting with the
best mean over the other four is reported. Controls: SFT on the chosen, best-of-n by the gold reward (exact), the best
policy of all at each KL (exact), DPO on labels turned at random.

Command: python -m experiments.papers.compare_losses

Small models: the ranking is that of a table with one token per response, where token-wise and length-normalised losses
coincide with their plain cousins. It says which differences are in the losses, not how large they are in text.

At scale: the same grid for a chosen few on a preference set, win rate at KL 3 with intervals. Prediction: the spread
between losses at equal KL is smaller than that between strengths of one loss.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy
from experiments.papers import harness, worlds

FACTORS = tuple(float(f) for f in 10.0 ** np.arange(-1, 2.01, 0.5))
RATES = (3e-3, 1e-2)
SEEDS, PAIRS, LEVELS = 5, 64, (1.0, 3.0, 10.0)
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each loss is one program that runs for a third of a second: compiling it well would cost several times that."""

SHUFFLED = "dpo, labels turned at random"
STRENGTHS: Mapping[str, tuple[str, ...]] = {
    "flex_dpo": ("beta_chosen", "beta_rejected"), "slic_hf": ("lam",), "dpop": ("beta",), "cpl": ("alpha",),
    "cpl:kl": ("alpha",), "rdpo_refined": ("beta",), "rrhf": ("rank_weight",), "pro": ("sft_weight",),
}
"""What a strength is where it is not the first of KEYS."""
KEYS = ("beta", "tau", "eta", "gamma", "lam", "alpha", "forget_weight", "kappa")


def strength(name: str) -> tuple[str, ...]:
    """The hyper-parameters that the factor multiplies; empty for a loss without a strength."""
    own = losses.defaults(name)
    return STRENGTHS.get(name) or next(((key,) for key in KEYS if isinstance(own.get(key), float) and own[key]), ())


def place(key: jax.Array) -> worlds.World:
    """A reference whose log-probs fall over 12 nats in random order, and a reward that half rises as it falls."""
    first, second = jax.random.split(key)
    ranks = jax.vmap(lambda k: jax.random.permutation(k, toy.RESPONSES))(jax.random.split(first, toy.PROMPTS))
    share = ranks / (toy.RESPONSES - 1)
    reward = 0.5 * share + 0.5 * jax.random.uniform(second, share.shape)
    return worlds.World(jax.nn.log_softmax(-12.0 * share), reward)


def data(key: jax.Array, here: worlds.World, shuffled: bool = False) -> toy.Pairs:
    """The pairs of a seed: both responses drawn evenly, Bradley-Terry labels on five times the reward."""
    even = jnp.full_like(here.log_ref, -jnp.log(float(toy.RESPONSES)))
    return worlds.draw(jax.random.fold_in(key, 1), here, PAIRS, log_pi=even, scale=5.0, flip=0.5 if shuffled else 0.0)


def member(key: jax.Array, made: tuple, factor: Any, lr: Any, name: str, steps: int, every: int) -> dict[str, Any]:
    """Curves [T] of one run from `made` (world, pairs, parameters): KL, reward, chosen log-prob's change, entropy."""
    here, pairs, params = made
    start = toy.mlp_logits(params)
    loss = losses.get(name)
    log_pi = toy.train(loss, params, pairs, policy=lambda p: here.log_ref + toy.mlp_logits(p) - start, lr=lr, key=key,
                       steps=steps, every=every, log_ref=here.log_ref,
                       hyper={k: loss.hyper[k] * factor for k in strength(name)})[1].log_pi
    return {"kl": toy.kl(log_pi, here.log_ref[None]).mean(-1), "reward": toy.expected(log_pi, here.reward[None]),
            "chosen": (log_pi - log_pi[:1])[:, pairs.prompt, pairs.chosen].mean(-1),
            "entropy": toy.entropy(log_pi).mean(-1)}


@functools.cache
def seeds_made(seeds: int, shuffled: bool) -> tuple[jax.Array, tuple]:
    """(keys, (worlds, pairs, parameters)) of the paired seeds, made once: drawing is slow to compile."""
    def one(key):
        here = place(key)
        return here, data(key, here, shuffled), toy.mlp(jax.random.fold_in(key, 2))

    keys = jax.random.split(jax.random.key(11), seeds)
    return keys, jax.jit(jax.vmap(one))(keys)


def grid(name: str, quick: bool = False, shuffled: bool = False) -> dict[str, np.ndarray]:
    """Curves [factor * rate, seed, T] of one loss; a single compiled program."""
    seeds, steps, every = (2, 20, 5) if quick else (SEEDS, 400, 10)
    factors, rates = (x.ravel() for x in jnp.meshgrid(jnp.array(FACTORS), jnp.array(RATES)))
    keys, made = seeds_made(seeds, shuffled)
    run = jax.vmap(lambda k, m, f, r: member(k, m, f, r, name, steps, every), (0, 0, None, None))
    program = jax.jit(jax.vmap(run, (None, None, 0, 0)), compiler_options=QUICK_COMPILE)
    return {k: np.asarray(v, np.float64) for k, v in program(keys, made, factors, rates).items()}


def held_out(curves: Mapping[str, np.ndarray], level: float) -> dict[str, np.ndarray]:
    """reward, chosen, entropy [seed] at the level of KL, each seed under the setting that is best on the others.

    A setting counts where it reaches the level in every seed; NaN where none does.
    """
    found = {name: harness.at_kl(curves["kl"], curves[name], level) for name in ("reward", "chosen", "entropy")}
    there = np.isfinite(found["reward"]).all(1, keepdims=True)
    reward = np.where(there, found["reward"], 0)
    seeds = reward.shape[1]
    others = np.where(there, (reward.sum(1, keepdims=True) - reward) / max(seeds - 1, 1), -np.inf)
    pick = others.argmax(0)
    some = np.isfinite(others.max(0))
    return {name: np.where(some, value[pick, np.arange(seeds)], np.nan) for name, value in found.items()}


def exact(seeds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(KL, reward) of the best policy and of best-of-n by the gold reward, [seed, points] each."""
    def one(key):
        here = place(key)
        best = worlds.tilted(here.log_ref[None], here.reward[None], jnp.geomspace(0.1, 300.0, 80)[:, None, None])
        order = jnp.argsort(here.reward, axis=1)
        below = jnp.cumsum(jnp.take_along_axis(jnp.exp(here.log_ref), order, 1), 1)
        n = 2.0 ** jnp.arange(0, 18)[:, None, None]
        top = jnp.clip(below, 0, 1)[None] ** n
        share = jnp.maximum(jnp.diff(top, axis=-1, prepend=0.0), 1e-30)
        ranked = jnp.take_along_axis(here.log_ref, order, 1)[None]
        return (toy.kl(best, here.log_ref[None]).mean(-1), toy.expected(best, here.reward[None]),
                (share * (jnp.log(share) - ranked)).sum(-1).mean(-1),
                (share * jnp.take_along_axis(here.reward, order, 1)[None]).sum(-1).mean(-1))

    return tuple(np.asarray(x, np.float64) for x in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(11), seeds)))


SHOWN = ("dpo", "ipo", "kto", "simpo", "orpo", "sft")


def page(curves: Mapping[str, Any], table: Mapping[str, Any], limits: tuple, path: Path) -> Path:
    """One page: frontiers of a few losses, and every loss's reward, chosen displacement and entropy at equal KL."""
    names = sorted(table, key=lambda n: -np.nan_to_num(np.nanmean(table[n][3.0]["reward"]) if np.isfinite(
        table[n][3.0]["reward"]).any() else np.nan, nan=-9))
    figure = style.figure(11.6, 4.4 + 0.155 * len(names))
    layout = figure.add_gridspec(2, 4, height_ratios=(3.6, 0.155 * len(names)))
    left, right = style.axes(figure, layout[0, :2]), style.axes(figure, layout[0, 2:])
    levels = np.linspace(0.1, 10.5, 40)
    bounds = [np.mean([np.interp(levels, k, r) for k, r in zip(*limits[i:i + 2], strict=True)], 0) for i in (0, 2)]
    for axes, shown in ((left, SHOWN), (right, ("dpo", SHUFFLED))):
        axes.plot(levels, bounds[0], color=style.INK, linewidth=1.6)
        axes.annotate("best policy", (levels[14], bounds[0][14]), xytext=(-3, 5), textcoords="offset points",
                      fontsize=style.TICK, ha="right", color=style.INK)
        axes.plot(levels, bounds[1], color=style.MUTED, linewidth=1.4, linestyle=":")
        axes.annotate("best of n", (levels[32], bounds[1][32]), xytext=(4, -5), textcoords="offset points",
                      fontsize=style.TICK, va="top", color=style.MUTED)
        labels = []
        there = [name for name in shown if name in curves]
        for name, colour, line in zip(there, style.COLOURS, (*style.DASHES, "-", "--"), strict=False):
            reward = np.array([np.mean(v) if np.isfinite(v := held_out(curves[name], x)["reward"]).all() else np.nan
                               for x in levels])
            axes.plot(levels, reward, color=colour, linestyle=line, linewidth=1.8)
            known = reward[np.isfinite(reward)]
            if known.size:
                labels.append((name.replace(SHUFFLED, "dpo, shuffled"), colour, float(known[-1])))
        axes.set_xlabel("KL(policy ‖ ref) (nats)")
        axes.set_ylabel("expected gold reward")
        axes.set_ylim(0, 1)
        axes.set_xlim(0, 10.6)
        style.end_labels(axes, labels, size=style.TICK)
    style.title(left, "frontiers, setting chosen on other seeds")
    style.title(right, "control: labels turned at random")
    rows = np.arange(len(names))[::-1]
    columns = (("reward", "gold reward at equal KL", LEVELS), ("chosen", "change of log π(chosen), nats", (3.0,)),
               ("entropy", "entropy at KL 3, nats", (3.0,)))
    for column, (key, label, at) in enumerate(columns):
        axes = style.axes(figure, layout[1, 0:2] if column == 0 else layout[1, column + 1])
        for level, colour, mark in zip(LEVELS, style.COLOURS, "os^", strict=False):
            found = [harness.mean_ci(table[n][level][key]) for n in names]
            if level in at and np.isfinite([m for m, _ in found]).any():
                axes.errorbar([m for m, _ in found], rows, xerr=[h for _, h in found], fmt=mark, color=colour,
                              markersize=3.5, elinewidth=1, label=f"KL {level:g}")
        axes.set_yticks(rows, names if column == 0 else [""] * len(names), fontsize=7.5)
        axes.set_ylim(-1, len(names))
        axes.set_xlabel(label)
        if key == "chosen":
            axes.set_xlim(left=-30)  # a few intervals reach far below
        if column == 0:
            axes.set_xlim(0.2, 0.8)
            style.legend(axes, loc="lower left", fontsize=style.NOTE)
    return style.save(figure, path, dpi=80)


def run(out_folder: str | Path, quick: bool = False, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Figure, compare_losses.json and report; names: losses to compare, `dpo` and `sft` among them (default: all).

    quick: six losses, two seeds, 20 steps.
    """
    folder = Path(out_folder)
    used = SHOWN if quick else tuple(names or toy.usable())
    curves = {name: grid(name, quick) for name in used}
    curves[SHUFFLED] = grid("dpo", quick, shuffled=True)
    table = {name: {level: held_out(found, level) for level in LEVELS} for name, found in curves.items()}
    seeds = curves["dpo"]["kl"].shape[1]
    figures = [page(curves, table, exact(seeds), folder / "compare_losses.png")]
    rows = {name: {f"{key} at KL {level:g}": harness.mean_ci(table[name][level][key]) for level in LEVELS
                   for key in ("reward", "chosen", "entropy")} for name in table}
    (folder / "compare_losses.json").write_text(json.dumps(
        {name: {k: [None if not np.isfinite(x) else round(x, 4) for x in v] for k, v in row.items()}
         for name, row in rows.items()}, indent=1), encoding="utf-8")

    reward = {name: table[name][3.0]["reward"] for name in used}
    reached = {name: float(np.mean(r)) for name, r in reward.items() if np.isfinite(r).all()}
    anywhere = [name for name in used if np.isfinite(table[name][1.0]["reward"]).all()]
    middle = sorted(reached.values())
    at_three = harness.at_kl(curves["dpo"]["kl"], curves["dpo"]["reward"], 3.0)
    fixed = {name: curves[name]["reward"][FACTORS.index(1.0), :, -1].mean() for name in used}  # default, first rate
    near = [n for n, r in reached.items() if np.nanmean(reward[n] - reward["dpo"]) > -0.05]
    checks = {
        "DPO at KL 3 beats DPO on labels turned at random, in every seed that both reach": bool(
            (np.nan_to_num(reward["dpo"] - table[SHUFFLED][3.0]["reward"], nan=1.0) > 0).all()),
        "half of the losses that reach KL 3 are within 0.05 of DPO's reward there, or above":
            2 * len(near) >= len(reached) > 0,
        "rewards at KL 3 spread less over losses (middle 80%) than rewards at default settings do":
            len(middle) > 2 and np.ptp(np.quantile(middle, (0.1, 0.9))) < np.ptp(np.quantile(list(fixed.values()),
                                                                                             (0.1, 0.9))),
    }
    top = sorted(reached, key=reached.get, reverse=True)[:8]
    ours = {"losses run / reaching KL 1 / KL 3 / KL 10": " / ".join(str(n) for n in (
        len(used), len(anywhere), len(reached), sum(np.isfinite(table[n][10.0]["reward"]).all() for n in used))),
        "not run, since a table cannot supply what they need": ", ".join(n for n in losses.names() if toy.why_not(n)),
        **({"left out of this run": ", ".join(n for n in toy.usable() if n not in used)} if names else {}),
        "reward at KL 3, dpo, sft": f"{harness.said(reward['dpo'], 3)}, {harness.said(reward['sft'], 3)}",
        "reward at KL 3, dpo on labels turned at random": harness.said(table[SHUFFLED][3.0]["reward"], 3),
        "highest at KL 3": ", ".join(f"{n} {reached[n]:.3f}" for n in top),
        "DPO's own settings at KL 3, lowest to highest mean": f"{np.nanmin(at_three.mean(1)):.3f} to "
        f"{np.nanmax(at_three.mean(1)):.3f}"}
    return harness.report(figures=figures, seeds=seeds, ours=ours, checks=checks,
                          published="none: a comparison of our own, at equal KL and equal tuning budget")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
