"""Grokking tickets: the generalising subnetwork without the delay (arXiv 2310.19470).

Claim: the mask of the large weights of a network that has generalised (grokked), put over its initial weights, removes
most of the delay between fitting the training pairs and generalising; a mask taken when the training pairs were just
fitted, a random mask of the same density and a dense network of the same norm do not. At the right rate of pruning the
ticket generalises without weight decay, where the dense network does not.

Published: modular addition and others, MLP and transformer, pruning rates 0.4 to 0.6; curves of train and test
accuracy. Figures only.

Here: addition modulo 47 of two different numbers whose order does not count, 60% of the 1,081 pairs for training; the
paper's MLP, embeddings of width 500 that are summed, a hidden layer of 48, back to 500, unembedding; full batch, AdamW
3e-3 with decay 1 for 5,000 updates; masks of the largest 40% of all weights; then the same start again under each mask,
2,500 updates with the decay and without. 3 seeds. The first run had 3,000 updates at first, after which one seed stood
at 86% and its ticket did not reach 95%. Tried before, one seed: without the step back to 500 (embeddings of 64 to 256,
outputs straight from the hidden layer) the dense network generalises after 1,200 to 4,800 updates and no network under
a mask does within 6,000, the ticket's included.

Command: python -m experiments.papers.grokking_tickets

Small models: task and network are the paper's own (there with modulus 67 and 40% of the pairs), so that the delay and
what removes it can show. That it hangs on the wide linear layers on both sides is found here, not published.

At scale: the paper's size, on a GPU: `python -c "from experiments.papers import grokking_tickets as g;
g.run('runs/papers', setting=g.PAPER)"`. Prediction: the ticket's delay is under a quarter of the first run's, that of a
random mask is not. In preference training from a pretrained model none is expected: `alignax analyse weights RUN` after
`alignax train --config experiments/dpo.py:loss=dpo` shows changes below 5% of the norm, so that the mask by magnitude
is the start's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax.diagnostics import style
from experiments.papers import harness


class Setting(NamedTuple):
    """The task and the network; share: of the pairs for training; pruned: the share of weights that a mask removes;
    lr, decay: AdamW's; steps: updates of the first run, again: of the second ones; every: between two records."""

    modulus: int = 47
    embedding: int = 500
    width: int = 48
    share: float = 0.6
    pruned: float = 0.6
    lr: float = 3e-3
    decay: float = 1.0
    steps: int = 5000
    again: int = 2500
    every: int = 50
    seeds: int = 3


SMALL, PAPER = Setting(), Setting(67, 500, 48, 0.4, 0.6, 1e-3, 1.0, 30_000, 30_000, 250, 3)
KINDS = ("dense", "dense, norm of the ticket", "random mask", "ticket when memorised", "ticket when grokked")
LEVEL = 0.95


def data(key: jax.Array, setting: Setting) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(counts [N, modulus] of the two terms, their sums [N]) of the pairs for training, and of the others; each
    unordered pair once, as the network adds embeddings, and would know a pair from its mirror image."""
    first, second = np.triu_indices(setting.modulus, 1)
    one = np.eye(setting.modulus, dtype=np.float32)
    order = jax.random.permutation(key, len(first))
    counts, sums = jnp.asarray(one[first] + one[second])[order], jnp.asarray((first + second) % setting.modulus)[order]
    cut = int(setting.share * len(first))
    return (counts[:cut], sums[:cut]), (counts[cut:], sums[cut:])


def start(key: jax.Array, setting: Setting) -> dict[str, jax.Array]:
    """The paper's four matrices, normal with variance 1 / what a unit reads."""
    sizes = {"embedding": (setting.modulus, setting.embedding), "inward": (setting.embedding, setting.width),
             "outward": (setting.width, setting.embedding), "unembedding": (setting.embedding, setting.modulus)}
    return {name: jax.random.normal(jax.random.fold_in(key, i), shape) * shape[0] ** -0.5
            for i, (name, shape) in enumerate(sizes.items())}


def scores(params: dict[str, jax.Array], counts: jax.Array) -> jax.Array:
    """Logits [N, modulus] of sums; the matrices on either side of the non-linearity are multiplied first, as they are
    smaller than the pairs are many."""
    return jax.nn.relu(counts @ (params["embedding"] @ params["inward"])) @ (params["outward"] @ params["unembedding"])


