"""Gradient entanglement: when chosen and rejected rise or fall together (arXiv 2410.13828, ICLR 2025).

Claim: a margin loss couples the two sides through <g_w, g_l>, the inner product of the gradients of the two log-probs.
A small step raises the chosen iff d_w |g_w|^2 > d_l <g_w, g_l> and lowers the rejected iff d_l |g_l|^2 > d_w <g_w,
g_l>, with d the slopes of the loss. Pairs of one contrasting token have opposed gradients and part; the longer the
text that both completions share after it, the more they move together.

Published: GPT-2 on sentiment pairs of one token, with a short and with a long shared suffix; the single token's
gradients are negatively correlated and more shared suffix makes them positively so. Figures only.

Here: reviews of six words and a question, completions "good" or "bad" alone, with one and with six shared words that
the model has not seen; a decoder of the library (2 layers, width 32) trained on labelled reviews; 48 pairs. Signs
after one small step on one pair in float64, under DPO, CPO, SimPO and SLiC-HF; then 60 updates of DPO by Adam 1e-4 on
all pairs. 4 seeds. Settings that changed after a first look: the suffix's words (they had been seen in training), the
learning rate (3e-4), and the small step (1e-6, where 99.8% of the signs agreed; it is 1e-9 now).

Command: python -m experiments.papers.gradient_entanglement

Small models: the conditions are exact for any model and checked as such; that a shared suffix turns the gradients
towards each other shows. The conditions are those of one plain gradient step on one pair: under Adam on all pairs the
two sides part here whatever the suffix, so that their synchronous moves in the paper's curves are not reproduced. How
entangled real pairs are depends on the model and the data.

At scale: `alignax train --config experiments/dpo.py:loss=dpo` with the diagnostic `entanglement`, on pairs that differ
in a few words and on pairs that share none. Prediction: a larger mean condition_ratio on the former, and chosen and
rejected log-probs that move the same way in more than half of the intervals there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import entanglement, style
from alignax.ops.reductions import as_terms, reduce_terms
from experiments.papers import harness, texts

ASK, GOOD, BAD, TAIL = texts.EXTRA, texts.EXTRA + 1, texts.EXTRA + 2, texts.EXTRA + 3
LENGTH, SUFFIX = 6, tuple(range(TAIL, TAIL + 6))
VOCAB = TAIL + len(SUFFIX)
CASES = {"one token": 0, "short suffix": 1, "long suffix": 6}
METHODS = {"DPO": "dpo", "CPO": "cpo", "SimPO": "simpo", "SLiC-HF": "slic_hf"}
CONFIG = texts.decoder(VOCAB)


def labelled(key: jax.Array, count: int, suffix: int) -> texts.Pairs:
    """Pairs: a review, the question, its right label against the wrong one, and `suffix` shared words after both.

    The rows are as long for every suffix; what lies behind it is outside the mask and, in a causal model, unread.
    """
    first, second = jax.random.split(key)
    mood = jax.random.bernoulli(first, 0.5, (count,)).astype(jnp.int32)
    prompt = jnp.concatenate([jnp.full((count, 1), texts.START), texts.words(second, mood, LENGTH),
                              jnp.full((count, 1), ASK)], 1)
    right, wrong = jnp.where(mood, GOOD, BAD), jnp.where(mood, BAD, GOOD)
    tail = jnp.broadcast_to(jnp.array(SUFFIX, jnp.int32), (count, len(SUFFIX)))
    tokens = jnp.stack([jnp.concatenate([prompt, label[:, None], tail], 1) for label in (right, wrong)], 1)
    place = jnp.arange(tokens.shape[-1])
    mask = jnp.broadcast_to((place > LENGTH + 1) & (place <= LENGTH + 2 + suffix), tokens.shape)
    return texts.Pairs(tokens.astype(jnp.int32), mask)


def base(key: jax.Array, steps: int) -> Any:
    """Parameters fitted to reviews with a label that is right three times out of four, and more words after it."""
    keys = jax.random.split(key, 4)
    pairs = labelled(keys[0], 2048, 0).tokens[..., :LENGTH + 3]
    rows = jnp.where(jax.random.bernoulli(keys[1], 0.75, (2048, 1)), pairs[:, 0], pairs[:, 1])
    after = texts.words(keys[2], (rows[:, -1] == GOOD).astype(jnp.int32), 6)
    rows = jnp.concatenate([rows, after], 1)
    return texts.fit(CONFIG, keys[3], rows, jnp.ones_like(rows, bool), steps=steps)


def one_step(params: Any, pair: texts.Pairs, size: float) -> dict[str, dict[str, jax.Array]]:
    """For every loss: first-order and measured change [2] of log pi of a pair ([1, 2, T]) per unit of step size, after
    one gradient step of that size; under `both` the cosine, and the first-order change by the normalised step."""
    ref_log = texts.log_policy(CONFIG, params, pair.tokens)
    both = texts.sums(CONFIG, params, pair)[0]
    found = entanglement.per_example(lambda p, part: texts.sums(CONFIG, p, part), params,
                                     jax.tree.map(lambda x: x[None], pair))[0]
    products = jax.tree.map(lambda x: x[0], found)
    even = jnp.sqrt(products.rejected) / jnp.sqrt(products.chosen)  # the ratio of slopes that normalising amounts to
    made = {"both": {"cosine": products.inner / jnp.sqrt(products.chosen * products.rejected),
                     "normalised": jnp.stack(entanglement.first_order(products, even, jnp.ones_like(even)))}}
    for name, id in METHODS.items():
        loss = losses.get(id)
        requests = texts.supply(loss.requests, ref_log, ref_log, pair)

        def of_sums(sums, loss=loss, requests=requests):
            return reduce_terms(as_terms(loss({**requests, "logps": sums[None]})))[0]

        pull, push = jax.grad(of_sums)(both) * jnp.array([-1.0, 1.0])
        slope = jax.grad(lambda p, loss=loss: texts.value(
            loss, texts.log_policy(CONFIG, p, pair.tokens), ref_log, pair))(params)
        after = texts.sums(CONFIG, jax.tree.map(lambda p, g: p - size * g, params, slope), pair)[0]
        made[name] = {"predicted": jnp.stack(entanglement.first_order(products, pull, push)),
                      "measured": (after - both) / size}
    return made


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: one seed, few steps and pairs."""
    seeds, fitted, steps, every, count, stepped = (1, 20, 8, 4, 8, 4) if quick else (4, 500, 60, 2, 48, 24)
    keys = jax.random.split(jax.random.key(21), seeds)
    params = jax.jit(lambda keys: jax.lax.map(lambda k: base(k, fitted), keys))(keys)
    curves, single = {}, {}

    def member(args):
        params, pairs = args
        look = lambda p: texts.sums(CONFIG, p, pairs).mean(0)
        return texts.train(losses.get("dpo"), CONFIG, params, pairs, look=look, steps=steps, every=every, lr=1e-4)[1]

    trained = jax.jit(lambda x: jax.lax.map(member, x))
    stepper = jax.jit(lambda x: jax.lax.map(lambda y: jax.lax.map(lambda pair: one_step(y[0], pair, 1e-9), y[1]), x))
    for case, suffix in CASES.items():
        pairs = [labelled(jax.random.fold_in(k, 1), count, suffix) for k in keys]
        pairs = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        curves[case] = np.asarray(trained((params, pairs)), np.float64)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
            few = texts.Pairs(*(jnp.asarray(np.asarray(x))[:, :stepped, None] for x in pairs))
            single[case] = jax.tree.map(np.asarray, stepper((wide, few)))

    cosine = {case: single[case]["both"]["cosine"] for case in CASES}
    moved = {case: x - x[:, :1] for case, x in curves.items()}
    together = {case: (np.diff(x, axis=1).prod(-1) > 0).mean(1) for case, x in curves.items()}
    steps_of = [x[name] for x in single.values() for name in METHODS]
    signs = np.mean([(np.sign(x["predicted"]) == np.sign(x["measured"])).mean() for x in steps_of])
    entangled = {case: ((x["DPO"]["predicted"][..., 0] < 0) | (x["DPO"]["predicted"][..., 1] > 0)).mean(1)
                 for case, x in single.items()}
    path = _figure(cosine, single, moved, steps, every, Path(out_folder))
    means = {case: x.mean() for case, x in cosine.items()}
    checks = {
        "a small step moves both log-probs as the two conditions say, in every pair, case and loss": signs == 1,
        "single-token pairs: cosine of the two gradients below 0 in the mean of every seed":
            (cosine["one token"].mean(1) < 0).all(),
        "long suffix: cosine above 0 in the mean of every seed": (cosine["long suffix"].mean(1) > 0).all(),
        "the cosine rises from one token to short to long suffix":
            means["one token"] < means["short suffix"] < means["long suffix"],
        "single-token pairs: DPO raises the chosen and lowers the rejected, in every seed":
            (moved["one token"][:, -1, 0] > 0).all() and (moved["one token"][:, -1, 1] < 0).all(),
        "during training both sides move the same way in more intervals with the long suffix than with one token, in "
        "every seed": (together["long suffix"] > together["one token"]).all(),
        "with equal slopes (DPO at its start) more pairs violate a condition with the long suffix than with one token":
            entangled["long suffix"].mean() > entangled["one token"].mean(),
        "normalising the two gradients of a pair meets both conditions everywhere":
            all((x["both"]["normalised"] * np.array([1, -1]) >= 0).all() for x in single.values()),
    }
    ours = {"signs that the conditions predict": f"{100 * signs:.1f} %"}
    for case in CASES:
        ours[f"{case}: cosine of the gradients; share of pairs that violate a condition; of intervals in which both "
             "sides move the same way"] = (
            f"{harness.said(cosine[case].mean(1))}; {harness.said(entangled[case])}; {harness.said(together[case])}")
        ours[f"{case}: change of chosen and rejected (nats)"] = (
            f"{harness.said(moved[case][:, -1, 0])}, {harness.said(moved[case][:, -1, 1])}")
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="opposed gradients for one token, aligned with a long shared suffix (figures)")


