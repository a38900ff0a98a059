"""The only loop: a run is a list of stages, each resumed where it stopped.

Below this file there are plain arguments; above it, a config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from alignax import (
    checkpoint,
    configs,
    context,
    data,
    distributed,
    evaluate,
    losses,
    memory,
    models,
    optim,
    presence,
    reference,
    sample,
    sharding,
    stage_data,
    step,
)
from alignax import metrics as metrics_lib
from alignax.diagnostics import figures
from alignax.types import ConfigError, DataError


def run(config: ConfigDict, workdir: pathlib.Path | str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs or resumes all stages of `config` in `workdir`, and returns the contents of result.json.

    A finished run returns at once. Raises ConfigError or DataError before any long work where something cannot
    work, also when `workdir` holds a run of another config or is in use; context.Preempted after SIGTERM, when
    everything is saved; FloatingPointError at a non-finite step; checkpoint.DiskError where something cannot be
    written; memory.OutOfMemory. With many processes (see alignax.distributed) every one of them calls this alike.
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    general = configs.staged(config)
    if general is not config:
        try:
            return run(general, workdir, console=console)
        except (ConfigError, DataError) as error:  # name the keys as they stand in the user's file
            raise type(error)(str(error).replace(f"config.{configs.SINGLE}.", "config.")) from error
    configs.check(config)
    plain = json.loads(json.dumps(config.to_dict(), default=list))
    distributed.agree("the config", plain)
    _claim(workdir, plain)
    result_path = workdir / "result.json"
    if distributed.from_main("finished", result_path.exists()):
        console.print(f"{workdir}: finished already; result.json stands")
        return json.loads(result_path.read_text(encoding="utf-8"))
    if config.deterministic and jax.default_backend() == "gpu":
        _check_deterministic()
    tokenizer = context.load_tokenizer(config.tokenizer, config.model.path)
    spec, initial = context.load_model(config.model.to_dict(), vocab_size=tokenizer.vocab_size, seed=config.seed)
    data.check_vocab(tokenizer, spec.config.vocab_size)
    text = context.text_policy(tokenizer, config.model.path, **config.text.to_dict())
    sizes = {k: v for k, v in config.mesh.items() if v and k != "rules"}
    mesh = sharding.make_mesh(sizes)
    models.check_remat(spec.remat, mesh.devices.flat[0], "config.model.remat")
    spec = dataclasses.replace(spec, activations=sharding.over_batch(mesh) if mesh.size > 1 else None)
    ctx = context.Context(workdir=workdir, spec=spec, initial=initial, tokenizer=tokenizer, text=text,
                          tokenizer_source=context.template_place(config.tokenizer, config.model.path),
                          mesh=mesh, seed=config.seed, console=console, stop=context.Stop(),
                          rules=sharding.check_rules(config.mesh.rules, "config.mesh.rules"))
    prepared = {}
    previous = "model"
    policy_before = {}
    for name in config.stages:  # everything that can be refused is refused here
        policy_before[name] = previous
        stage = config[name]
        if stage.kind == "train":
            loss = losses.from_section(stage.loss.to_dict())
            reference.check(stage.reference, loss.requests, lora=stage.lora.rank > 0, where=f"config.{name}.reference")
            if (adapters := _adapters(stage, f"config.{name}.lora")) is not None:
                jax.eval_shape(lambda: models.init_adapters(initial["model"], adapters, jax.random.key(0)))  # noqa: B023
            _optimizer(stage, max(stage.steps, stage.optim.warmup_steps))
            made_by = None
            if stage.data.path.startswith("stage:"):
                earlier = [s for s in config.stages[:config.stages.index(name)] if config[s].kind == "sample"]
                if stage.data.path[len("stage:"):] not in earlier:
                    raise ConfigError(f"config.{name}.data.path={stage.data.path!r} is not an earlier sample stage; "
                                      f"allowed: {', '.join('stage:' + s for s in earlier) or 'a file'}")
                source = stage.data.path[len("stage:"):]
                made_by = config[source].to_dict()
                if made_by["policy"] in ("previous", ""):
                    made_by["policy"] = policy_before[source]
            stage_data.check_streams(f"config.{name}", loss, stage.data.path, made_by=made_by,
                                     start=previous if stage.init == "previous" else stage.init)
            if made_by is None:
                prepared[name] = _records(ctx, name, stage)
                _optimizer(stage, _total_steps(stage, len(prepared[name][0]), ctx.seed))
            previous = name
        else:
            sample.check(ctx, name, stage.to_dict(), split="train" if stage.kind == "sample" else "eval")
    distributed.barrier("checked")  # nobody has written anything yet
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            if note := held.enter_context(presence.locked(workdir)):
                console.print(note, markup=False)
            _claim(workdir, plain)  # another run may have come first
            if not (workdir / "config.json").exists():
                checkpoint.write_json(workdir / "config.json", plain)
            checkpoint.write_json(workdir / "environment.json", context.environment())
            (workdir / "figures").mkdir(exist_ok=True)
        distributed.barrier("claimed")
        summary = _stages(ctx, config, policy_before, prepared)
        if distributed.is_main():
            checkpoint.write_json(result_path, summary)
        distributed.barrier("finished")
    return summary


def _stages(ctx: context.Context, config: ConfigDict, policy_before: dict[str, str], prepared: dict) -> dict[str, Any]:
    """Runs the stages that are not done yet, one after another; returns what result.json holds."""
    results, console = {}, ctx.console
    with ctx.stop.listening():
        for number, name in enumerate(config.stages):
            stage, done = config[name], ctx.stage_dir(name) / "done.json"
            stored = json.loads(done.read_text(encoding="utf-8")) if distributed.is_main() and done.exists() else None
            if (stored := distributed.from_main(f"{name} done", stored)) is not None:
                results[name] = stored
                continue
            distributed.at(f"in {name}")
            ctx.stage_dir(name).mkdir(parents=True, exist_ok=True)
            console.rule(f"[bold]{name}[/] ({stage.kind}, stage {number + 1} of {len(config.stages)})", align="left")
            began = time.monotonic()
            with checkpoint.disk(f"{name}: a file of the stage in {ctx.workdir}"):
                if stage.kind == "train":
                    out = _train(ctx, name, stage, policy_before[name], prepared.pop(name, None),
                                 tuple(config.profile_steps))
                else:
                    plain_stage = stage.to_dict()
                    plain_stage.pop("kind")
                    for key in ("policy", "baseline"):
                        if plain_stage.get(key) in ("previous", ""):
                            plain_stage[key] = policy_before[name]
                    out = {"sample": sample.run, "evaluate": evaluate.run}[stage.kind](ctx, name, **plain_stage)
            out |= {"seconds": round(time.monotonic() - began, 2)}
            results[name] = distributed.from_main(f"{name} result", out)
            if distributed.is_main():
                checkpoint.write_json(done, results[name])
    summary = {"stages": results}
    for name in config.stages:
        if config[name].kind == "evaluate":
            summary |= results[name]["headline"]
    return summary


def _claim(workdir: pathlib.Path, plain: dict) -> None:
    """Refuses a folder that holds a run of another config, listing the keys that differ."""
    stored = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; it has to be a folder, or not to exist")
    if not stored.exists():
        # A run that was killed while it claimed the folder may have left half of its config.
        if workdir.exists() and any(p.name != "config.json.part" and not p.name.startswith(presence.LOCK)
                                    for p in workdir.iterdir()):
            raise ConfigError(f"--workdir={workdir} is not empty and holds no run of alignax; nothing was written")
        return
    old = _flat(json.loads(stored.read_text(encoding="utf-8")))
    new = _flat(plain)
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k, "absent") != new.get(k, "absent"))
    if differ:
        shown = "; ".join(f"{k}: stored {old.get(k, 'absent')!r}, given {new.get(k, 'absent')!r}" for k in differ[:6])
        raise ConfigError(f"--workdir={workdir} holds a run of another config ({len(differ)} keys differ: {shown}); "
                          "choose another folder. Nothing was written")


def _flat(tree: Any, prefix: str = "config") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}").items()}
    return {prefix: tree}


def _check_deterministic() -> None:
    import os

    if "--xla_gpu_deterministic_ops=true" not in os.environ.get("XLA_FLAGS", ""):
        raise ConfigError("config.deterministic on a GPU needs XLA_FLAGS=--xla_gpu_deterministic_ops=true")


def _records(ctx: context.Context, name: str, stage: ConfigDict) -> tuple[list, list, dict[str, list]]:
    """Tokenised (train, eval) records of a stage, checked against its loss, and its further streams over both."""
    section, limits = stage.to_dict(), stage_data.limits_of(stage.to_dict(), ctx.spec.config.max_positions)
    loss = losses.from_section(section["loss"])
    train, held_out = stage_data.records(ctx, f"config.{name}", section["data"], limits=limits, loss=loss,
                                         batch_size=stage.batch_size)
    return train, held_out, stage_data.other_streams(ctx, f"config.{name}.data", section["data"], train + held_out,
                                                     loss=loss, limits=limits)


def _train(ctx: context.Context, name: str, stage: ConfigDict, previous: str, prepared, profile_steps) -> dict:
    """One train stage; returns its result and leaves params/ in the stage's folder."""
    folder = ctx.stage_dir(name)
    train, held_out, others = prepared or _records(ctx, name, stage)
    loss = losses.from_section(stage.loss.to_dict())
    init = previous if stage.init == "previous" else stage.init
    start = ctx.params_of(init)
    adapters = _adapters(stage, f"config.{name}.lora")
    spec = dataclasses.replace(ctx.spec, adapters=adapters)
    # What the update changes, and what the policy needs beside it.
    params, frozen = start, {}
    if adapters is not None:
        params, frozen = {"adapters": models.init_adapters(start["model"], adapters, jax.random.key(ctx.seed))}, start
    params = params | models.init_heads(loss.requests, spec.config.hidden_size, spec.config.vocab_size,
                                        jax.random.key(ctx.seed))
    plan = data.Plan(len(train), stage.batch_size, ctx.seed)
    total = _total_steps(stage, len(train), ctx.seed)
    optimizer = _optimizer(stage, total)
    state = _committed(ctx, step.TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params),
                                            loss.init_state()))
    ref = None
    if stage.reference in ("frozen", "adapter_off"):
        ref = frozen or ctx.place(params)
    # Float hyper-parameters travel as arguments, so that strengths of one loss share one program. What goes into a step
    # is put on the devices before, so that the step itself moves nothing (and runs under a transfer guard).
    hyper = distributed.replicated({k: np.float32(v) for k, v in loss.hyper.items() if isinstance(v, float)}, ctx.mesh)
    # The state leaves an update as it came: a sharding that the compiler chose would compile the next step again.
    update = jax.jit(step.make_update(spec, loss, optimizer, accumulation=stage.accumulation), donate_argnums=0,
                     out_shardings=(jax.tree.map(lambda a: a.sharding, state), None))
    kl = ("ref_policy_kl",) if ref is not None else ()
    evaluate_fn = jax.jit(step.make_evaluate(spec, loss, diagnostics=("entropy",) + kl))
    draw = jax.jit(lambda n: jax.random.fold_in(jax.random.key(ctx.seed), n),
                   out_shardings=distributed.replicated_over(ctx.mesh))
    key_of = lambda n: draw(distributed.replicated(np.uint32(n), ctx.mesh))  # the key of update n, of the seed alone
    # Without held-out records the same numbers are taken on the first training records, and named so.
    watched, start_row = (held_out, len(train)) if held_out else (train[:stage.batch_size], 0)
    cuts = stage_data.eval_cuts(len(watched), stage.batch_size, stage_data.row_groups(
        ctx.mesh, stage.layout, stage.accumulation))
    if len(watched) != (cuts[-1][1] if cuts else 0):
        ctx.console.print(f"{name}: evaluation uses {cuts[-1][1] if cuts else 0} of {len(watched)} records, a multiple "
                          "of the devices")
    laid = stage_data.batches(ctx, train, held_out, loss=loss, plan=plan, steps=total, eval_cuts=cuts,
                              layout=stage.layout, shapes=stage.shapes, bucket_multiple=stage.bucket_multiple,
                              accumulation=stage.accumulation, others=others)
    every = train + held_out
    cached = None
    if stage.reference == "precomputed":
        cached = _precompute(ctx, laid, start, every, folder, stage.batch_size)

    def make(rows):
        extra = None if cached is None else {"ref_logps": cached[rows]}
        return laid.make([every[i] for i in rows], extra,
                         {name: [other[i] for i in rows] for name, other in others.items()})

    saved = checkpoint.Checkpoints(folder / "checkpoints", keep_best=stage.keep_best)
    for note in saved.notes:
        ctx.console.print(f"{name}: {note}", markup=False, soft_wrap=True)
    at = 0
    best: dict[str, float] = {}
    window = metrics_lib.Window()
    latest = saved.latest()
    distributed.agree(f"the step at which {name} resumes", latest)
    if latest is not None:
        state, stored = saved.restore(latest, state)
        at = plan.resume(stored["plan"])
        if stored["total"] != total:
            raise ConfigError(f"{folder}: the checkpoint belongs to a stage of {stored['total']} steps; the config and "
                              f"data give {total}")
        best, window = stored["eval"], metrics_lib.Window(stored["window"])
        ctx.console.print(f"resuming {name} at step {at} of {total}")
    # Without a checkpoint the evaluation at step 0 is done again, so its rows go too.
    writer = metrics_lib.MetricWriter(ctx.workdir, name, resume_at=-1 if latest is None else at,
                                      active=distributed.is_main())
    # The probe compares with the reference token by token, which only a copy of it can supply.
    probe = _probe_records(ctx, stage, train) if ref is not None else None

    def evaluate_now(number: int) -> None:
        nonlocal best
        parts = [evaluate_fn(frozen | state.params, ref, make(start_row + np.arange(a, b)), hyper,
                             key_of(2**31), state.loss_state)[0] for a, b in cuts]
        best = step.merge_metrics(parts)
        writer.write(number, best, split="eval" if held_out else "eval_on_train")
        if probe is not None:
            writer.write(number, _probe(evaluate_probe, frozen | state.params, ref, probe), split="probe")

    evaluate_probe = jax.jit(step.make_evaluate(spec, None, diagnostics=("ref_logps", "ref_policy_kl")))
    if at == 0:
        evaluate_now(0)
    began, tokens_done, last_shown = time.monotonic(), 0.0, ""
    pending = None

    def settle(item) -> None:
        """Reads the metrics of an already dispatched step; stops at a non-finite one."""
        nonlocal tokens_done, last_shown
        number, device_metrics, ids = item
        values = step.merge_metrics([device_metrics])
        if not values.pop("finite"):
            saved.wait()
            raise FloatingPointError(
                f"{name}: step {number} is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}); "
                f"records {ids}; last good checkpoint: step {saved.latest()} in {saved.folder}")
        tokens_done += values["tokens"]
        spent = time.monotonic() - began
        window.add(values)
        if number % stage.log_every == 0 or number == total:
            mean = window.take()
            mean |= {"steps_per_second": (number - at) / spent, "tokens_per_second": tokens_done / spent}
            writer.write(number, mean)
            last_shown = "  ".join(f"{k} {mean[k]:.3f}" for k in ("loss", "accuracy", "margin") if k in mean)
            last_shown += f"  {mean['steps_per_second']:.1f} steps/s  {mean['tokens_per_second']:.0f} tokens/s"
            bar.update(task, numbers=last_shown)

    number, batch = at, None
    shortage = lambda: (f"{name}: step {number}", *_memory(ctx, stage, name, batch, state, ref))
    with metrics_lib.progress(ctx.console) as bar, memory.explained(shortage):
        task = bar.add_task(name, total=total, completed=at, numbers="")
        shapes: dict[str, None] = {}  # in the order seen
        for number in range(at + 1, total + 1):
            index = plan.batch_indices(number - 1)
            batch = make(index)
            if number == profile_steps[0] and profile_steps[1] > profile_steps[0]:
                jax.profiler.start_trace(str(ctx.workdir / "profile"))
            distributed.at(f"in {name} at step {number}")
            key = key_of(number)
            state, out = update(state, ref, batch, hyper, key, frozen)
            if number == profile_steps[1] > profile_steps[0]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if pending is not None:
                settle(pending)
            pending = (number, out, [train[i].id for i in index[:stage.records_in_log]])
            bar.advance(task)
            shapes[_shape(batch)] = None
            if update._cache_size() > stage.compile_budget:
                raise ConfigError(f"{name}: the step was compiled {update._cache_size()} times, over "
                                  f"config.{name}.compile_budget={stage.compile_budget}, at step {number}; shapes seen "
                                  f"(rows x columns, slots): {'; '.join(shapes)}. Use shapes='global', a larger "
                                  "bucket_multiple or a larger compile_budget")
            stopping = distributed.stop_at(name, number, ctx.stop.requested)
            if number == total or stopping or number % stage.checkpoint_every == 0 or number % stage.eval_every == 0:
                settle(pending)
                pending = None
                if number % stage.eval_every == 0 or number == total:
                    evaluate_now(number)
                if number == total or stopping or number % stage.checkpoint_every == 0:
                    saved.save(number, state, {"plan": plan.state(number), "total": total, "eval": best,
                                               "window": window.state()}, best or None)
            if stopping and number < total:
                saved.close()
                writer.close()
                raise context.Preempted(f"stopped at step {number} of {total} in {name}; run the same command again")
    saved.close()
    writer.close()
    context.save_stage_params(folder, state.params, base=init, adapters=adapters)
    rows = metrics_lib.read_metrics(ctx.workdir, stage=name) if distributed.is_main() else []
    history = [r for r in rows if r["split"] == "train"]
    if history:
        figures.training_curves(history, ctx.workdir / "figures" / f"{name}_training.png")
    watched = [r for r in rows if r["split"] == "probe"]
    if watched:
        series = {k: np.asarray([r[k] for r in watched]) for k in ("chosen", "rejected", "unseen") if k in watched[0]}
        figures.displacement(np.asarray([r["step"] for r in watched]), series,
                             np.asarray([r["baseline"] for r in watched]),
                             ctx.workdir / "figures" / f"{name}_displacement.png")
    final = {k: history[-1][k] for k in ("loss", "accuracy", "margin") if history and k in history[-1]}
    ctx.console.print(f"{name}: {total} steps  {last_shown}")
    return {"steps": total, "records": len(train), "compilations": update._cache_size(), "train": final,
            "eval": best, "fingerprint": context.fingerprint(distributed.to_host(
                state.params["model" if adapters is None else "adapters"]))}


