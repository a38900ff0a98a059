"""SimPO's length behaviour: what length normalisation is for (arXiv 2405.14734, NeurIPS 2024).

Claim: with the sum of log-probs as the reward, a winner that is longer starts far behind and is pushed hardest: the
model comes to favour long completions and does not learn pairs whose winner is the shorter. Dividing by the length
removes it; DPO's reference takes off a part.

Published: Spearman correlation of mean log-prob and length on held-out completions 0.34 with SimPO, 0.59 with DPO, 0.82
with SimPO without normalisation; on Mistral-Base that ablation lengthens AlpacaEval answers from 1868 to 2345
and takes the length-controlled win rate from 21.5 to 11.9 %.

Here: a decoder of the library (2 layers, width 32) fitted to made-up reviews that end at a rate of 1 in 6 words; 256
pairs of its own samples, the winner by mean praise minus blame per word (Bradley-Terry, scale 4), whatever the length.
SimPO (beta 2, gamma 0.5), the same without normalisation (beta divided by the mean length), DPO (beta 0.1); Adam 5e-4,
200 updates of 32 pairs; 256 held-out pairs of samples of the start. 4 seeds.

Command: python -m experiments.papers.simpo_length

Small models: the pull towards length is in the loss and shows, as does the order of the correlations; their level is
that of the language (-0.75 at the start, as END is the least likely token of a short review). Other than published, the
pairs that the ablation ranks wrong are those with a longer winner: its push does not outweigh that a sum of log-probs
favours the shorter.

At scale: `alignax train --config experiments/dpo.py:loss=simpo` and `loss=cpo --config.loss.lam=0` (no normalisation)
with the diagnostic of length correlation. Prediction: mean length of samples grows only with the latter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style
from experiments.papers import harness, texts

CONFIG = texts.decoder(texts.EXTRA)
PROMPT, LENGTH, RATE, FRESH = 2, 18, 1 / 6, 256
METHODS = ("SimPO", "without normalisation", "DPO")


def reviews(key: jax.Array, count: int, length: int) -> tuple[jax.Array, jax.Array]:
    """(tokens [N, 1 + PROMPT + length], mask): START, at least PROMPT + 1 words, END at RATE after each of the rest."""
    keys = jax.random.split(key, 3)
    mood = jax.random.bernoulli(keys[0], 0.5, (count,)).astype(jnp.int32)
    words = texts.words(keys[1], mood, PROMPT + length)
    ends = jax.random.bernoulli(keys[2], RATE, words.shape).at[:, :PROMPT + 1].set(False)
    over = jnp.cumsum(ends, 1)
    words = jnp.where(over > 0, texts.END, words)
    mask = jnp.concatenate([jnp.ones((count, 1), bool), over - ends == 0], 1)  # the first END is part of it
    return jnp.concatenate([jnp.full((count, 1), texts.START), words], 1).astype(jnp.int32), mask


def base(key: jax.Array, steps: int) -> Any:
    """Parameters fitted to reviews."""
    return texts.fit(CONFIG, key, *reviews(jax.random.fold_in(key, 1), 4096, LENGTH), steps=steps)


def quality(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean praise minus blame over a completion's words (END counts as one of no praise)."""
    return (texts.polarity(tokens) * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def sampled(key: jax.Array, params: Any, count: int) -> texts.Pairs:
    """Pairs of the policy's own completions with Bradley-Terry labels on 4 times their quality."""
    keys = jax.random.split(key, 4)
    prompts = reviews(keys[0], count, 1)[0][:, :1 + PROMPT]
    both = [texts.sample(CONFIG, params, k, prompts, LENGTH) for k in keys[1:3]]
    tokens, mask = (jnp.stack(x, 1) for x in zip(*both, strict=True))
    worth = 4 * quality(tokens, mask)
    wins = jax.random.bernoulli(keys[3], jax.nn.sigmoid(worth[:, 0] - worth[:, 1]))
    order = jnp.where(wins[:, None], jnp.array([[0, 1]]), jnp.array([[1, 0]]))[..., None]
    return texts.Pairs(*(jnp.take_along_axis(x, order, 1) for x in (tokens, mask)))


def member(key: jax.Array, start: Any, name: str, steps: int, every: int, count: int) -> dict[str, jax.Array]:
    """At every record: log-probs and lengths of the held-out pairs [T, N, 2], and of fresh samples the mean length and
    quality [T]; under `ref` the held-out log-probs of the start."""
    data, held = (sampled(jax.random.fold_in(key, k), start, count) for k in (2, 3))
    prompts = reviews(jax.random.fold_in(key, 4), FRESH, 1)[0][:, :1 + PROMPT]
    mean_length = data.mask.sum(-1).mean()
    loss, hyper = losses.get("dpo" if name == "DPO" else "simpo"), {}
    if name == "without normalisation":  # as if every completion had the mean length
        simpo, hyper = loss.fn, {"beta": 2.0 / mean_length}
        loss = dataclasses.replace(loss, fn=lambda logps, lengths, **h: simpo(logps, jnp.ones_like(lengths), **h))

    def look(params):
        tokens, mask = texts.sample(CONFIG, params, jax.random.fold_in(key, 5), prompts, LENGTH)
        return {"logps": texts.sums(CONFIG, params, held), "length": mask.sum(-1).mean(),
                "quality": quality(tokens, mask).mean()}

    seen = texts.train(loss, CONFIG, start, data, look=look, steps=steps, every=every, lr=5e-4, hyper=hyper,
                       batch=min(32, count), key=jax.random.fold_in(key, 6))[1]
    return {**seen, "lengths": held.mask.sum(-1)}


def correlation(logps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Spearman correlation [S, T] of mean log-prob and length; logps [S, T, N, 2], lengths [S, N, 2]."""
    from scipy import stats

    return np.array([[stats.spearmanr((x / n).reshape(-1), n.reshape(-1))[0] for x in run]
                     for run, n in zip(logps, lengths, strict=True)])


def accuracy(found: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Share [S] of held-out pairs whose winner has the larger training reward at the end, by which one is longer."""
    logps, lengths = found["logps"][:, -1], found["lengths"]
    reward = {"SimPO": logps / lengths, "DPO": logps - found["logps"][:, 0]}.get(name, logps)
    right = reward[..., 0] > reward[..., 1]
    kinds = {"shorter": lengths[..., 0] < lengths[..., 1], "longer": lengths[..., 0] > lengths[..., 1]}
    return {kind: (right * of).sum(1) / of.sum(1) for kind, of in kinds.items()}


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: one seed, few steps."""
    seeds, fitted, steps, every, count = (1, 20, 8, 4, 32) if quick else (4, 600, 200, 20, 256)
    keys = jax.random.split(jax.random.key(24), seeds)
    params = jax.jit(lambda keys: jax.lax.map(lambda k: base(k, fitted), keys))(keys)
    found = {name: jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(lambda x, n=name: jax.lax.map(
        lambda y: member(*y, n, steps, every, count), x))((keys, params))) for name in METHODS}
    rho = {name: correlation(x["logps"], x["lengths"]) for name, x in found.items()}
    right = {name: accuracy(x, name) for name, x in found.items()}
    path = _figure(found, rho, right, steps, every, Path(out_folder))
    normal, bare, dpo = (rho[name][:, -1] for name in METHODS)
    length = {name: found[name]["length"][:, -1] for name in METHODS}
    checks = {
        "correlation of mean log-prob and length: higher without normalisation than with SimPO, in every seed":
            (bare > normal).all(),
        "and than with DPO, in every seed": (bare > dpo).all(),
        "DPO's lies above SimPO's, in the mean": dpo.mean() > normal.mean(),
        "samples are longer without normalisation than with SimPO, in every seed":
            (length["without normalisation"] > length["SimPO"]).all(),
        "without normalisation held-out pairs with a shorter winner are ranked worse than by SimPO, in every seed":
            (right["without normalisation"]["shorter"] < right["SimPO"]["shorter"]).all(),
        "quality per word ends higher with SimPO than without normalisation, in the mean":
            found["SimPO"]["quality"][:, -1].mean() > found["without normalisation"]["quality"][:, -1].mean(),
    }
    ours = {"start: correlation of mean log-prob and length; length; quality": "; ".join(
        harness.said(x) for x in (rho["DPO"][:, 0], found["DPO"]["length"][:, 0], found["DPO"]["quality"][:, 0]))}
    ours |= {f"{name}: correlation of mean log-prob and length; length of samples; quality": "; ".join(
        harness.said(x) for x in (rho[name][:, -1], length[name], found[name]["quality"][:, -1])) for name in METHODS}
    ours |= {f"{name}: accuracy where the winner is shorter, longer":
             f"{harness.said(right[name]['shorter'])}, {harness.said(right[name]['longer'])}" for name in METHODS}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="correlation 0.34 (SimPO), 0.59 (DPO), 0.82 (no normalisation); answers 1868 to "
                          "2345 long without it")


def _figure(found: dict, rho: dict, right: dict, steps: int, every: int, folder: Path) -> Path:
    """Correlation and length over training, accuracy by which side is longer."""
    figure = style.figure(12.0, 3.9)
    first, second, third = (style.axes(figure, 1, 3, i) for i in (1, 2, 3))
    updates = np.arange(0, steps + 1, every)
    for index, name in enumerate(METHODS):
        colour, line = style.COLOURS[index], style.DASHES[index]
        style.band(first, updates, rho[name], colour=colour, line=line, label=name)
        style.band(second, updates, found[name]["length"], colour=colour, line=line, label=name)
        for place, kind in enumerate(("shorter", "longer")):
            mean, half = harness.mean_ci(right[name][kind])
            third.errorbar(place + 0.18 * (index - 1), mean, yerr=half, fmt="os^"[index], color=colour, capsize=3,
                           label=name if not place else None)
    first.set_xlabel("update")
    first.set_ylabel("Spearman correlation of mean log-prob\nand length (held-out completions)")
    second.set_xlabel("update")
    second.set_ylabel("mean length of samples, tokens")
    third.axhline(0.5, color=style.MUTED, linewidth=0.8)
    third.set_xticks((0, 1), ("the shorter", "the longer"))
    third.set_xlim(-0.5, 1.5)
    third.set_ylim(0, 1)
    third.set_xlabel("the winner is")
    third.set_ylabel("held-out pairs that the loss's own\nreward ranks right (95% interval)")
    style.legend(first)
    style.legend(third, loc="upper right")
    return style.save(figure, folder / "simpo_length.png", dpi=harness.PNG_DPI)


if __name__ == "__main__":
    harness.command_line(run, __doc__)
