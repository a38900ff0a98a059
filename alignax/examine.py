"""A finished run looked at from outside: both ends of a preference stage scored on fresh samples of where it began.

Reads a run's folder and changes nothing in it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from alignax import configs, context, data, losses, sample, scoring, sharding, stage_setup, step, train, watch
from alignax.diagnostics import agreement, ches
from alignax.ops.reductions import reduce_terms
from alignax.types import REQUESTS, ConfigError, DataError

_SALT, _CHUNK = 9000, 8  # draws of no other stage; prompts scored at a time


def open_run(folder: pathlib.Path, console: Console) -> tuple[context.Context, ConfigDict]:
    """The context and config of a run's folder. Raises ConfigError where it holds no run."""
    plain = configs.of_run(folder)
    # Where kernels are at home may differ from where the run was trained.
    plain["model"]["attention"] = "auto"
    plain["mesh"] |= {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    config = ConfigDict(_frozen(plain))
    return train.make_context(config, folder, console, devices=jax.devices()[:1]), config


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that a config holds."""
    if isinstance(value, dict):
        return {key: _frozen(one) for key, one in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def preference_stages(folder: pathlib.Path, config: ConfigDict) -> list[str]:
    """The finished train stages whose loss compares completions, in their order."""
    names = []
    for name in context.finished_stages(folder, config.stages):
        loss = losses.from_section(config[name].loss.to_dict())
        if not loss.info.chosen_only and "rewards" not in loss.requests:
            names.append(name)
    return names


def choose(folder: pathlib.Path, config: ConfigDict, stage: str) -> list[str]:
    """The stages to report: `stage`, or all; ConfigError with the legal names where there are none."""
    known = preference_stages(folder, config)
    if stage and stage not in known or not known:
        raise ConfigError(f"{folder}: stage {stage or '(any)'} is no finished preference stage; allowed: "
                          f"{', '.join(known) or 'none: no finished stage has a loss of pairs'}")
    return [stage] if stage else known


def stage(ctx: context.Context, config: ConfigDict, name: str, *, prompts: int, samples: int) -> dict[str, Any]:
    """What the report says of one stage, as plain numbers and arrays.

    prompts: up to so many, spread evenly over the stage's training prompts; samples: fresh completions of each, drawn
    from the parameters that the stage began with. Returns change (side -> log-ratios [n] to the start in nats, sides
    chosen, rejected, fresh, greedy), baseline [n] (-KL(start||end) on the fresh samples, exact at each of their
    prefixes), lengths, probabilities of the greedy completion, entropy, ches, agreement, and slopes where the loss is
    a function of the pair's log-probs. Raises DataError where no record has two completions.
    """
    section = config[name].to_dict()
    records, init = pair_records(ctx, config, name, section)
    before, after = ctx.params_of(init), ctx.params_of(name)
    picked = spread(records, prompts, name)
    asked = [(r.id, r.prompt) for r in picked]
    room = min(ctx.spec.config.max_positions - max(len(r.prompt) for r in picked), max(r.longest for r in picked))
    draw = lambda count, temperature: sample.draw(
        ctx, f"{name}: fresh samples", before, asked, num_samples=count, max_new_tokens=room, temperature=temperature,
        top_p=1.0, batch_size=min(len(asked), 64), salt=_SALT)[0].tokens
    drawn, greedy = draw(samples, 1.0), draw(1, 0.0)
    texts = [watch.extended(r, (*drawn[i], greedy[i][0]), ctx.text) for i, r in enumerate(picked)]
    found = _score(ctx, before, after, texts, samples + 3)
    change = found["logps"] - found["ref_logps"]
    fresh = slice(2, 2 + samples)
    loss = losses.from_section(section["loss"])
    pair = {key: found[key][:, :2] for key in ("logps", "ref_logps", "lengths")}
    beta = loss.hyper.get("beta")
    return {
        "stage": name, "from": init, "loss": loss.name, "hyper": dict(loss.hyper), "prompts": len(picked),
        "samples": samples,
        "change": {"chosen": change[:, 0], "rejected": change[:, 1], "fresh": change[:, fresh].mean(1),
                   "greedy": change[:, -1]},
        "baseline": -found["kl"][:, fresh].mean(1),
        "lengths": {"chosen": float(found["lengths"][:, 0].mean()), "rejected": float(found["lengths"][:, 1].mean()),
                    "fresh": float(found["lengths"][:, fresh].mean()), "greedy": float(found["lengths"][:, -1].mean())},
        "greedy": (float(np.exp(found["ref_logps"][:, -1]).mean()), float(np.exp(found["logps"][:, -1]).mean())),
        "entropy": (float(found["entropy_before"][:, fresh].sum() / found["lengths"][:, fresh].sum()),
                    float(found["entropy"][:, fresh].sum() / found["lengths"][:, fresh].sum())),
        "ches": {"scores": found["ches"], "correlation": float(agreement.correlation(
            jnp.asarray(found["ches"]), jnp.asarray(change[:, 0])))},
        "agreement": {key: float(value) for key, value in agreement.numbers(
            *(jnp.asarray(pair[key]) for key in ("logps", "ref_logps", "lengths")), beta).items()},
        "slopes": _slopes(ctx, loss, picked, pair),
    }


def pair_records(ctx: context.Context, config: ConfigDict, name: str, section: Mapping[str, Any]) -> tuple[list, str]:
    """The stage's training records as pairs, chosen first, and the stage that it starts from. Training reads the order
    of completions, whatever their scores say (labels may be drawn), so that these are the first two."""
    before = "model"
    for other in config.stages[:config.stages.index(name)]:
        before = other if config[other].kind == "train" else before
    init = before if section["init"] == "previous" else section["init"]
    quiet = dataclasses.replace(ctx, console=Console(quiet=True))  # what a run says of its records, it has said
    records = stage_setup.records_of(quiet, name, section)[0]
    pairs = [scoring.only(r, (0, 1)) for r in records if len(r.completions) >= 2]
    if not pairs:
        raise DataError(f"config.{name}.data: no record has two completions; a report compares chosen and rejected")
    return pairs, init


def spread(records: Sequence[data.TokenRecord], count: int, name: str) -> list[data.TokenRecord]:
    """Up to `count` records of different prompts, evenly over their order."""
    distinct = list({r.prompt.tobytes(): r for r in reversed(records)}.values())[::-1]
    if count < 2:
        raise ConfigError(f"--prompts={count}: {name} needs an interval over prompts; allowed: 2 or more")
    index = np.unique(np.linspace(0, len(distinct) - 1, min(count, len(distinct))).round().astype(int))
    return [distinct[i] for i in index]


def _score(ctx: context.Context, before, after, texts: Sequence[data.TokenRecord], count: int) -> dict[str, np.ndarray]:
    """Arrays [n, K] of both ends on all completions, and CHES [n] of the start, prompts a few at a time."""
    columns, slots = data.bucket_shape(texts, 8)

    @jax.jit
    def one(before, after, batch):
        found = step.compute(ctx.spec, after, before, batch,
                             {"logps", "ref_logps", "lengths", "ref_policy_kl", "entropy"})
        start = step.compute(ctx.spec, before, None, batch, {"entropy", "hidden", "mask"})
        _, normalised = ches.ches(start["hidden"][:, :2], start["mask"][:, :2])
        return {"logps": found["logps"], "ref_logps": found["ref_logps"], "lengths": found["lengths"],
                "kl": found["ref_policy_kl"].sum(-1), "entropy": found["entropy"].sum(-1),
                "entropy_before": start["entropy"].sum(-1), "ches": normalised}

    out = []
    for first in range(0, len(texts), _CHUNK):
        index = np.arange(first, first + _CHUNK) % len(texts)
        batch = data.padded([texts[i] for i in index], K=count, T=columns, L=slots, pad_id=ctx.text.pad_id)
        out.append(jax.device_get(one(before, after, sharding.shard_batch(batch, ctx.mesh))))
    return {key: np.concatenate([np.asarray(part[key]) for part in out])[:len(texts)] for key in out[0]}


def _slopes(ctx: context.Context, loss: losses.Loss, picked, pair: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Where -> (d_w, d_l, log10 |dl/dp|, log10 |dl/dq|) [n] at the stage's start and end; None where the loss reads
    more than the pair's log-probs and what the records say.

    l is a pair's loss, d_w = -dl/dlog pi(chosen), d_l = dl/dlog pi(rejected), p and q the two probabilities.
    """
    told = {n for n in loss.requests if REQUESTS[n].provider == "data" and REQUESTS[n].axes in ("B", "BK")}
    if "logps" not in loss.requests or set(loss.requests) - told - {"logps", "ref_logps"}:
        return None
    columns, slots = data.bucket_shape(picked, 8)
    batch = data.padded(picked, K=2, T=columns, L=slots, pad_id=ctx.text.pad_id)
    given = step.compute(ctx.spec, {"model": ctx.initial["model"]}, None, batch, told) if told else {}
    count = len(picked)

    @jax.jit
    def slope(logps, ref):
        held = {**given, "ref_logps": ref}
        return count * jax.grad(lambda x: reduce_terms(loss({**held, "logps": x}))[0])(logps)

    out = {}
    for where, logps in (("start", pair["ref_logps"]), ("end", pair["logps"])):
        found = np.asarray(slope(jnp.asarray(logps), jnp.asarray(pair["ref_logps"])), np.float64)
        with np.errstate(divide="ignore"):
            size = (np.log(np.abs(found)) - logps) / np.log(10)
        out[where] = (-found[:, 0], found[:, 1], size[:, 0], size[:, 1])
    return out