def _shape(batch) -> str:
    """The static sizes of a batch, by stream: every other value is another compilation."""
    one = lambda s: f"{s.tokens.shape[0]} x {s.tokens.shape[1]}, {s.targets.shape[2]}"
    return " and ".join(f"{n} {one(s)}" if n != "pair" else one(s) for n, s in sorted(batch.streams.items()))


def _memory(ctx: context.Context, stage: ConfigDict, name: str, batch, state, ref) -> tuple[dict, dict]:
    """(parts with their bytes on one device, settings that help) of a step, for the message when memory is out."""
    config, held = ctx.spec.config, memory.size
    parts = {"parameters": held(state.params), "gradients": held(state.params), "optimiser": held(state.opt_state),
             "reference": held(ref), "batch": held(batch)}
    if batch is not None:
        parts |= memory.estimate(batch, layers=config.num_layers, width=config.hidden_size,
                                 inner=config.intermediate_size, vocab=config.vocab_size,
                                 head_bytes=ctx.spec.byte_budget, remat=ctx.spec.remat,
                                 accumulation=stage.accumulation, ways=ctx.mesh.shape["data"] * ctx.mesh.shape["fsdp"])
    where, size = f"config.{name}", stage.batch_size
    advice = {f"{where}.accumulation": f"{stage.accumulation}, the next divisor of batch_size={size} is larger",
              f"{where}.batch_size": f"{size}, {max(size // 2, 1)} takes half"}
    if ctx.spec.remat == "none":
        advice["config.model.remat"] = "none, another policy recomputes instead of storing"
    if stage.reference == "frozen":
        advice[f"{where}.reference"] = "frozen, precomputed needs no second copy"
    if stage.layout == "padded":
        advice[f"{where}.layout"] = "padded, shared_prefix stores the prompt of a pair once"
    if ctx.mesh.shape["fsdp"] == 1:
        advice["config.mesh.fsdp"] = "1, more cuts parameters and optimiser over devices"
    return parts, advice


