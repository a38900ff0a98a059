"""Likelihood displacement: prefer No over Never and Yes rises (arXiv 2410.08847, ICLR 2025).

Claim: DPO on two similar completions can lower the preferred one and move its mass to a completion of the opposite
meaning. Similarity of hidden states, summed up in the CHES score, tells which pairs do it; training without the pairs
of high CHES mitigates it.

Published: pi(No) falls from 0.85 to 0.01 (OLMo-1B) and from 0.65 to 0.44 (Gemma-2B) while Yes rises; refusal rate of
Llama-3-8B-Instruct 74.4 to 33.4 % under DPO, restored by keeping the 5 % of the pairs with the lowest
length-normalised CHES.

Here: statements of five words and an answer of one token out of five whose strength of agreement is -2 (Never), -1
(No), 0, 1 (Yes) and 2: an answer's log-odds are linear in the statement's mood, so that Never is a stronger No. A
decoder of the library (2 layers, width 32) is fitted to them; RMSProp 1e-4 on one prompt for each of the 20 ordered
pairs of answers. Then 96 pairs of answers with five words of explanation, drawn from the fitted model; the second of
a pair is the first with a share of its tokens, 15 to 100 %, taken from another draw. Each pair is trained alone for 10
updates of DPO (SGD 1e-3), and sets of 32 pairs together for 120 (SGD 1e-3). 4 seeds. Tried before: two independent
draws per pair, of unequal length, whose completions have hardly a token in common, gave no correlation (-0.10); with
Adam 3e-4 all sets fall by 2 to 6 nats within 60 updates, and CHES does not order them; with SGD 1e-2 and 3e-3 the set
of the lowest CHES, which has the largest gradients, became unstable after 40 of 60 updates in one seed, and with 1e-3
begins to in the last of the 120.

Command: python -m experiments.papers.likelihood_displacement

Small models: the mechanism, that what No and Never share is pushed along with Never. CHES ranks the pairs, weakly, and
sets filtered by it, as long as steps are small, in the published order. But the mean chosen rises in every set here, so
that there is no displacement of a set to mitigate, and pairs left out of training gain nothing. The strengths of the
answers are built into the data; in a language model they come from its text, and its size decides how far No falls.

At scale: `alignax score PAIRS --model MODEL --by ches --keep lowest:0.05 --out LOW` and `--keep highest:0.05`, then
`alignax train --config experiments/dpo.py:loss=dpo` on each. Prediction: the chosen log-prob falls more with the
latter, at equal updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import losses
from alignax.diagnostics import ches, style
from experiments.papers import harness, texts

ANSWERS = ("Never", "No", "Perhaps", "Yes", "Certainly")
STRENGTH, COMMON = (-2.0, -1.0, 0.0, 1.0, 2.0), (-3.0, 0.0, -1.0, 0.0, -3.0)
ASK, NEVER = texts.EXTRA, texts.EXTRA + 1
NO, YES = NEVER + 1, NEVER + 3
VOCAB = NEVER + len(ANSWERS)
CONFIG = texts.decoder(VOCAB)
LENGTH, EXPLAIN, PAIRS, KEPT, TOGETHER = 5, 5, 96, 32, 120
SUBSETS = ("all", "lowest CHES", "random", "highest CHES")


def statements(key: jax.Array, count: int) -> jax.Array:
    """[N, 2 + LENGTH]: START, words, ASK."""
    first, second = jax.random.split(key)
    mood = jax.random.bernoulli(first, 0.5, (count,)).astype(jnp.int32)
    ends = (jnp.full((count, 1), texts.START), jnp.full((count, 1), ASK))
    return jnp.concatenate([ends[0], texts.words(second, mood, LENGTH), ends[1]], 1).astype(jnp.int32)


def answers(key: jax.Array, prompts: jax.Array) -> jax.Array:
    """Answer tokens [N]: log-odds COMMON + STRENGTH times the sum of the statement's polarities."""
    mood = texts.polarity(prompts).sum(1)
    return NEVER + jax.random.categorical(key, jnp.array([COMMON]) + jnp.array([STRENGTH]) * mood[:, None])