def _figure(cosine: dict, single: dict, moved: dict, steps: int, every: int, folder: Path) -> Path:
    """Cosines by case; predicted against measured changes; the two log-probs under DPO, a panel per case."""
    figure = style.figure(12.0, 5.6)
    first, second = style.axes(figure, 2, 3, 1), style.axes(figure, 2, 3, (2, 3))
    names = list(CASES)
    for index, values in enumerate(cosine.values()):
        spread = np.linspace(-0.22, 0.22, values.size)
        first.plot(index + spread, np.sort(values.reshape(-1)), ".", color=style.COLOURS[index], markersize=4)
    first.axhline(0, color=style.MUTED, linewidth=0.8)
    first.set_xticks(range(3), names)
    first.set_ylabel("cosine of ∇log π(chosen)\nand ∇log π(rejected)")
    style.title(first, "one point per pair, at the start")
    for index, case in enumerate(CASES):
        found = single[case]["DPO"]
        for side, marker, what in ((0, "o", "chosen"), (1, "x", "rejected")):
            second.plot(found["predicted"][..., side].reshape(-1), found["measured"][..., side].reshape(-1), marker,
                        color=style.COLOURS[index], markersize=4, alpha=0.7, label=f"{case}: {what}")
    for line in (second.axhline, second.axvline):
        line(0, color=style.MUTED, linewidth=0.8)
    second.set_xscale("symlog", linthresh=0.1)
    second.set_yscale("symlog", linthresh=0.1)
    second.set_xlabel("change that the inner products predict (nats per unit of step size, DPO)")
    second.set_ylabel("measured change")
    style.legend(second, loc="upper left", fontsize=style.NOTE)
    style.title(second, "one small gradient step on one pair")
    panels = [style.axes(figure, 2, 3, 4 + index) for index in range(3)]
    low, high = (f(x.min() if f is min else x.max() for x in moved.values()) for f in (min, max))
    for axes, (case, values) in zip(panels, moved.items(), strict=True):
        updates = np.arange(0, steps + 1, every)
        for side, colour, what in ((0, style.COLOURS[0], "chosen"), (1, style.COLOURS[1], "rejected")):
            style.band(axes, updates, values[..., side], colour=colour, label=what, line=style.DASHES[side])
        axes.axhline(0, color=style.MUTED, linewidth=0.8)
        axes.set_ylim(low - 0.1, high + 0.1)
        axes.set_xlabel("DPO update")
        style.title(axes, case)
    panels[0].set_ylabel("mean change of log π\nsince the start (nats)")
    style.legend(panels[0], loc="lower left")
    return style.save(figure, folder / "gradient_entanglement.png", dpi=harness.PNG_DPI)


if __name__ == "__main__":
    harness.command_line(run, __doc__)