def _adapters(stage: ConfigDict, where: str) -> models.AdapterConfig | None:
    """The stage's adapter settings, or None where it trains all parameters."""
    if not stage.lora.rank:
        return None
    try:
        return models.AdapterConfig(**stage.lora.to_dict())
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _total_steps(stage: ConfigDict, records: int, seed: int) -> int:
    return stage.steps or data.Plan(records, stage.batch_size, seed).num_steps(stage.epochs)


def _optimizer(stage: ConfigDict, total: int):
    return optim.from_section(stage.optim.to_dict(), total)


def _committed(ctx: context.Context, state: Any) -> Any:
    """Every leaf on the mesh from the start, moments cut like their parameters (their paths end alike): a leaf that
    only the first update puts in its place would compile it twice."""
    state = jax.tree.map(jnp.asarray, state)
    return jax.device_put(state, sharding.param_shardings(state, ctx.mesh, ctx.rules))


def _precompute(ctx, laid: stage_data.Batches, params, records: list, folder: pathlib.Path,
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


def _probe_records(ctx, stage: ConfigDict, train: list):
    """Up to 64 training prompts with chosen, rejected and unseen completions, where the data has unseen ones."""
    if not stage.data.path.startswith("stage:") or losses.from_section(stage.loss.to_dict()).info.chosen_only:
        return None
    unseen = sample.read_unseen(ctx.stage_dir(stage.data.path[len("stage:"):]))
    both = [(r, unseen[r.id]) for r in train if r.id in unseen][:64]
    ways = ctx.mesh.shape["data"] * ctx.mesh.shape["fsdp"]
    records = [dataclasses.replace(r, completions=(*r.completions[:2], u), scores=None, labels=None,
                                   completion_ended=(*r.completion_ended[:2], ctx.text.ended(u)))
               for r, u in both[:len(both) // ways * ways]]
    if not records:
        return None
    columns, slots = data.bucket_shape(records, stage.bucket_multiple)
    batch = data.padded(records, K=3, T=columns, L=slots, pad_id=ctx.text.pad_id)
    return sharding.shard_batch(batch, ctx.mesh)


def _probe(evaluate_probe, params, ref, batch) -> dict[str, float]:
    """Change of log-likelihood since the reference: chosen, rejected, unseen, and the baseline -KL(ref||policy).

    The unseen completions are samples of the reference, so their expected change is exactly -KL(ref||policy) for
    any training; the baseline is the same expectation with the vocabulary sum done exactly at each prefix.
    """
    arrays = distributed.to_host(evaluate_probe(params, ref, batch, {}, None, None)[1])
    change = arrays["logps"] - arrays["ref_logps"]
    out = {side: float(change[:, k].mean()) for k, side in enumerate(("chosen", "rejected", "unseen"))}
    out["baseline"] = -float(arrays["ref_policy_kl"][:, 2].sum(-1).mean())
    return out | {f"logp_{side}": float(arrays["logps"][:, k].mean())
                  for k, side in enumerate(("chosen", "rejected", "unseen"))}
