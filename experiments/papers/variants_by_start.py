"""DPO, IPO, KTO and CPO with and without SFT, and by the number of pairs (arXiv 2404.14723).

Claim: KTO is the best of the four on most tasks; CPO and KTO come close to their score with SFT when they start from
the base model, DPO and IPO do not; small parts of the data already give nearly the whole gain; the untouched start is
the baseline of each column.

Published: Mistral-7B, UltraChat for SFT, UltraFeedback for alignment, 13 benchmarks; sizes from 1,000 pairs up. Figures
and tables of benchmarks that a small model has not; the tendencies above.

Here: a request, the mark REPLY that an answer has to open with, then eight words; the gold score is praise minus blame
per word, and 0 without the mark. The base model, one layer of width 32, knows reviews but not requests. Starts: base;
SFT on 1,000 answers of mixed mood; instruction-tuned, SFT on 1,000 answers mostly of praise. Pairs of well-formed
answers, Bradley-Terry on the number of words of praise; DPO and KTO beta 0.1, IPO tau 0.1, CPO beta 0.1 with lambda 1;
16, 128 and 1,024 pairs, Adam 5e-4, 240 updates of 16 pairs; score on 256 samples. 3 seeds, one learning rate for all.
Tried before: two layers and 120 updates of 3e-4, where no method taught the base model the mark, KTO scored highest and
128 pairs gave over four fifths of the gain: the order of the methods hangs on such settings.

Command: python -m experiments.papers.variants_by_start

Small models: which method can teach a format that the start lacks. Benchmarks, knowledge and the ranking by task are
out of reach, and the methods' strengths are defaults, not tuned.

At scale: `alignax train --config experiments/dpo.py:loss=dpo`, `ipo`, `kto` and `cpo` from a base and from an SFT
model, with 1,000 to all pairs. Prediction: from the base model CPO and KTO come within a tenth of their score with SFT,
DPO and IPO stay behind.
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

ASK, REPLY, VOCAB = texts.EXTRA, texts.EXTRA + 1, texts.EXTRA + 2
CONFIG = texts.decoder(VOCAB, layers=1)
TOPIC, LENGTH, FRESH = 3, 8, 256
METHODS = {"DPO": ("dpo", {"beta": 0.1}), "IPO": ("ipo", {"tau": 0.1}), "KTO": ("kto", {"beta": 0.1}),
           "CPO": ("cpo", {"beta": 0.1, "lam": 1.0})}
STARTS = ("base", "SFT", "instruction-tuned")
SIZES = (16, 128, 1024)


def requests(key: jax.Array, count: int) -> jax.Array:
    """[N, 2 + TOPIC]: START, words of either mood, ASK."""
    words = texts.words(key, jnp.zeros(count), TOPIC, agree=0.5)
    return jnp.concatenate([jnp.full((count, 1), texts.START), words, jnp.full((count, 1), ASK)], 1).astype(jnp.int32)


def answers(key: jax.Array, prompts: jax.Array, agree: Any) -> jax.Array:
    """[N, T]: the prompts, REPLY, and words of which that share of the polar ones praises."""
    count = prompts.shape[0]
    words = texts.words(key, jnp.ones(count), LENGTH, agree=agree)
    return jnp.concatenate([prompts, jnp.full((count, 1), REPLY), words], 1).astype(jnp.int32)


def base(key: jax.Array, steps: int) -> Any:
    """Parameters fitted to reviews; no row has a request, and both marks only stand for a word here and there."""
    keys = jax.random.split(key, 3)
    mood = jax.random.bernoulli(keys[0], 0.5, (4096,)).astype(jnp.int32)
    rows = jnp.concatenate([jnp.full((4096, 1), texts.START), texts.words(keys[1], mood, TOPIC + LENGTH + 2)], 1)
    marks = jax.random.bernoulli(keys[2], 0.04, rows.shape)
    rows = jnp.where(marks, ASK + jax.random.randint(jax.random.fold_in(keys[2], 1), rows.shape, 0, 2), rows)
    return texts.fit(CONFIG, key, rows.astype(jnp.int32), jnp.ones_like(rows, bool), steps=steps)


def tuned(key: jax.Array, params: Any, agree: Any, steps: int) -> Any:
    """Parameters after supervised training on 1,000 answers, the answer alone."""
    rows = answers(jax.random.fold_in(key, 1), requests(jax.random.fold_in(key, 2), 1000), agree)
    mask = jnp.broadcast_to(jnp.arange(rows.shape[1]) > TOPIC + 1, rows.shape)
    return texts.fit(CONFIG, key, rows, mask, steps=steps, lr=2e-3, batch=32, params=params)


def preferences(key: jax.Array, count: int) -> texts.Pairs:
    """Pairs of answers from one source, of which Bradley-Terry on praise minus blame chooses."""
    keys = jax.random.split(key, 4)
    prompts = requests(keys[0], count)
    tokens = jnp.stack([answers(k, prompts, 0.6) for k in keys[1:3]], 1)
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) > TOPIC + 1, tokens.shape)
    score = (texts.polarity(tokens) * mask).sum(-1)
    wins = jax.random.bernoulli(keys[3], jax.nn.sigmoid(score[:, 0] - score[:, 1]))
    order = jnp.where(wins[:, None], jnp.array([[0, 1]]), jnp.array([[1, 0]]))[..., None]
    return texts.Pairs(jnp.take_along_axis(tokens, order, 1), mask)


def gold(key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
    """(mean gold score, share of answers with the mark) of samples."""
    tokens, mask = texts.sample(CONFIG, params, key, requests(jax.random.fold_in(key, 1), FRESH), 1 + LENGTH)
    marked = tokens[:, TOPIC + 2] == REPLY
    return (marked * (texts.polarity(tokens) * mask).sum(-1) / LENGTH).mean(), marked.mean()


def begin(key: jax.Array, fitted: int, taught: int) -> tuple[Any, jax.Array]:
    """(parameters of the STARTS on a first axis, their gold score and share with the mark [3, 2])."""
    first = base(key, fitted)
    both = jax.lax.map(lambda x: tuned(jax.random.fold_in(key, x[0]), first, x[1], taught),
                       (jnp.array([1, 2]), jnp.array([0.6, 0.85])))
    whole = jax.tree.map(lambda one, two: jnp.concatenate([one[None], two]), first, both)
    return whole, jax.lax.map(lambda params: jnp.stack(gold(jax.random.fold_in(key, 9), params)), whole)


def member(key: jax.Array, start: Any, size: jax.Array, which: jax.Array, steps: int) -> jax.Array:
    """Gold score and share with the mark [2] after training by the method of number `which` on the first `size` pairs.
    """
    methods = [losses.get(id, **hyper) for id, hyper in METHODS.values()]
    data = preferences(jax.random.fold_in(key, 7), SIZES[-1])
    weights = (jnp.arange(SIZES[-1]) < size).astype(jnp.float32)  # one program for all sizes
    params = texts.train(methods, CONFIG, start, data, look=lambda p: jnp.zeros(()), steps=steps, every=steps, lr=5e-4,
                         batch=16, weights=weights, key=jax.random.fold_in(key, 8), which=which)[0]
    return jnp.stack(gold(jax.random.fold_in(key, 9), params))


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: one seed, few steps."""
    seeds, fitted, taught, steps = (1, 10, 4, 4) if quick else (3, 500, 300, 240)
    keys = jax.random.split(jax.random.key(26), seeds)
    starts, before = harness.each(lambda key: begin(key, fitted, taught), keys)  # [S, 3, ...]
    shape = (seeds, len(STARTS), len(METHODS), len(SIZES))
    seed, place, method, size = (x.reshape(-1) for x in np.indices(shape))
    scored = harness.each(lambda *x: member(*x, steps), keys[seed], jax.tree.map(lambda x: x[seed, place], starts),
                          np.array(SIZES)[size], method).astype(np.float64).reshape(*shape, 2)
    before, found = before.astype(np.float64), {name: scored[:, :, i] for i, name in enumerate(METHODS)}
    path = _figure(found, before, Path(out_folder))
    score = {name: x[..., 0] for name, x in found.items()}
    gain = {name: x - before[:, :, None, 0] for name, x in score.items()}
    whole = {name: x[:, :, -1].mean(0) for name, x in score.items()}
    kept = {name: x[0] / x[1] for name, x in whole.items()}
    checks = {
        "with all pairs every method improves on its SFT start, in every seed":
            all((x[:, 1, -1] > 0).all() for x in gain.values()),
        "from the base model CPO reaches nine tenths of its score with SFT": kept["CPO"] > 0.9,
        "so does KTO": kept["KTO"] > 0.9,
        "DPO and IPO do not": max(kept["DPO"], kept["IPO"]) < 0.9,
        "KTO scores highest of the four, averaged over the starts, with all pairs":
            max(whole, key=lambda name: whole[name].mean()) == "KTO",
        "128 pairs give over four fifths of the gain of 1,024 from the SFT start, averaged over the methods":
            np.mean([x[:, 1, 1].mean() for x in gain.values()]) > 0.8 * np.mean([x[:, 1, 2].mean()
                                                                               for x in gain.values()]),
    }
    ours = {f"start alone: {start}: score, share with the mark":
            f"{harness.said(before[:, i, 0])}, {harness.said(before[:, i, 1])}" for i, start in enumerate(STARTS)}
    ours |= {f"{name}, {start}: score with {', '.join(map(str, SIZES))} pairs":
             ", ".join(harness.said(x) for x in score[name][:, i].T)
             for name in METHODS for i, start in enumerate(STARTS)}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="KTO best on most tasks; CPO and KTO need no SFT; small sets suffice (tendencies)")


def _figure(found: dict, before: np.ndarray, folder: Path) -> Path:
    """A panel per start: score by the number of pairs."""
    figure = style.figure(11.5, 3.9)
    panels = [style.axes(figure, 1, 3, 1 + i) for i in range(3)]
    for place, (axes, start) in enumerate(zip(panels, STARTS, strict=True)):
        axes.axhline(before[:, place, 0].mean(), color=style.INK, linewidth=1.2, linestyle=":", label="the start alone")
        for index, (name, values) in enumerate(found.items()):
            style.band(axes, SIZES, values[:, place, :, 0], colour=style.COLOURS[index], label=name,
                       line=style.DASHES[index])
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(n) for n in SIZES])
        axes.set_xlabel("preference pairs")
        style.title(axes, f"start: {start}")
    low, high = min(a.get_ylim()[0] for a in panels), max(a.get_ylim()[1] for a in panels)
    for axes in panels:
        axes.set_ylim(low, high)
    panels[0].set_ylabel("gold score of samples\n(praise − blame per word, 0 without the mark)")
    style.legend(panels[0])
    return style.save(figure, folder / "variants_by_start.png", dpi=harness.PNG_DPI)


if __name__ == "__main__":
    harness.command_line(run, __doc__)
