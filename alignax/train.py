"""The only loop: a run is a list of stages, each resumed where it stopped.

Below this file there are plain arguments; above it, a config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
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
    presence,
    reference,
    sample,
    sharding,
    stage_data,
    stage_setup,
    step,
    watch,
)
from alignax import metrics as metrics_lib
from alignax.types import ConfigError, DataError


def run(config: ConfigDict, workdir: pathlib.Path | str, *, console: Console | None = None,
        devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Runs or resumes all stages of `config` in `workdir`, and returns the contents of result.json.

    A finished run returns at once. devices: those to train on, all by default. Raises ConfigError or DataError before
    any long work where something cannot work, also when `workdir` holds a run of another config or is in use;
    context.Preempted after SIGTERM, when everything is saved; FloatingPointError at a non-finite step;
    checkpoint.DiskError where something cannot be written; memory.OutOfMemory. With many processes (see
    alignax.distributed) every one of them calls this alike.
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    general = configs.staged(config)
    if general is not config:
        try:
            return run(general, workdir, console=console, devices=devices)
        except (ConfigError, DataError) as error:  # name the keys as they stand in the user's file
            raise type(error)(str(error).replace(f"config.{configs.SINGLE}.", "config.")) from error
    configs.check(config)
    plain = configs.plain_of(config)
    distributed.agree("the config", plain)
    claim(workdir, plain)
    result_path = workdir / "result.json"
    if distributed.from_main("finished", result_path.exists()):
        console.print(f"{workdir}: finished already; result.json stands")
        return json.loads(result_path.read_text(encoding="utf-8"))
    if config.deterministic and jax.default_backend() == "gpu":
        check_deterministic()
    ctx = make_context(config, workdir, console, devices=devices)
    policy_before, prepared = check_stages(ctx, config)
    distributed.barrier("checked")  # nobody has written anything yet
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            if note := held.enter_context(presence.locked(workdir)):
                console.print(note, markup=False)
            claim(workdir, plain)  # another run may have come first
            if not (workdir / "config.json").exists():
                checkpoint.write_json(workdir / "config.json", plain)
            checkpoint.write_json(workdir / "environment.json",
                                  context.environment() | {"attention": ctx.spec.attention})
            console.print(f"attention: {ctx.spec.attention}", highlight=False)
            (workdir / "figures").mkdir(exist_ok=True)
        distributed.barrier("claimed")
        summary = summarise(config, _stages(ctx, config, policy_before, prepared))
        if distributed.is_main():
            checkpoint.write_json(result_path, summary)
        distributed.barrier("finished")
    return summary


def make_context(config: ConfigDict, workdir: pathlib.Path, console: Console, *, devices=None) -> context.Context:
    """What the stages of a run share, from its config; writes nothing. devices: of the mesh, all by default."""
    tokenizer = context.load_tokenizer(config.tokenizer, config.model.path)
    mesh = sharding.make_mesh({k: v for k, v in config.mesh.items() if v and k != "rules"}, devices)
    rules = sharding.check_rules(config.mesh.rules, "config.mesh.rules")
    spec, initial = context.load_model(config.model.to_dict(), vocab_size=tokenizer.vocab_size, seed=config.seed,
                                       mesh=mesh, rules=rules)
    data.check_vocab(tokenizer, spec.config.vocab_size)
    text = context.text_policy(tokenizer, config.model.path, **config.text.to_dict())
    models.check_remat(spec.remat, mesh.devices.flat[0], "config.model.remat")
    spec = dataclasses.replace(spec, activations=sharding.over_activations(mesh))
    return context.Context(workdir=workdir, spec=spec, initial=initial, tokenizer=tokenizer, text=text,
                           tokenizer_source=context.template_place(config.tokenizer, config.model.path),
                           mesh=mesh, seed=config.seed, console=console, stop=context.Stop(), rules=rules)


def check_stages(ctx: context.Context, config: ConfigDict, *, read: bool = True) -> tuple[dict[str, str], dict]:
    """Refuses what cannot work in any stage, before anything is written.

    Returns stage -> the train stage before it (or `model`), and stage -> records of the train stages that need no
    earlier one; read: False reads none.
    """
    prepared = {}
    previous = "model"
    policy_before = {}
    for name in config.stages:
        policy_before[name] = previous
        stage = config[name]
        if stage.kind == "train":
            loss = losses.from_section(stage.loss.to_dict())
            reference.check(stage.reference, loss.requests, lora=stage.lora.rank > 0, where=f"config.{name}.reference")
            if (adapters := stage_setup.adapters_of(stage.to_dict(), f"config.{name}.lora")) is not None:
                jax.eval_shape(lambda: models.init_adapters(ctx.initial["model"], adapters, jax.random.key(0)))  # noqa: B023
            stage_setup.optimizer_of(stage.to_dict(), max(stage.steps, stage.optim.warmup_steps))
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
            if made_by is None and read:
                section = stage.to_dict()
                prepared[name] = stage_setup.records_of(ctx, name, section)
                stage_setup.optimizer_of(section, stage_setup.total_steps(section, len(prepared[name][0]), ctx.seed))
            previous = name
        else:
            sample.check(ctx, name, stage.to_dict(), split="train" if stage.kind == "sample" else "eval")
    return policy_before, prepared


def _stages(ctx: context.Context, config: ConfigDict, policy_before: dict[str, str], prepared: dict) -> dict[str, Any]:
    """Runs the stages that are not done yet, one after another; returns the result of each."""
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
                    out = apply_stage(ctx, name, stage, policy_before[name])
            out |= {"seconds": round(time.monotonic() - began, 2)}
            results[name] = distributed.from_main(f"{name} result", out)
            if distributed.is_main():
                checkpoint.write_json(done, results[name])
    return results


def apply_stage(ctx: context.Context, name: str, stage: ConfigDict, previous: str, *,
                kept: dict | None = None) -> dict[str, Any]:
    """Runs a stage that trains nothing (sample, evaluate); returns its result. previous: the train stage before it;
    kept: for evaluate.run."""
    plain = settled(stage, previous)
    return sample.run(ctx, name, **plain) if stage.kind == "sample" else evaluate.run(ctx, name, kept=kept, **plain)


def settled(stage: ConfigDict, previous: str) -> dict[str, Any]:
    """The settings of a sample or evaluate stage, with the train stage before it where they say `previous`."""
    plain = stage.to_dict()
    plain.pop("kind")
    for key in ("policy", "baseline"):
        if plain.get(key) in ("previous", ""):
            plain[key] = previous
    return plain


def summarise(config: ConfigDict, results: Mapping[str, Any]) -> dict[str, Any]:
    """What result.json holds: the results of the stages, and the headline of those that evaluate."""
    summary = {"stages": dict(results)}
    for name in config.stages:
        if config[name].kind == "evaluate":
            summary |= results[name]["headline"]
    return summary


def claim(workdir: pathlib.Path, plain: dict) -> None:
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
    old = configs.flat(configs.completed(json.loads(stored.read_text(encoding="utf-8"))), "config")
    new = configs.flat(plain, "config")
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k, "absent") != new.get(k, "absent"))
    if differ:
        shown = "; ".join(f"{k}: stored {old.get(k, 'absent')!r}, given {new.get(k, 'absent')!r}" for k in differ[:6])
        raise ConfigError(f"--workdir={workdir} holds a run of another config ({len(differ)} keys differ: {shown}); "
                          "choose another folder. Nothing was written")


def check_deterministic() -> None:
    """Refuses config.deterministic on a GPU where XLA was not told so."""
    import os

    if "--xla_gpu_deterministic_ops=true" not in os.environ.get("XLA_FLAGS", ""):
        raise ConfigError("config.deterministic on a GPU needs XLA_FLAGS=--xla_gpu_deterministic_ops=true")


def _train(ctx: context.Context, name: str, stage: ConfigDict, previous: str, prepared, profile_steps) -> dict:
    """One train stage; returns its result and leaves params/ in the stage's folder."""
    setup = stage_setup.prepare(ctx, name, stage.to_dict(), previous, prepared)
    folder, loss, spec, plan, total = setup.folder, setup.loss, setup.spec, setup.plan, setup.total
    frozen, make = setup.frozen, setup.make
    optimizer = stage_setup.optimizer_of(setup.section, total)
    state = _committed(ctx, step.TrainState(jnp.zeros((), jnp.int32), setup.params,
                                            jax.jit(optimizer.init)(setup.params), loss.init_state()))
    ref = (frozen or ctx.place(setup.params)) if setup.has_reference else None
    # What goes into a step is put on the devices before, so that the step itself moves nothing (and runs under a
    # transfer guard).
    hyper = distributed.replicated(setup.hyper, ctx.mesh)
    # The state leaves an update as it came: a sharding that the compiler chose would compile the next step again.
    update = jax.jit(step.make_update(spec, loss, optimizer, accumulation=stage.accumulation), donate_argnums=0,
                     out_shardings=(jax.tree.map(lambda a: a.sharding, state), None))
    kl = ("ref_policy_kl",) if ref is not None else ()
    evaluate_fn = jax.jit(step.make_evaluate(spec, loss, diagnostics=("entropy",) + kl))
    draw = jax.jit(lambda n: jax.random.fold_in(jax.random.key(ctx.seed), n),
                   out_shardings=distributed.replicated_over(ctx.mesh))
    key_of = lambda n: draw(distributed.replicated(np.uint32(n), ctx.mesh))  # the key of update n, of the seed alone
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
    probe = stage_setup.probe_batch(setup) if ref is not None else None

    def evaluate_now(number: int) -> None:
        nonlocal best
        parts = [evaluate_fn(frozen | state.params, ref, make(index), hyper, key_of(2**31), state.loss_state)[0]
                 for index in setup.eval_rows()]
        best = step.merge_metrics(parts)
        writer.write(number, best, split=setup.eval_split)
        if probe is not None:
            arrays = evaluate_probe(frozen | state.params, ref, probe, {}, None, None)[1]
            writer.write(number, stage_setup.probe_numbers(distributed.to_host(arrays)), split="probe")

    evaluate_probe = jax.jit(stage_setup.make_probe(spec))
    watching = watch.Watch(setup, optimizer, ref) if stage.diagnostics else None
    if watching:
        ctx.console.print(watching.describe(), markup=False)
    if at == 0:
        evaluate_now(0)
        if watching:
            writer.write(0, watching.look(state, hyper, key_of(2**31)), split="diagnostics")
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

    number, batch, compiled = at, None, 0
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
            due = watching is not None and watching.due(number)
            told = watching.before_update(state, batch, hyper, key) if due else None
            state, out = update(state, ref, batch, hyper, key, frozen)
            if number == profile_steps[1] > profile_steps[0]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if pending is not None:
                settle(pending)
            pending = (number, out, [setup.train[i].id for i in index[:stage.records_in_log]])
            if due:
                writer.write(number, watching.look(state, hyper, key_of(2**31), told), split="diagnostics")
            bar.advance(task)
            shapes[_shape(batch)] = None
            # The most that were seen: JAX forgets programs of its own accord in processes that make thousands.
            compiled = max(compiled, update._cache_size())
            if compiled > stage.compile_budget:
                raise ConfigError(f"{name}: the step was compiled {compiled} times, over "
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
    result = stage_setup.finish(setup, state.params, evaluated=best, compilations=compiled)
    ctx.console.print(f"{name}: {total} steps  {last_shown}")
    return result


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
                                 accumulation=stage.accumulation, ways=sharding.batch_ways(ctx.mesh))
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


def _committed(ctx: context.Context, state: Any) -> Any:
    """Every leaf on the mesh from the start, moments cut like their parameters (their paths end alike): a leaf that
    only the first update puts in its place would compile it twice."""
    state = jax.tree.map(jnp.asarray, state)
    return jax.device_put(state, sharding.param_shardings(state, ctx.mesh, ctx.rules))
