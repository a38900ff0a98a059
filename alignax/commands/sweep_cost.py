"""What a sweep would cost: one update of every train stage of another structure, compiled and timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from alignax.commands import plan

MOST_FLOPS = 2e11  # of an update: beyond, timing one is work that somebody should ask for
MOST_STRUCTURES = 8
_REPEATS = 3
_PROMPT = 16


def estimate(members: Sequence[Any], bases: Sequence[Any], console, *, halving: Any = None,
             early_stop: Any = None) -> list[str]:
    """Lines that tell the seconds of training of `members`, one after another, or why they are not known.

    bases: the stages that members share (population.bases). halving: a population.Halving, of which the updates that
    it leaves are counted. early_stop: a population.EarlyStop; what it saves depends on the curves, which the
    last line says. Sampling, evaluation and compilation are left out.
    """
    from alignax import configs, population
    from alignax.population.rules import applies
    from alignax.population.structure import seedless

    # (structure of a stage, where it stands to the one with rungs) -> an example, and the settings of its runs
    jobs: dict[tuple[str, str], dict[str, Any]] = {}

    def note(config, stages, rule) -> None:
        plain = configs.plain_of(config)
        for name in stages:
            if config[name].kind == "train":
                halved = [s for s in plain["stages"][:plain["stages"].index(name) + 1] if applies(rule, s, plain)]
                rung = "" if not halved else "at" if halved[0] == name else "after"
                entry = jobs.setdefault((population.signature(plain, name), rung), {
                    "config": config, "stage": name, "units": []})
                entry["units"].append(seedless(plain))

    shared: dict[str, tuple[str, ...]] = {}
    for base in bases:
        note(base.config, base.stages, None)
        shared |= dict.fromkeys(base.members, base.stages)
    for member in members:
        note(member.config, [s for s in member.config.stages if s not in shared.get(member.name, ())], halving)
    if len(jobs) > MOST_STRUCTURES:
        return [f"no estimate: {len(jobs)} structures of train stages; up to {MOST_STRUCTURES} are timed"]
    lines, total, unknown = [], 0.0, 0
    for (_, rung), entry in jobs.items():
        text = f"{entry['stage']} ({entry['config'][entry['stage']].loss.name}), {len(entry['units'])} runs"
        seconds, steps, why = _timed(entry["config"], entry["stage"], console)
        if why:
            lines.append(f"{text}: not timed: {why}")
            unknown += 1
            continue
        updates = whole = steps * len(entry["units"])
        if rung:
            updates = halving.updates(steps, entry["units"], after=rung == "after")
        total += seconds * updates
        lines.append(f"{text}: {steps} updates of {seconds * 1e3:.1f} ms"
                     + (f"; halving leaves {updates} of {whole}" if updates < whole else ""))
    lines.append(f"training alone, one update after another on this machine: about {_span(total)}"
                 + (f" less what early stopping on {early_stop.metric} saves" if early_stop else "")
                 + (f", and {unknown} stages not timed" if unknown else "")
                 + "; a population takes less, sampling and evaluation come on top")
    return lines


def _timed(config, name: str, console) -> tuple[float, int, str]:
    """(seconds of an update, number of updates, why it was not timed)."""
    import jax

    from alignax import context, losses, models, optim, planning, sharding, step
    from alignax.types import ConfigError, DataError

    stage, model = config[name], config.model.to_dict()
    tokenizer = context.load_tokenizer(config.tokenizer, model["path"])
    spec = context.model_spec(context.shape_of(model, tokenizer.vocab_size), model)
    loss = losses.from_section(stage.loss.to_dict())
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    try:
        needed = _from_stage(config, stage, loss) if stage.data.path.startswith("stage:") else plan.from_data(
            config, name, stage, spec, tokenizer, mesh, loss, stage.batch_size, console)
    except (ConfigError, DataError) as error:
        return 0.0, 0, str(error)
    shape = needed["shape"]
    flops = planning.update_flops(spec.config, stage.batch_size * shape.rows, shape.T, stage.batch_size * shape.K
                                  * shape.L, loss.requests, reference=stage.reference, remat=spec.remat,
                                  accumulation=stage.accumulation, lora=stage.lora.rank > 0)
    if flops > MOST_FLOPS:
        return 0.0, 0, f"an update is {flops:.1e} FLOP, over {MOST_FLOPS:.0e}; see alignax plan"
    adapters = models.AdapterConfig(**stage.lora.to_dict()) if stage.lora.rank else None
    optimizer = optim.from_section(stage.optim.to_dict(), max(needed["steps"], stage.optim.warmup_steps, 1))
    setup = planning.make_setup(spec, loss, optimizer, dtype=model["dtype"], adapters=adapters,
                                reference=stage.reference, accumulation=stage.accumulation)
    shapes = planning.abstract_arguments(setup, planning.Size(stage.batch_size, shape, stage.layout), mesh)
    state, ref, batch, hyper, key, frozen = jax.tree.map(_ones, shapes)
    update = jax.jit(step.make_update(setup.spec, loss, optimizer, accumulation=stage.accumulation), donate_argnums=0)
    with console.status(f"timing an update of {name} ({loss.name})"):
        state, _ = jax.block_until_ready(update(state, ref, batch, hyper, key, frozen))
        spent = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(update(state, ref, batch, hyper, key, frozen))
            spent.append(time.perf_counter() - began)
    return min(spent), needed["steps"], ""


def _ones(leaf):
    """An array of that shape: the values do not enter the time, but zeros might be handled apart."""
    import jax
    import jax.numpy as jnp

    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.integer) else (
        jnp.full(leaf.shape, 0.01, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.ones(leaf.shape, leaf.dtype))


def _from_stage(config, stage, loss) -> dict[str, Any]:
    """The shape of pairs that a sample stage is going to make, with prompts of `max_prompt` or a few tokens, and the
    number of updates if no pair drops out."""
    from alignax import data

    source = config[stage.data.path.removeprefix("stage:")]
    width = 1 if loss.info.chosen_only else 2
    drawn = source.num_samples - source.unseen
    pairs = source.num_prompts * (drawn * (drawn - 1) // 2 if source.pairs == "all" else 1)
    slots = source.max_new_tokens
    columns = -(-((source.max_prompt or _PROMPT) + slots) // 8) * 8
    steps = stage.steps or data.Plan(pairs, stage.batch_size, config.seed).num_steps(stage.epochs)
    return {"shape": data.Shape(width, columns, slots, width), "steps": steps}


def _span(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes" if seconds < 7200 else (
        f"{seconds / 3600:.1f} hours")
