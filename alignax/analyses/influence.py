"""Which training pairs stand behind a behaviour of the trained policy: influence of every pair on a query loss."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from alignax import step
from alignax.analyses.of_run import Result, Stage, loss_of_pairs
from alignax.diagnostics import influence, style
from alignax.ops.reductions import reduce_terms
from alignax.types import ConfigError

QUERIES = {"chosen": "-log π(chosen), the displacement of the chosen", "rejected": "-log π(rejected)",
           "loss": "the stage's loss"}
METHODS = ("datainf", "fisher", "tracin")
_WHOLE = 1 << 28  # bytes of all pairs' gradients up to which they are not projected
_WIDTH = 1024


def analyse(stage: Stage, *, query: str = "chosen", method: str = "datainf", shown: int = 8) -> Result:
    """Influence at the stage's end of each of its pairs on the mean query over the same pairs: positive harms it.

    What more weight on the pair would do to the query loss, to first order: datainf and fisher with their inverse of
    the curvature, whose damping sets the scale, tracin the plain product of gradients, all with one sign. `share` is a
    score over the sum of all sizes. Gradients beyond 256 MB are projected to 1024 numbers, the same for all. Raises
    ConfigError for a query or method that is not known and a loss that is no function of one pair.
    """
    if query not in QUERIES or method not in METHODS:
        raise ConfigError(f"--query={query} --method={method}; allowed: {', '.join(QUERIES)}; {', '.join(METHODS)}")
    loss, spec, count = loss_of_pairs(stage, single=True), stage.ctx.spec, len(stage.records)
    size = sum(leaf.size for leaf in jax.tree.leaves(stage.after))
    projected = 4 * size * count > _WHOLE

    def trained(params, part):
        held = step.compute(spec, params, stage.before, part, set(loss.requests))
        return reduce_terms(loss(held))[0]

    def asked(params, part):
        if query == "loss":
            return trained(params, part)
        return -step.compute(spec, params, None, part, {"logps"})["logps"][0, 1 if query == "rejected" else 0]

    narrow = (lambda g: influence.project(g, jax.random.key(0), _WIDTH)) if projected else (lambda g: g)
    gradient = lambda function: jax.jit(lambda params, parts: influence.gradients(
        function, params, parts, transform=narrow, batch=8 if projected else 1))  # 8 share a draw of the matrix
    of_pairs, of_query = gradient(trained), gradient(asked)
    grads, queries = [], []
    for index, batch in stage.batches():
        parts = step.split_batch(batch, len(index))
        new = min(len(index), count - len(index) * len(grads))  # repeats at the end are not counted
        take = lambda tree, new=new: jax.tree.map(lambda a: np.asarray(a[:new]), jax.device_get(tree))
        grads.append(take(of_pairs(stage.after, parts)))
        queries.append(take(of_query(stage.after, parts)))
    join = lambda trees: jax.tree.map(lambda *a: np.concatenate(a), *trees)
    grads, vector = join(grads), influence.mean_gradient(join(queries))
    if method == "tracin":
        scores = -influence.inner(grads, vector)
    else:
        scores = (influence.datainf if method == "datainf" else influence.fisher)(grads, vector)
    return _result(stage, np.asarray(scores, np.float64), query, method, projected, shown)


def _result(stage: Stage, scores: np.ndarray, query: str, method: str, projected: bool, shown: int) -> Result:
    """The table of both ends of the order."""
    order = np.argsort(-scores, kind="stable")
    picked = [int(n) for n in (order if len(order) <= 2 * shown else [*order[:shown], *order[-shown:]])]
    share = scores / max(np.abs(scores).sum(), np.finfo(float).tiny)
    rows = [[stage.records[n].id[:20], float(scores[n]), 100 * float(share[n]), stage.text(n, 0, 32),
             stage.text(n, 1, 32)] for n in picked]
    notes = [f"positive: more weight on the pair raises {QUERIES[query]}",
             f"method {method}, read its order rather than its scale; gradients "
             f"{'projected to ' + str(_WIDTH) if projected else 'whole'}"]
    numbers = {"stage": stage.name, "query": query, "method": method, "projected": projected,
               "scores": [{"id": r.id, "place": r.place, "influence": float(s), "share": float(part)}
                          for r, s, part in zip(stage.records, scores, share, strict=True)]}
    return Result(numbers, f"{stage.name}: influence of {len(scores)} pairs on {QUERIES[query]}",
                  ["pair", "influence", "% of all sizes", "chosen", "rejected"], rows, notes,
                  lambda path: draw(share, QUERIES[query].split(",")[0], path))


def draw(scores: np.ndarray, query: str, path: pathlib.Path) -> pathlib.Path:
    """Pairs by falling influence, and what part of the total the largest ones make; scores: shares of the total."""
    figure = style.figure(8.4, 3.2)
    first, second = style.axes(figure, 1, 2, 1), style.axes(figure, 1, 2, 2)
    falling = 100 * np.sort(scores)[::-1]
    colours = [style.COLOURS[1] if s > 0 else style.COLOURS[0] for s in falling]
    first.bar(range(1, len(falling) + 1), falling, color=colours, width=0.85)
    first.axhline(0, color=style.MUTED, linewidth=0.8)
    first.set_xlabel("pairs, by falling influence (orange: raise it, blue: lower it)")
    first.set_ylabel(f"influence on {query} (% of all)")
    size = np.sort(np.abs(scores))[::-1]
    share = np.cumsum(size) / max(size.sum(), np.finfo(float).tiny)
    second.plot(np.arange(1, len(size) + 1), share, color=style.INK, linewidth=1.8)
    half = int(np.searchsorted(share, 0.5)) + 1
    second.plot([half, half], [0, 0.5], color=style.MUTED, linewidth=1.2, linestyle="--")
    second.text(half, 0.25, f" {half} of {len(size)} pairs\n make half of it", fontsize=style.TICK, color=style.INK)
    second.set_ylim(0, 1.02)
    second.set_xlabel("pairs, by falling size of influence")
    second.set_ylabel("share of all influence")
    return style.save(figure, path)
