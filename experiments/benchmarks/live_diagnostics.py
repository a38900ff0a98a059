"""What the live diagnostics cost on the quickstart's model: time of a look against the updates between two looks.

    python experiments/benchmarks/live_diagnostics.py [--rounds 8] [--groups displacement,ches ...]

Both are timed in turns on the stage's own batch: in a round a stretch of updates, then one look with the reading of its
numbers; the share is look / (interval x update) inside the round, so that a slow moment of a shared machine hits both.
Prints the default interval, the median share with its quartiles, and the largest temporary memory of a look beside that
of the update. Cost: about two minutes on two idle cores. Expected: a share of at most 3% for every group; measured on
two busy cores 1.2 to 1.8%, quartiles within 0.8 and 2.3%.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from alignax import configs, distributed, stage_setup, step, train, watch
from alignax.diagnostics import live
from alignax.launch import compilation_cache

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart.py"
UPDATES = 8  # of one stretch


NAME = "dpo_0_5"


def start(folder: Path):
    """The config of the quickstart's first preference stage; its shortened start is trained into the folder."""
    found = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    config = module.get_config()
    config.sft.steps, config.sft.eval_every, config.sample.num_prompts = 20, 1000, 120
    config.stages = ("sft", "sample")
    train.run(config, folder, console=Console(quiet=True))
    config.stages = ("sft", "sample", NAME)
    return config


def stage(config, folder: Path, names: tuple[str, ...]) -> stage_setup.Setup:
    """The stage, watching `names`."""
    config[NAME].diagnostics = names
    configs.check(config)
    ctx = train.make_context(config, folder, Console(quiet=True))
    return stage_setup.prepare(ctx, NAME, config[NAME].to_dict(), "sft", None)


def measure(setup: stage_setup.Setup, rounds: int) -> dict[str, object]:
    """Interval, seconds of an update and of a look in every round, and temporary bytes of the programs."""
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
        for _ in range(UPDATES):
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
        times.append((spent[0] / UPDATES, spent[1]))
    temporary = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    programs = [watching._texts.lower(state.params, watching.before, watching.probe.texts)] * bool(
        set(watching.names) - {"attribution", *live.GRADIENTS})
    programs += [watching._pairs.lower(state, {}, ref, watching.probe.pairs, hyper, key)] * bool(
        set(watching.names) & set(live.GRADIENTS))
    programs += [watching._step.lower(state, {}, ref, batch, hyper, key, watching.probe.few)] * (
        "attribution" in watching.names)
    return {"every": watching.every, "times": np.asarray(times),
            "update_bytes": temporary(update.lower(*args).compile()),
            "look_bytes": max(temporary(program.compile()) for program in programs)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--groups", nargs="+", default=[",".join(live.GROUPS), "displacement", "entanglement",
                                                        "attribution"], help="lists of groups, each with commas")
    arguments = parser.parse_args()
    compilation_cache()
    table, console = Table(title="live diagnostics on the quickstart's model", title_justify="left"), Console(width=140)
    for heading in ("groups", "every", "update ms", "look ms", "share of the steps' time (quartiles)", "temporary MB"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as place:
        config = start(folder := Path(place) / "run")
        for groups in arguments.groups:
            names = tuple(groups.split(","))
            found = measure(stage(config, folder, names), arguments.rounds)
            update, look = found["times"].T
            low, middle, high = np.quantile(look / (found["every"] * update), [0.25, 0.5, 0.75])
            row = ("all" if len(names) == len(live.GROUPS) else groups, str(found["every"]),
                   f"{1e3 * np.median(update):.1f}", f"{1e3 * np.median(look):.1f}",
                   f"{middle:.2%} ({low:.2%} to {high:.2%})",
                   f"{found['look_bytes'] / 1e6:.0f} beside {found['update_bytes'] / 1e6:.0f}")
            table.add_row(*row)
            console.print("  ".join(row), highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
