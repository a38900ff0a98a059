"""TDPO's control of the sequential KL against DPO (arXiv 2404.11999, ICML 2024).

Claim: under DPO the sequential KL(ref||policy) grows faster on rejected than on chosen completions; taking the
difference of the two into the margin (TDPO1), or the rejected one alone with gradient (TDPO2), holds both and keeps
them balanced, at a better frontier of reward against KL.

Published: GPT-2 large on IMDb: curves of the sequential KL on preferred and dispreferred completions and of the
distance between them, lowest for TDPO2; frontiers ordered TDPO2, TDPO1, DPO. Figures only.

Here: a decoder of the library (2 layers, width 32) fitted to made-up reviews; 256 pairs of its own samples of ten
words, Bradley-Terry labels by praise minus blame; DPO, TDPO1 and TDPO2 (alpha 0.5) at beta 0.1, Adam 5e-4, 200 updates
of 32 pairs; exact KL over the vocabulary at every token, reward and KL(policy||ref) on 128 fresh samples. 4 seeds.

Command: python -m experiments.papers.tdpo_kl

Small models: which KL each loss lets grow is in its gradient and shows. Other than published, the two sides are closest
under TDPO1, which rewards a KL on the chosen, and the frontiers coincide until TDPO2 stops gaining; 256 pairs seen 25
times are a harder case of over-fitting than the paper's. How much reward a KL buys is the language's.

At scale: `alignax train --config experiments/dpo.py:loss=tdpo` and `loss=dpo` at one beta and learning rate.
Prediction: KL at the data's prefixes of the rejected ends lower with tdpo, by more than that of the chosen, at equal
updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style
from experiments.papers import harness, texts

CONFIG = texts.decoder(texts.EXTRA)
PROMPT, LENGTH, FRESH = 3, 10, 128
METHODS = {"DPO": "dpo", "TDPO1": "tdpo:tdpo1", "TDPO2": "tdpo"}
BETA, LEVEL = 0.1, 2.0


def reviews(key: jax.Array, count: int, length: int) -> jax.Array:
    """[N, 1 + length]: START and words of one mood."""
    first, second = jax.random.split(key)
    mood = jax.random.bernoulli(first, 0.5, (count,)).astype(jnp.int32)
    return jnp.concatenate([jnp.full((count, 1), texts.START), texts.words(second, mood, length)], 1).astype(jnp.int32)


def base(key: jax.Array, steps: int) -> Any:
    """Parameters fitted to reviews."""
    rows = reviews(jax.random.fold_in(key, 1), 4096, PROMPT + LENGTH)
    return texts.fit(CONFIG, key, rows, jnp.ones_like(rows, bool), steps=steps)


def sampled(key: jax.Array, params: Any, count: int) -> texts.Pairs:
    """Pairs of the policy's own completions; the one with more praise wins with probability sigmoid(difference)."""
    keys = jax.random.split(key, 4)
    prompts = reviews(keys[0], count, PROMPT)
    both = jax.lax.map(lambda k: texts.sample(CONFIG, params, k, prompts, LENGTH), keys[1:3])
    tokens, mask = (jnp.moveaxis(x, 0, 1) for x in both)
    reward = (texts.polarity(tokens) * mask).sum(-1)
    wins = jax.random.bernoulli(keys[3], jax.nn.sigmoid(reward[:, 0] - reward[:, 1]))
    order = jnp.where(wins[:, None], jnp.array([[0, 1]]), jnp.array([[1, 0]]))[..., None]
    return texts.Pairs(*(jnp.take_along_axis(x, order, 1) for x in (tokens, mask)))