def base(key: jax.Array, steps: int, count: int = 4096) -> Any:
    """Parameters fitted to statements, answers and explanations of the answer's mood."""
    keys = jax.random.split(key, 5)
    prompts = statements(keys[0], count)
    answer = answers(keys[1], prompts)
    agrees = (jnp.array(STRENGTH)[answer - NEVER] > jax.random.uniform(keys[2], (count,)) - 0.5).astype(jnp.int32)
    words = texts.words(keys[3], agrees, EXPLAIN)
    rows = jnp.concatenate([prompts, answer[:, None], words], 1)
    return texts.fit(CONFIG, keys[4], rows, jnp.ones_like(rows, bool), steps=steps)


def answer_pair(prompt: jax.Array, chosen: Any, rejected: Any) -> texts.Pairs:
    """One pair of single-token answers to one prompt [T]."""
    tokens = jnp.stack([jnp.append(prompt, chosen), jnp.append(prompt, rejected)])[None].astype(jnp.int32)
    return texts.Pairs(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[-1]) == LENGTH + 2, tokens.shape))


def drawn(key: jax.Array, params: Any, count: int) -> texts.Pairs:
    """Pairs of the model's own answers with explanations, which have a random share of their tokens in common; the one
    that disagrees more is chosen."""
    keys = jax.random.split(key, 5)
    prompts = statements(keys[0], count)
    first, other = (texts.sample(CONFIG, params, k, prompts, 1 + EXPLAIN)[0] for k in keys[1:3])
    share = jax.random.uniform(keys[3], (count, 1), minval=0.15)
    tokens = jnp.stack([first, jnp.where(jax.random.bernoulli(keys[4], share, first.shape), other, first)], 1)
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) > LENGTH + 1, tokens.shape)
    strength = jnp.zeros(VOCAB).at[NEVER:].set(jnp.array(STRENGTH))
    tone = (texts.polarity(tokens) * mask).sum(-1) + strength[tokens[..., LENGTH + 2]]
    return texts.Pairs(jnp.take_along_axis(tokens, jnp.argsort(tone, axis=1)[..., None], 1), mask)


