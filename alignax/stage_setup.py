"""What a train stage starts from and what it leaves behind, shared by the loop of one run and that of a population."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alignax import checkpoint, context, data, distributed, losses, models, optim, sample, sharding, stage_data, step
from alignax import metrics as metrics_lib
from alignax.diagnostics import figures
from alignax.types import Batch, ConfigError

Records = tuple[list, list, dict[str, list]]


def records_of(ctx: context.Context, name: str, section: Mapping[str, Any]) -> Records:
    """Tokenised (train, eval) records of a stage, checked against its loss, and its further streams over both."""
    limits = stage_data.limits_of(section, ctx.spec.config.max_positions)
    loss = losses.from_section(section["loss"])
    train, held_out = stage_data.records(ctx, f"config.{name}", section["data"], limits=limits, loss=loss,
                                         batch_size=section["batch_size"])
    return train, held_out, stage_data.other_streams(ctx, f"config.{name}.data", section["data"], train + held_out,
                                                     loss=loss, limits=limits)


def adapters_of(section: Mapping[str, Any], where: str) -> models.AdapterConfig | None:
    """The stage's adapter settings, or None where it trains all parameters. where: the config key, for the message."""
    if not section["lora"]["rank"]:
        return None
    try:
        return models.AdapterConfig(**section["lora"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def total_steps(section: Mapping[str, Any], records: int, seed: int) -> int:
    """The stage's `steps`, or as many as its `epochs` take."""
    return section["steps"] or data.Plan(records, section["batch_size"], seed).num_steps(section["epochs"])


@dataclasses.dataclass
class Setup:
    """A train stage before its first update.

    section: the stage's settings as plain values. init: the stage (or `model`) that `start` are the parameters of.
    params: what the update changes; frozen: what the policy needs beside it ({} unless adapters are trained).
    cuts: (start, stop) of the evaluation's batches among the watched records, which begin at `watched` of `records`.
    cached: reference sums [n, K] of all records, where the stage computed them before.
    """

    ctx: context.Context
    name: str
    section: Mapping[str, Any]
    init: str
    loss: losses.Loss
    adapters: models.AdapterConfig | None
    spec: step.ModelSpec
    start: Any
    params: Any
    frozen: Any
    plan: data.Plan
    total: int
    train: list
    held_out: list
    others: dict[str, list]
    cuts: list[tuple[int, int]]
    laid: stage_data.Batches
    cached: np.ndarray | None

    @property
    def folder(self) -> pathlib.Path:
        """The stage's folder."""
        return self.ctx.stage_dir(self.name)

    @property
    def has_reference(self) -> bool:
        """Whether the update runs a reference of its own."""
        return self.section["reference"] in ("frozen", "adapter_off")

    @property
    def hyper(self) -> dict[str, np.float32]:
        """The loss's float hyper-parameters, which travel as arguments so that strengths share one program."""
        return {k: np.float32(v) for k, v in self.loss.hyper.items() if isinstance(v, float)}

    @property
    def eval_split(self) -> str:
        """The split that the evaluation's rows are named by: without held-out records, the first training records."""
        return "eval" if self.held_out else "eval_on_train"

    def eval_rows(self) -> list[np.ndarray]:
        """The evaluation's batches as indices into all records."""
        first = len(self.train) if self.held_out else 0
        return [first + np.arange(a, b) for a, b in self.cuts]

    def rows(self, index: Sequence[int]) -> tuple[list, dict[str, np.ndarray] | None, dict[str, list]]:
        """What `Batches.make` takes for the records `index` (training records first, then held-out ones)."""
        count = len(self.train)
        pick = lambda i: self.train[i] if i < count else self.held_out[i - count]
        extra = None if self.cached is None else {"ref_logps": self.cached[index]}
        return [pick(i) for i in index], extra, {n: [other[i] for i in index] for n, other in self.others.items()}

    def make(self, index: Sequence[int]) -> Batch:
        """The batch of the records `index`, on the devices."""
        return self.laid.make(*self.rows(index))


def prepare(ctx: context.Context, name: str, section: Mapping[str, Any], previous: str, records: Records | None, *,
            start: Any = None, cached: np.ndarray | None = None) -> Setup:
    """Records, model, adapters, plan and layout of a train stage; writes reference.npz where the reference is
    precomputed.

    previous: the stage before. records: of `records_of`, None to read them here. start: the parameters of the stage
    that it starts from, cached: the reference sums of its records, where somebody has them already.
    """
    train, held_out, others = records or records_of(ctx, name, section)
    loss = losses.from_section(section["loss"])
    init = previous if section["init"] == "previous" else section["init"]
    start = ctx.params_of(init) if start is None else start
    adapters = adapters_of(section, f"config.{name}.lora")
    spec = dataclasses.replace(ctx.spec, adapters=adapters)
    params, frozen = start, {}
    if adapters is not None:
        params, frozen = {"adapters": models.init_adapters(start["model"], adapters, jax.random.key(ctx.seed))}, start
    params = params | models.init_heads(loss.requests, spec.config.hidden_size, spec.config.vocab_size,
                                        jax.random.key(ctx.seed))
    size, layout, accumulation = section["batch_size"], section["layout"], section["accumulation"]
    plan = data.Plan(len(train), size, ctx.seed)
    total = total_steps(section, len(train), ctx.seed)
    watched = held_out or train[:size]
    cuts = stage_data.eval_cuts(len(watched), size, stage_data.row_groups(ctx.mesh, layout, accumulation))
    if len(watched) != (used := cuts[-1][1] if cuts else 0):
        ctx.console.print(f"{name}: evaluation uses {used} of {len(watched)} records, a multiple of the devices")
    laid = stage_data.batches(ctx, train, held_out, loss=loss, plan=plan, steps=total, eval_cuts=cuts, layout=layout,
                              shapes=section["shapes"], bucket_multiple=section["bucket_multiple"],
                              accumulation=accumulation, others=others)
    made = Setup(ctx, name, section, init, loss, adapters, spec, start, params, frozen, plan, total, train, held_out,
                 others, cuts, laid, cached)
    if section["reference"] == "precomputed" and cached is None:
        made.cached = _precompute(ctx, laid, start, train + held_out, made.folder, size)
    return made


def optimizer_of(section: Mapping[str, Any], total: int):
    """The stage's optax optimiser for a run of `total` steps."""
    return optim.from_section(section["optim"], total)


def _precompute(ctx: context.Context, laid: stage_data.Batches, params, records: list, folder: pathlib.Path,
                batch_size: int) -> np.ndarray:
    """Reference sums [n, K] of all records, kept in the stage's folder under a fingerprint of model and data."""
    mark = context.fingerprint({"model": distributed.to_host(params["model"]),
                                "tokens": [np.concatenate([r.prompt, *r.completions]) for r in records]})
    path = folder / "reference.npz"
    if distributed.from_main("reference", path.exists()):
        with np.load(path) as stored:
            if str(stored["mark"]) != mark:
                raise ConfigError(f"{path}: these reference log-probs are of another model or other data; remove the "
                                  "file to compute them again")
            return stored["logps"]
    score = jax.jit(step.make_evaluate(ctx.spec, None))
    out = []
    # These batches are not the plan's: packed ones may need other rows than those that were planned.
    laid = dataclasses.replace(laid, mismatched=False, shape=None if stage_data.packs(laid.layout) else laid.shape)
    for start in range(0, len(records), batch_size):
        batch = laid.make([records[i % len(records)] for i in range(start, start + batch_size)])
        out.append(distributed.to_host(score({"model": params["model"]}, None, batch, {}, None, None)[1]["logps"]))
    logps = np.concatenate(out)[:len(records)]
    if distributed.is_main():
        with checkpoint.disk(str(path)):
            part = path.with_suffix(".part.npz")
            np.savez(part, logps=logps, mark=mark)
            part.replace(path)
    return logps


def probe_batch(setup: Setup) -> Batch | None:
    """Up to 64 training prompts with chosen, rejected and unseen completions, where the data has unseen ones."""
    ctx, section = setup.ctx, setup.section
    if not section["data"]["path"].startswith("stage:") or setup.loss.info.chosen_only:
        return None
    unseen = sample.read_unseen(ctx.stage_dir(section["data"]["path"][len("stage:"):]))
    both = [(r, unseen[r.id]) for r in setup.train if r.id in unseen][:64]
    ways = sharding.batch_ways(ctx.mesh)
    records = [dataclasses.replace(r, completions=(*r.completions[:2], u), scores=None, labels=None,
                                   completion_ended=(*r.completion_ended[:2], ctx.text.ended(u)))
               for r, u in both[:len(both) // ways * ways]]
    if not records:
        return None
    columns, slots = data.bucket_shape(records, section["bucket_multiple"])
    batch = data.padded(records, K=3, T=columns, L=slots, pad_id=ctx.text.pad_id)
    return sharding.shard_batch(batch, ctx.mesh)


def make_probe(spec: step.ModelSpec):
    """The evaluation of a probe's batch, to be jitted: what `probe_numbers` reads."""
    return step.make_evaluate(spec, None, diagnostics=("ref_logps", "ref_policy_kl"))


def probe_numbers(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Change of log-likelihood since the reference: chosen, rejected, unseen, and the baseline -KL(ref||policy).

    arrays: `logps` and `ref_logps` [B,3], `ref_policy_kl` [B,3,L]. The unseen completions are samples of the reference,
    so their expected change is exactly -KL(ref||policy) for any training; the baseline is the same expectation with
    the vocabulary sum done exactly at each prefix.
    """
    change = arrays["logps"] - arrays["ref_logps"]
    sides = ("chosen", "rejected", "unseen")
    out = {side: float(change[:, k].mean()) for k, side in enumerate(sides)}
    out["baseline"] = -float(arrays["ref_policy_kl"][:, 2].sum(-1).mean())
    return out | {f"logp_{side}": float(arrays["logps"][:, k].mean()) for k, side in enumerate(sides)}


def finish(setup: Setup, params: Any, *, evaluated: Mapping[str, float], compilations: int,
           drawn: bool = True) -> dict[str, Any]:
    """Writes the stage's parameters and (`drawn`) its figures; returns the stage's result."""
    ctx, name = setup.ctx, setup.name
    context.save_stage_params(setup.folder, params, base=setup.init, adapters=setup.adapters)
    rows = metrics_lib.read_metrics(ctx.workdir, stage=name) if distributed.is_main() else []
    history = [r for r in rows if r["split"] == "train"]
    if history and drawn:
        figures.training_curves(history, ctx.workdir / "figures" / f"{name}_training.png")
    watched = [r for r in rows if r["split"] == "probe"]
    if watched and drawn:
        series = {k: np.asarray([r[k] for r in watched]) for k in ("chosen", "rejected", "unseen") if k in watched[0]}
        figures.displacement(np.asarray([r["step"] for r in watched]), series,
                             np.asarray([r["baseline"] for r in watched]),
                             ctx.workdir / "figures" / f"{name}_displacement.png")
    final = {k: history[-1][k] for k in ("loss", "accuracy", "margin") if history and k in history[-1]}
    return {"steps": setup.total, "records": len(setup.train), "compilations": compilations, "train": final,
            "eval": dict(evaluated), "fingerprint": context.fingerprint(distributed.to_host(
                params["model" if setup.adapters is None else "adapters"]))}