def sequential_kl(log_pi: jax.Array, ref_log: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum over a completion's tokens of KL(ref || policy), [...], of log policies [..., T - 1, V] and mask [..., T]."""
    return jnp.where(mask[..., 1:], (jnp.exp(ref_log) * (ref_log - log_pi)).sum(-1), 0).sum(-1)


def member(key: jax.Array, start: Any, steps: int, every: int, count: int) -> dict[str, jax.Array]:
    """Curves [METHODS, T]: sequential KL on chosen and rejected, reward and KL(policy || ref) on fresh samples."""
    data = sampled(jax.random.fold_in(key, 2), start, count)
    ref_log = texts.log_policy(CONFIG, start, data.tokens)
    fresh = reviews(jax.random.fold_in(key, 3), FRESH, PROMPT)

    def look(params):
        found = sequential_kl(texts.log_policy(CONFIG, params, data.tokens), ref_log, data.mask).mean(0)
        tokens, mask = texts.sample(CONFIG, params, jax.random.fold_in(key, 4), fresh, LENGTH)
        one, ref = texts.log_policy(CONFIG, params, tokens), texts.log_policy(CONFIG, start, tokens)
        spent = jnp.where(mask[:, 1:], (jnp.exp(one) * (one - ref)).sum(-1), 0).sum(-1).mean()
        return {"chosen": found[0], "rejected": found[1], "spent": spent,
                "reward": (texts.polarity(tokens) * mask).sum(-1).mean()}

    methods = [losses.get(id, beta=BETA) for id in METHODS.values()]
    return jax.lax.map(lambda which: texts.train(
        methods, CONFIG, start, data, look=look, steps=steps, every=every, lr=5e-4, batch=min(32, count),
        key=jax.random.fold_in(key, 5), which=which)[1], jnp.arange(len(METHODS)))


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: one seed, few steps."""
    seeds, fitted, steps, every, count = (1, 20, 8, 4, 16) if quick else (4, 500, 200, 10, 256)
    keys = jax.random.split(jax.random.key(23), seeds)
    curves = harness.each(lambda key: member(key, base(key, fitted), steps, every, count), keys)
    found = {name: {kind: x[:, i].astype(np.float64) for kind, x in curves.items()} for i, name in enumerate(METHODS)}
    gap = {name: np.abs(x["rejected"] - x["chosen"]) for name, x in found.items()}
    level = min(LEVEL, 0.9 * min(x["spent"][:, -1].min() for x in found.values()))
    at = {name: harness.at_kl(x["spent"], x["reward"], level) for name, x in found.items()}
    path = _figure(found, gap, steps, every, Path(out_folder))
    end = {name: {side: x[side][:, -1] for side in ("chosen", "rejected", "reward", "spent")}
           for name, x in found.items()}
    better = harness.mean_ci(at["TDPO2"] - at["DPO"])
    checks = {
        "DPO's sequential KL ends larger on the rejected than on the chosen, in every seed":
            (end["DPO"]["rejected"] > end["DPO"]["chosen"]).all(),
        "TDPO2's on the rejected ends below DPO's, in every seed":
            (end["TDPO2"]["rejected"] < end["DPO"]["rejected"]).all(),
        "TDPO2's on the chosen ends below DPO's, in every seed":
            (end["TDPO2"]["chosen"] < end["DPO"]["chosen"]).all(),
        "TDPO2's distance between the two ends below DPO's, in every seed":
            (gap["TDPO2"][:, -1] < gap["DPO"][:, -1]).all(),
        "TDPO2's on the rejected ends below TDPO1's, in every seed":
            (end["TDPO2"]["rejected"] < end["TDPO1"]["rejected"]).all(),
        "TDPO2's distance between the two ends below TDPO1's, in every seed":
            (gap["TDPO2"][:, -1] < gap["TDPO1"][:, -1]).all(),
        "at equal KL(policy||ref) TDPO2 has more reward than DPO (paired 95% interval excludes 0)":
            better[0] - better[1] > 0,
    }
    ours = {f"{name}: sequential KL of chosen, rejected; their distance":
            f"{harness.said(end[name]['chosen'])}, {harness.said(end[name]['rejected'])}; "
            f"{harness.said(gap[name][:, -1])}" for name in METHODS}
    ours |= {f"{name}: reward and KL(policy||ref) at the end; reward at KL {level:.1f}":
             f"{harness.said(end[name]['reward'])}, {harness.said(end[name]['spent'])}; {harness.said(at[name])}"
             for name in METHODS}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="sequential KL on both sides and its distance lowest for TDPO2 (figures)")


def _figure(found: dict, gap: dict, steps: int, every: int, folder: Path) -> Path:
    """The two sequential KLs, their distance, and the frontier."""
    figure = style.figure(10.5, 6.8)
    panels = [style.axes(figure, 2, 2, i) for i in (1, 2, 3, 4)]
    updates = np.arange(0, steps + 1, every)
    for (name, x), colour, line in zip(found.items(), style.COLOURS, style.DASHES, strict=False):
        for axes, values in zip(panels, (x["chosen"], x["rejected"], gap[name]), strict=False):
            style.band(axes, updates, values, colour=colour, label=name, line=line)
        panels[3].plot(x["spent"].mean(0), x["reward"].mean(0), color=colour, linestyle=line, linewidth=1.8, marker=".",
                       label=name)
    top = max(axes.get_ylim()[1] for axes in panels[:2])
    for axes, text in zip(panels, ("on chosen completions", "on rejected completions",
                                   "distance between the two (a scale of its own)"), strict=False):
        axes.set_ylim(0, top if axes is not panels[2] else None)
        axes.set_xlabel("update")
        axes.set_ylabel("sequential KL(ref ‖ policy), nats")
        style.title(axes, text)
    panels[3].set_xlabel("KL(policy ‖ ref) of fresh samples, nats")
    panels[3].set_ylabel("reward: praise minus blame, words")
    style.title(panels[3], "frontier over training, mean of the seeds")
    for axes in (panels[0], panels[3]):
        style.legend(axes)
    return style.save(figure, folder / "tdpo_kl.png", dpi=harness.PNG_DPI)


if __name__ == "__main__":
    harness.command_line(run, __doc__)