def score(params: Any, pairs: texts.Pairs) -> jax.Array:
    """Length-normalised CHES [N]; the completions are of one length, so that the plain form ranks alike."""
    flat = pairs.tokens.reshape(-1, pairs.tokens.shape[-1])
    hidden = texts.states(CONFIG, params, flat)[:, :-1].reshape(*pairs.tokens.shape[:2], flat.shape[1] - 1, -1)
    return ches.ches(hidden, pairs.mask[..., 1:])[1]


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: one seed, few steps and pairs."""
    seeds, fitted, steps, count, kept, alone = (1, 20, 8, 8, 3, 2) if quick else (4, 800, 100, PAIRS, KEPT, 10)
    keys = jax.random.split(jax.random.key(22), seeds)
    params = jax.jit(lambda keys: jax.lax.map(lambda k: base(k, fitted), keys))(keys)
    grid = [(w, other) for w in range(5) for other in range(5) if w != other]

    def answered(args):
        key, params = args
        prompts = statements(jax.random.fold_in(key, 7), 256)
        log_pi = texts.log_policy(CONFIG, params, jnp.pad(prompts, ((0, 0), (0, 1))))[:, -1]
        prompt = prompts[jnp.argmin(jnp.abs(log_pi[:, NO] - jnp.log(0.7)))]  # a clear No, with room to rise and fall

        def one(pair):
            look = lambda p: texts.log_policy(CONFIG, p, jnp.append(prompt, 0)[None])[0, -1, NEVER:]
            return texts.train(losses.get("dpo"), CONFIG, params, answer_pair(prompt, *(NEVER + pair)), look=look,
                               steps=steps, every=steps // 4 if quick else 2, lr=1e-4, optimiser=optax.rmsprop)[1]
        return jax.lax.map(one, jnp.array(grid))

    single = np.exp(np.asarray(jax.jit(lambda x: jax.lax.map(answered, x))((keys, params)), np.float64))

    def longer(args):
        key, params = args
        pairs = drawn(jax.random.fold_in(key, 8), params, count)
        same = (pairs.tokens[:, 0] == pairs.tokens[:, 1]).all(-1)
        normal = score(params, pairs)
        before = texts.sums(CONFIG, params, pairs)[:, 0]

        def one(pair):
            pair = jax.tree.map(lambda x: x[None], pair)
            return texts.train(losses.get("dpo"), CONFIG, params, pair, steps=alone, every=alone, lr=1e-3,
                               optimiser=optax.sgd, look=lambda p: texts.sums(CONFIG, p, pair)[0])[1]

        shift = jax.lax.map(one, pairs)
        rank = jnp.argsort(jnp.argsort(jnp.where(same, jnp.inf, normal)))
        left = jnp.arange(count) < kept
        weights = jnp.stack([~same, (rank < kept), jax.random.permutation(key, left) & ~same,
                             (rank >= count - same.sum() - kept) & ~same]).astype(jnp.float32)
        look = lambda p: texts.sums(CONFIG, p, pairs)[:, 0] - before
        together = jax.lax.map(lambda w: texts.train(
            losses.get("dpo"), CONFIG, params, pairs, look=look, weights=w, steps=4 if quick else TOGETHER,
            every=4 if quick else TOGETHER // 10, lr=1e-3, optimiser=optax.sgd)[1], weights)
        return normal, shift[:, -1] - shift[:, 0], same, weights, together

    normal, shift, same, weights, together = (np.asarray(x, np.float64) for x in jax.jit(
        lambda x: jax.lax.map(longer, x))((keys, params)))
    return _report(Path(out_folder), grid, single, normal, shift, same > 0, weights, together)


def _report(folder: Path, grid: list, single: np.ndarray, normal: np.ndarray, shift: np.ndarray, same: np.ndarray,
            weights: np.ndarray, together: np.ndarray) -> dict[str, Any]:
    """Numbers, checks and the figure. single: [S, 20, T, 5]; normal, same: [S, N]; shift: [S, N, 2]; weights:
    [S, 4, N]; together: [S, 4, T, N], the change of log pi(chosen)."""
    from scipy import stats

    seeds = len(single)
    case, opposite = single[:, grid.index((1, 0))], single[:, grid.index((1, 3))]
    change = {pair: np.log(single[:, i, -1, pair[0]]) - np.log(single[:, i, 0, pair[0]])
              for i, pair in enumerate(grid)}
    moves = lambda x: np.array([stats.spearmanr(x[s][~same[s]], -shift[s, ~same[s], 0])[0] for s in range(seeds)])
    rank = moves(normal)
    own = (together[:, :, -1] * weights).sum(-1) / weights.sum(-1)
    every = together[:, :, -1].mean(-1)
    path = _figure(folder, grid, case, change, normal, shift, same, together, weights)
    checks = {
        "prefer No over Never: pi(No) falls in every seed": (case[:, -1, 1] < case[:, 0, 1]).all(),
        "and Yes rises, in every seed": (case[:, -1, 3] > case[:, 0, 3]).all(),
        "though the loss is lowered: No gains on Never, in every seed":
            (case[:, -1, 1] / case[:, -1, 0] > case[:, 0, 1] / case[:, 0, 0]).all(),
        "prefer No over Yes, its opposite: pi(No) rises in every seed": (change[1, 3] > 0).all(),
        "prefer No over Yes: Yes and Certainly together stay below 0.1, in every seed":
            (opposite[:, -1, 3:].sum(-1) < 0.1).all(),
        "CHES ranks pairs by the fall of the chosen (95% interval of Spearman's correlation above 0)":
            np.subtract(*harness.mean_ci(rank)) > 0,
        "by a correlation of over 0.3 in every seed": (rank > 0.3).all(),
        "trained together, the third of the lowest CHES leaves its own chosen likelier than a random third, in every "
        "seed": (own[:, 1] > own[:, 2]).all(),
        "and the third of the highest CHES less likely, in every seed": (own[:, 3] < own[:, 2]).all(),
        "over all 96 pairs too, the lowest third leaves the chosen likelier than a random third, in the mean":
            every[:, 1].mean() > every[:, 2].mean(),
    }
    ours = {"No over Never: pi(No) before, after": f"{harness.said(case[:, 0, 1])}, {harness.said(case[:, -1, 1])}",
            "No over Never: pi(Yes) before, after": f"{harness.said(case[:, 0, 3])}, {harness.said(case[:, -1, 3])}",
            "No over Never: pi(Never) before, after":
                f"{harness.said(case[:, 0, 0], 3)}, {harness.said(case[:, -1, 0], 3)}",
            "No over Yes: change of log pi(No); pi(Never) before, after":
                f"{harness.said(change[1, 3])}; {harness.said(opposite[:, 0, 0])}, {harness.said(opposite[:, -1, 0])}",
            "Spearman of CHES with the fall of the chosen": harness.said(rank),
            **{f"{name}: change of log pi(chosen), own pairs; all pairs":
               f"{harness.said(own[:, i])}; {harness.said(every[:, i])}" for i, name in enumerate(SUBSETS)}}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="pi(No) 0.85 to 0.01 (OLMo-1B), 0.65 to 0.44 (Gemma-2B); refusals 74.4 to 33.4 %")


def _figure(folder: Path, grid: list, case: np.ndarray, change: dict, normal: np.ndarray, shift: np.ndarray,
            same: np.ndarray, together: np.ndarray, weights: np.ndarray) -> Path:
    """No over Never; the chosen's change for every pair of answers; CHES against displacement; filtering."""
    figure = style.figure(11.0, 7.6)
    first, second, third, fourth = (style.axes(figure, 2, 2, i) for i in (1, 2, 3, 4))
    updates = np.linspace(0, 100, case.shape[1])
    for index, (name, colour) in enumerate(zip(ANSWERS, style.COLOURS, strict=False)):
        style.band(first, updates, case[..., index], colour=colour, label=name, line=style.DASHES[index % 4])
    first.set_xlabel("DPO update")
    first.set_ylabel("probability of the answer")
    first.set_ylim(0, 1)
    style.title(first, "prefer No over Never, one prompt")
    style.legend(first)
    table = np.full((5, 5), np.nan)
    for pair, values in change.items():
        table[pair] = values.mean()
    top = np.nanmax(np.abs(table))
    second.grid(False)
    second.imshow(np.ma.masked_invalid(table), cmap="PuOr", vmin=-top, vmax=top, aspect="auto")
    for (row, column), found in np.ndenumerate(table):
        if np.isfinite(found):
            second.text(column, row, f"{found:+.1f}", ha="center", va="center", fontsize=style.TICK,
                        color="white" if abs(found) > 0.6 * top else style.INK)
    second.set_xticks(range(5), ANSWERS)
    second.set_yticks(range(5), ANSWERS)
    second.tick_params(length=0)
    second.set_xlabel("rejected")
    second.set_ylabel("chosen")
    style.title(second, "change of log π(chosen), nats")
    for index, (x, y, out) in enumerate(zip(normal, shift[..., 0], same, strict=True)):
        third.plot(x[~out], y[~out], ".", color=style.COLOURS[index % 6], markersize=4, label=f"seed {index + 1}")
    third.axhline(0, color=style.MUTED, linewidth=0.8)
    third.set_xlabel("CHES of the pair, length-normalised")
    third.set_ylabel("change of log π(chosen), nats\n(the pair trained alone)")
    style.legend(third)
    own = (together * weights[:, :, None]).sum(-1) / weights.sum(-1)[..., None]
    updates = np.linspace(0, TOGETHER, own.shape[2])
    for index, name in enumerate(SUBSETS):
        style.band(fourth, updates, own[:, index], colour=style.COLOURS[index], line=style.DASHES[index],
                   label=name if name == "all" else f"{name}, a third")
    fourth.axhline(0, color=style.MUTED, linewidth=0.8)
    fourth.set_xlabel("DPO update")
    fourth.set_ylabel("mean change of log π(chosen)\nof the pairs trained on (nats)")
    style.legend(fourth)
    return style.save(figure, folder / "likelihood_displacement.png", dpi=harness.PNG_DPI)


if __name__ == "__main__":
    harness.command_line(run, __doc__)