def train(key: jax.Array, params: Any, mask: Any, decay: Any, setting: Setting) -> tuple[Any, jax.Array]:
    """(weights before the first update and after every `every` ones, accuracy [T, 2] on training and other pairs);
    weights outside the mask are 0 throughout."""
    parts = data(key, setting)
    rule = optax.adamw(setting.lr, b2=0.98, weight_decay=decay)
    masked = lambda tree: jax.tree.map(jnp.multiply, tree, mask)

    def loss(params):
        counts, sums = parts[0]
        return optax.softmax_cross_entropy_with_integer_labels(scores(params, counts), sums).mean()

    def update(carry, _):
        params, memory = carry
        updates, memory = rule.update(masked(jax.grad(loss)(params)), memory, params)
        return (masked(optax.apply_updates(params, updates)), memory), None

    def look(params):
        return jnp.stack([(scores(params, counts).argmax(-1) == sums).mean() for counts, sums in parts])

    params = masked(params)
    (last, _), path = jax.lax.scan(
        lambda carry, _: (jax.lax.scan(update, carry, None, setting.every)[0], carry[0]),
        (params, rule.init(params)), None, setting.steps // setting.every)
    path = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), path, last)
    return path, jax.lax.map(look, path)


def ticket(params: Any, pruned: float) -> Any:
    """Masks of 1 where a weight is among the largest 1 - pruned of all of the network's, in magnitude."""
    every = np.concatenate([np.abs(x).reshape(-1) for x in jax.tree.leaves(params)])
    bound = np.sort(every)[round(pruned * every.size)]
    return jax.tree.map(lambda x: (np.abs(x) >= bound).astype(np.float32), params)


def shuffled(draws: np.random.Generator, mask: Any) -> Any:
    """The same number of ones in every matrix, anywhere in it."""
    return jax.tree.map(lambda x: draws.permutation(x.reshape(-1)).reshape(x.shape), mask)


def norm(params: Any) -> float:
    """The Euclidean norm of all weights."""
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(params))))


def second_runs(first: Any, path: Any, accuracy: np.ndarray, pruned: float, seed: int) -> tuple[list, list]:
    """(starts, masks) of KINDS for one seed: first, its weights before training; path, accuracy: as `train` gave."""
    at = lambda i: jax.tree.map(lambda x: x[i], path)
    late, early = ticket(at(-1), pruned), ticket(at(int((accuracy[:, 0] >= LEVEL).argmax())), pruned)
    ones = jax.tree.map(np.ones_like, late)
    ratio = norm(jax.tree.map(np.multiply, first, late)) / norm(first)
    smaller = jax.tree.map(lambda x: np.float32(ratio) * x, first)
    masks = [ones, ones, shuffled(np.random.default_rng(seed), late), early, late]
    return [first, smaller, first, first, first], masks


def reached(accuracy: np.ndarray, every: int) -> np.ndarray:
    """Updates until LEVEL along the last axis; infinity where it is never reached."""
    return np.where((accuracy >= LEVEL).any(-1), every * (accuracy >= LEVEL).argmax(-1), np.inf)


def delays(accuracy: np.ndarray, every: int) -> np.ndarray:
    """Updates between LEVEL on the training pairs and on the others, [..., T, 2] -> [...]; infinity where the others
    never reach it."""
    fitted, done = reached(accuracy[..., 0], every), reached(accuracy[..., 1], every)
    return np.where(np.isfinite(done), done - np.where(np.isfinite(fitted), fitted, 0), np.inf)


def run(out_folder: str | Path, quick: bool = False, setting: Setting = SMALL) -> dict[str, Any]:
    """Figure and report; quick: one seed, few steps."""
    if quick:
        setting = setting._replace(modulus=11, embedding=8, width=8, steps=20, again=20, every=5, seeds=1)
    seeds = setting.seeds
    keys = jax.random.split(jax.random.key(27), seeds)
    first = jax.device_get(jax.vmap(lambda k: start(jax.random.fold_in(k, 2), setting))(keys))
    ones = jax.tree.map(np.ones_like, first)
    path, seen = harness.each(lambda key, params, mask: train(key, params, mask, setting.decay, setting), keys, first,
                              ones)
    of = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    made = [second_runs(of(first, i), of(path, i), seen[i], setting.pruned, i) for i in range(seeds)]
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    starts, masks = (stack([tree for pair in made for tree in pair[side] for _ in range(2)]) for side in (0, 1))
    decays = np.tile(np.float32([setting.decay, 0]), seeds * len(KINDS))
    second = setting._replace(steps=setting.again)
    again = harness.each(lambda *x: train(*x, second)[1], keys[np.repeat(np.arange(seeds), 2 * len(KINDS))], starts,
                         masks, decays)
    again = again.astype(np.float64).reshape(seeds, len(KINDS), 2, -1, 2).swapaxes(1, 2)  # [S, decay, kind, T, 2]
    kept = np.array([[sum(x.sum() for x in jax.tree.leaves(mask)) / sum(x.size for x in jax.tree.leaves(mask))
                      for mask in pair[1][2:]] for pair in made])
    return _report(Path(out_folder), setting, seen.astype(np.float64), again, kept)


