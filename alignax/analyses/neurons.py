"""Which MLP neurons carry what a preference stage changed: projections, activation patching, un-aligning by scaling.

After 2401.01967 and 2411.06424 with a probe of rejected against chosen in the place of a probe of toxicity, on the
positions that predict the pairs' tokens in the place of sampled ones.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import models, step
from alignax.analyses.of_run import Result, Stage
from alignax.diagnostics import neurons, probes, style
from alignax.types import Batch, ConfigError

_TOP, _FACTOR = 7, 10.0  # value vectors whose keys are scaled, and by how much: those of the toxicity study
_LEAST = 8
_MARKS = (0.5, 0.75, 0.99)


def analyse(stage: Stage) -> Result:
    """A direction W towards the rejected, what each neuron writes along it before and after the stage, the four groups
    of neurons that lower the projection, and the policies that patching and scaling make.

    Raises ConfigError for fewer than 8 pairs.
    """
    if len(stage.records) < _LEAST:
        raise ConfigError(f"{stage.name}: found {len(stage.records)} pairs of different prompts; allowed: {_LEAST} or "
                          "more (a probe is fitted on one half and tested on the other)")
    config, spec = stage.ctx.spec.config, stage.ctx.spec
    start, end = stage.before["model"], stage.after["model"]
    look = jax.jit(functools.partial(_activations, spec))
    seen = {name: stage.each(lambda batch, p=p: look(p, batch)) for name, p in (("start", start), ("end", end))}
    probe, accuracy = _probe(seen["start"]["states"])
    direction = neurons.before_norm(config, start, jnp.asarray(probe, jnp.float32))
    means = {name: jnp.asarray(found["inner"].astype(np.float64).sum(0) / found["count"].sum(), jnp.float32).reshape(-1)
             for name, found in seen.items()}
    values = neurons.values(start).astype(jnp.float32)
    change = np.asarray(probes.neuron_projections(means["start"], values, direction)
                        - probes.neuron_projections(means["end"], values, direction), np.float64)
    groups = {name: np.asarray(which) for name, which in probes.neuron_groups(
        means["start"], means["end"], values, direction).items()}
    gain = float(change[change > 0].sum())
    told = {name: {"neurons": int(which.sum()), "reduction": float(change[which].sum()),
                   "share": float(change[which].sum() / gain) if gain else 0.0} for name, which in groups.items()}
    policies = _policies(stage, start, end, groups, means["end"], values, direction)
    notes = [f"probe of rejected against chosen: accuracy {accuracy:.2f} on the other half of the pairs (chance 0.5)",
             f"the four groups lower the projection by {gain:.4g}, all neurons together by {change.sum():.4g}",
             *(f"{name}: {g['neurons']} neurons, {100 * g['share']:.0f}% of the groups' reduction"
               for name, g in told.items())]
    rows = [[name, *found.values()] for name, found in policies.items()]
    numbers = {"stage": stage.name, "from": stage.init, "pairs": len(stage.records), "probe_accuracy": accuracy,
               "reduction": float(change.sum()), "groups": told, "policies": policies,
               "neurons": [{"layer": int(n) // config.intermediate_size, "neuron": int(n) % config.intermediate_size,
                            "reduction": float(change[n])} for n in np.argsort(-np.abs(change))[:50]]}
    return Result(numbers, f"{stage.name}: policies made by patching and scaling",
                  ["policy", "margin (nats)", "chosen / token", "rejected / token"], rows, notes,
                  lambda path: draw(change, told, policies, path))


def _activations(spec: step.ModelSpec, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """Of each pair: sums over its scored slots of every neuron's activation [B, layers, F], their number [B], and the
    mean states of both completions [B,2,D]."""
    stream = batch.streams["pair"]

    def total(inner):
        return jnp.where(stream.mask[..., None], step.gather_slots(inner, stream), 0).sum((1, 2))

    hidden, inner = neurons.read(spec.config, params, stream, total)
    states = jnp.where(stream.mask[..., None], step.gather_slots(hidden, stream), 0).sum(2)
    count = stream.mask.sum(-1)
    return {"inner": jnp.swapaxes(inner, 0, 1), "count": count.sum(-1),
            "states": states / jnp.maximum(count, 1)[..., None]}


def _probe(states: np.ndarray) -> tuple[np.ndarray, float]:
    """([D] towards the rejected, accuracy on the odd pairs of a probe fitted on the even ones); states [n,2,D]."""
    flat = lambda part: (part.reshape(-1, part.shape[-1]).astype(np.float64) / states.std(),
                         np.tile([0.0, 1.0], len(part)))
    fitted = probes.fit_probe(*flat(states[::2]))
    return probes.fit_probe(*flat(states)).weight, fitted.accuracy(*flat(states[1::2]))


def _policies(stage: Stage, start, end, groups, means, values, direction) -> dict[str, dict[str, float]]:
    """Name -> margin and log-probs per token of both ends, of the start with groups patched, of the end un-aligned."""
    spec, none = stage.ctx.spec, np.zeros(len(values), bool)

    @jax.jit
    def numbers(params, chosen, means, batch):
        stream = batch.streams["pair"]
        states = step.gather_slots(neurons.patched(spec.config, params, stream, chosen, means), stream)

        def one(item):  # one pair's logits at a time
            hidden, targets = item
            logp = jax.nn.log_softmax(models.logits(spec.config, params, hidden) / spec.temperature)
            return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]

        logp = jnp.where(stream.mask, jax.lax.map(one, (states, stream.targets)), 0).sum(-1)
        return {"logp": logp, "per_token": logp / jnp.maximum(stream.mask.sum(-1), 1)}

    nearest = none.copy()
    nearest[np.asarray(probes.top_values(values, direction, _TOP))] = True
    every = np.logical_or.reduce(list(groups.values()))
    made = {"start": (start, none), **{f"start, {name} patched": (start, which) for name, which in groups.items()},
            "start, all four patched": (start, every), "end": (end, none),
            "end, half of the change undone": (probes.extrapolate(start, end, -0.5), none),
            f"end, keys of the nearest {_TOP} x {_FACTOR:g}": (neurons.scale_keys(end, nearest, _FACTOR), none)}
    out = {}
    for name, (params, chosen) in made.items():
        found = stage.each(lambda batch, p=params, c=chosen: numbers(p, jnp.asarray(c), means, batch))
        logp, per_token = found["logp"].astype(np.float64), found["per_token"].astype(np.float64)
        out[name] = {"margin": float((logp[:, 0] - logp[:, 1]).mean()), "chosen": float(per_token[:, 0].mean()),
                     "rejected": float(per_token[:, 1].mean())}
    return out


def draw(change: np.ndarray, groups: dict, policies: dict, path: pathlib.Path) -> pathlib.Path:
    """Share of the reduction by the neurons that reduce most; by group; margins of the policies less the start's."""
    figure = style.figure(11.6, 3.4)
    first, second, third = (style.axes(figure, 1, 3, place) for place in (1, 2, 3))
    falling = np.sort(change[change > 0])[::-1]
    share = np.cumsum(falling) / max(falling.sum(), np.finfo(float).tiny)
    first.plot(np.arange(1, len(share) + 1), share, color=style.COLOURS[0], linewidth=1.8)
    for mark in _MARKS:
        if len(share):
            at = min(int(np.searchsorted(share, mark)), len(share) - 1) + 1
            first.plot([1, at, at], [mark, mark, 0], color=style.MUTED, linewidth=0.8, linestyle="--")
            first.text(at, mark - 0.02, f" {at} make {mark:.0%}", fontsize=style.NOTE, color=style.INK, va="top")
    first.set_xlim(0, 1.45 * max(len(share), 1))
    first.set_ylim(0, 1.05)
    first.set_xlabel(f"neurons that reduce the projection ({len(share)} of {len(change)})")
    first.set_ylabel("share of their reduction")
    second.bar(list(groups), [100 * g["share"] for g in groups.values()], color=style.COLOURS[:4], width=0.7)
    for place, g in enumerate(groups.values()):
        second.text(place, 100 * g["share"], f"{g['neurons']}", ha="center", va="bottom", fontsize=style.NOTE,
                    color=style.INK)
    second.set_ylabel("% of the reduction (number: neurons)")
    second.set_xlabel("group")
    names = list(policies)
    colours = [style.COLOURS[0] if name.startswith("start") else style.COLOURS[1] for name in names]
    moved = [found["margin"] - policies["start"]["margin"] for found in policies.values()]
    third.barh(range(len(names)), moved, color=colours, height=0.7)
    third.set_yticks(range(len(names)), names, fontsize=style.NOTE)
    third.invert_yaxis()
    third.axvline(0, color=style.MUTED, linewidth=0.8)
    third.grid(False, axis="y")
    third.set_xlabel("margin less the start's (nats)")
    return style.save(figure, path)
