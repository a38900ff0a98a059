"""What the live diagnostics cost: time of a look against the updates between two looks.

    python experiments/benchmarks/live_diagnostics.py [--rounds 8] [--groups displacement,ches ...] [--quick]

Two models: the quickstart's with its batch, and one of 110 million parameters (12 layers, width 768, vocabulary 32,000)
with 8 pairs of the same texts, watching everything. Updates and looks are timed in turns on the stage's own batch: in a
round a stretch of updates, then one look with the reading of its numbers; the share is look / (interval x update)
inside the round, so that a slow moment of a shared machine hits both. The interval is the stage's default, chosen by
cost.

Cost on two idle cores: about two minutes for the quickstart's model; for the large one five minutes and 8 GB of memory
(--large-rounds 0 leaves it out). Expected: a step with the diagnostics costs at most 1.03 of one without, for every
group.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import jax
import numpy as np
from common import finish, machine, parser, quartiles, wide_console, workplace
from rich.console import Console

from alignax import configs, distributed, stage_setup, step, train, watch
from alignax.diagnostics import live
from alignax.launch import compilation_cache, load_config

QUICKSTART = pathlib.Path(__file__).resolve().parents[1] / "quickstart.py"
NAME = "dpo_0_5"
UPDATES, LARGE_UPDATES, LARGE_PAIRS = 8, 2, 8  # of one stretch; pairs of an update of the large model
LARGE = dict(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, num_kv_heads=12,
             head_dim=64, unroll=1)
SMALLER = dict(vocab_size=512, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=4,
               head_dim=12, unroll=1)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "live_diagnostics", peers=False)
    out.add_argument("--rounds", type=int, default=8, help="of the quickstart's model (default 8)")
    out.add_argument("--large-rounds", type=int, default=3, help="of the large model (default 3)")
    out.add_argument("--groups", nargs="+", help="lists of groups, each with commas (default: all, and three alone)",
                     default=[",".join(live.GROUPS), "displacement", "entanglement", "attribution"])
    args = out.parse_args(argv)
    if args.quick:
        args.rounds, args.large_rounds, args.groups = 1, 1, ["displacement"]
    return args


def start(folder: pathlib.Path, quick: bool):
    """The config of the quickstart's first preference stage; its shortened start is trained into the folder."""
    config = load_config(f"{QUICKSTART}:tiny" if quick else str(QUICKSTART))
    config.sft.steps, config.sft.eval_every = 5 if quick else 20, 1000
    config.sample.num_prompts = 40 if quick else 120
    config.stages = ("sft", "sample")
    train.run(config, folder, console=Console(quiet=True))
    config.stages = ("sft", "sample", NAME)
    return config


def enlarge(config, quick: bool):
    """The same stage for a large model from random parameters, on few of the small one's pairs."""
    config.model.update(SMALLER if quick else LARGE)
    config[NAME].init, config[NAME].batch_size = "model", 4 if quick else LARGE_PAIRS
    return config


def stage(config, folder: pathlib.Path, names: tuple[str, ...]) -> stage_setup.Setup:
    """The stage, watching `names`."""
    config[NAME].diagnostics = names
    configs.check(config)
    ctx = train.make_context(config, folder, Console(quiet=True))
    return stage_setup.prepare(ctx, NAME, config[NAME].to_dict(), "sft", None)


def measure(setup: stage_setup.Setup, rounds: int, count: int) -> dict[str, object]:
    """Interval, seconds of an update and of a look in every round of `count` updates, and temporary bytes of the
    programs."""
    optimizer = stage_setup.optimizer_of(setup.section, setup.total)
    ref = setup.ctx.place(setup.params)
    watching = watch.Watch(setup, optimizer, ref)
    state = step.TrainState(np.int32(0), setup.params, jax.jit(optimizer.init)(setup.params), setup.loss.init_state())
    state = jax.device_put(state)
    hyper = distributed.replicated(setup.hyper, setup.ctx.mesh)
    key = jax.random.key(0)
    update = jax.jit(step.make_update(setup.spec, setup.loss, optimizer))
    batch = setup.make(setup.plan.batch_indices(0))
    args = (state, ref, batch, hyper, key, setup.frozen)

    def updates():
        now = state
        for _ in range(count):
            now, _ = update(now, *args[1:])
        jax.block_until_ready(now)

    def look():
        watching.look(state, hyper, key, watching.before_update(state, batch, hyper, key))

    updates(), look()  # compiled
    times = []
    for _ in range(rounds):
        spent = []
        for run in (updates, look):
            began = time.perf_counter()
            run()
            spent.append(time.perf_counter() - began)
        times.append((spent[0] / count, spent[1]))
    temporary = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    programs = [watching._texts.lower(state.params, watching.before, watching.probe.texts)] * bool(
        set(watching.names) - {"attribution", *live.GRADIENTS})
    programs += [watching._pairs.lower(state, {}, ref, watching.probe.pairs, hyper, key)] * bool(
        set(watching.names) & set(live.GRADIENTS))
    programs += [watching._step.lower(state, {}, ref, batch, hyper, key, watching.probe.few)] * (
        "attribution" in watching.names)
    return {"every": watching.every, "times": np.asarray(times), "pairs": setup.section["batch_size"],
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.params)),
            "update_bytes": temporary(update.lower(*args).compile()),
            "look_bytes": max(temporary(program.compile()) for program in programs)}


def row(title: str, found: dict[str, object]) -> tuple[list[str], dict[str, object]]:
    """(row of the table, numbers of the file) of what was measured."""
    update, look = found["times"].T
    low, middle, high = quartiles(1 + look / (found["every"] * update))
    shown = [title, str(found["every"]), f"{1e3 * np.median(update):,.1f}", f"{1e3 * np.median(look):,.1f}",
             f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{found['look_bytes'] / 1e6:,.0f}",
             f"{found['update_bytes'] / 1e6:,.0f}"]
    return shown, found | {"times": found["times"].tolist(), "cost": (low, middle, high)}


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    compilation_cache()
    rows, data, allowed = [], {}, len(live.GROUPS)
    with workplace() as place:
        with console.status("the quickstart's start"):
            config = start(folder := pathlib.Path(place) / "run", args.quick)
        plans = [("quickstart", groups, args.rounds, UPDATES) for groups in args.groups]
        if args.large_rounds:
            plans.append(("large", args.groups[0], args.large_rounds, LARGE_UPDATES))
        for model, groups, rounds, count in plans:
            names = tuple(groups.split(","))
            if model == "large":
                config = enlarge(config, args.quick)
            title = f"{model}: {'all' if len(names) == allowed else groups}"
            with console.status(title):
                found = measure(stage(config, folder, names), rounds, count)
            shown, data[title] = row(title, found)
            rows.append(shown)
    table = dict(title="A step with live diagnostics at the default interval against one without", rows=rows, columns=[
        "model: groups", "every", "update ms", "look ms", "with / without", "look, temporary MB",
        "update, temporary MB"])
    sizes = {title.split(":")[0]: (found["parameters"] / 1e6, found["pairs"]) for title, found in data.items()}
    told = "; ".join(f"{name}: {size:.1f}M parameters, {pairs} pairs in an update"
                     for name, (size, pairs) in sizes.items())
    return finish(args, console, title="Live diagnostics", about=[
        told + ". A look reads a probe of fixed pairs every so many updates, as often as its count of passes allows; "
        "`with / without` is 1 + look / (interval x update), median and quartiles of the rounds. Temporary memory is "
        "XLA's own account."],
        tables=[table], data=data, started=started, before=before)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