def _report(folder: Path, setting: Setting, seen: np.ndarray, again: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Numbers and checks. seen: [S, T, 2] of the first run; again: [S, 2, KINDS, T, 2]; kept: density [S, 3]."""
    every = setting.every
    own = delays(seen, every)
    delay = delays(again, every)  # [S, 2, kinds]
    best, free = delay[:, 0, -1], delay[:, 1]
    path = _figure(folder, setting, seen, again)
    checks = {
        "the first run fits the training pairs long before the others: over 300 updates between, in every seed":
            (own > 300).all() and np.isfinite(own).all(),
        "the masks have the density 1 - k": np.abs(kept - (1 - setting.pruned)).max() < 1e-3,
        "with decay, the grokked ticket's delay is under half of the dense network's, in every seed":
            (best < 0.5 * delay[:, 0, 0]).all(),
        "and under half of that of the dense network of the ticket's norm, in every seed":
            (best < 0.5 * delay[:, 0, 1]).all(),
        "and under half of that of a random mask of the same density, in every seed":
            (best < 0.5 * delay[:, 0, 2]).all(),
        "and under half of that of the ticket taken at memorisation, in every seed":
            (best < 0.5 * delay[:, 0, 3]).all(),
        "without decay the grokked ticket generalises, in every seed": np.isfinite(free[:, -1]).all(),
        "without decay none of the four others does, in any seed": np.isinf(free[:, :-1]).all(),
    }
    shown = lambda values, of: ", ".join(f"{v:.0f}" if np.isfinite(v) else f"over {of}" for v in values)
    ours = {"first run: updates to 95% on training pairs; on the others": "; ".join(
        shown(reached(seen[..., side], every), setting.steps) for side in (0, 1))}
    for i, name in enumerate(KINDS):
        ours[f"{name}: delay by seed with decay; without; accuracy on other pairs at the end without"] = "; ".join(
            (shown(delay[:, 0, i], setting.again), shown(free[:, i], setting.again),
             harness.said(again[:, 1, i, -1, 1])))
    return harness.report(figures=[path], seeds=len(seen), ours=ours, checks=checks,
                          published="the grokked ticket generalises nearly at once, the others late (figures)")


def _figure(folder: Path, setting: Setting, seen: np.ndarray, again: np.ndarray) -> Path:
    """The first run, and the accuracy on other pairs of the second ones, with decay and without."""
    figure = style.figure(11.5, 3.8)
    panels = [style.axes(figure, 1, 3, i) for i in (1, 2, 3)]
    updates, later = (setting.every * np.arange(x.shape[-2]) for x in (seen, again))
    for side, (name, line) in enumerate((("training pairs", "--"), ("other pairs", "-"))):
        style.band(panels[0], updates, seen[..., side], colour=style.INK, label=name, line=line)
    for index, name in enumerate(KINDS):
        for side in (0, 1):
            style.band(panels[1 + side], later, again[:, side, index, :, 1], colour=style.COLOURS[index], label=name,
                       line=style.DASHES[index % 4])
    for axes, text in zip(panels, ("first run: dense, with decay", "again, with decay: other pairs",
                                   "again, without decay: other pairs"), strict=True):
        style.title(axes, text)
        axes.set_xlabel("update (full batch)")
        axes.set_ylim(0, 1.03)
    panels[0].set_ylabel("accuracy (mean and range of the seeds)")
    style.legend(panels[0], loc="lower right", fontsize=style.NOTE)
    style.legend(panels[2], loc="upper left", fontsize=style.NOTE)
    return style.save(figure, folder / "grokking_tickets.png", dpi=harness.PNG_DPI)


if __name__ == "__main__":
    harness.command_line(run, __doc__)
