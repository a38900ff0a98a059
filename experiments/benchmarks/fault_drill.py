"""Kills a tiny run again and again, and checks that what it finally leaves is what an uninterrupted run leaves.

    python experiments/benchmarks/fault_drill.py --kills 50

Each run trains (SFT), samples pairs and trains on them (DPO); it is killed with SIGKILL at moments drawn at random:
while it trains, while a checkpoint is being written, while it samples, or at any time at all. After every kill the same
command goes on in the same folder; a run takes `--per-run` kills before it may finish. Compared byte for byte with the
run that nobody killed: the parameters of both stages, the pairs, and every row of the metrics but their timings.

Cost: about 5 seconds of one core for each kill. Expected: every run is identical; the exit code is 1 where one is not.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import multiprocessing
import pathlib
import random
import shutil
import sys
import tempfile
import time

TRAIN, SAMPLE = ("sft", "method"), "sample"
KINDS = ("training", "checkpointing", "sampling", "any")
PATIENCE = 300.0


def drill_config():
    """SFT, samples, DPO on a decoder of width 16; a window of the log never ends where a checkpoint does."""
    from alignax import configs

    config = configs.embedded_run("dpo", tiny=True, steps=12, checkpoint_every=2, eval_every=6, log_every=5)
    config.model.update(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    config.sft.update(steps=12, checkpoint_every=2, eval_every=6, log_every=5)
    config.sft.data.update(max_records=48, eval_records=8)
    config.sample.update(num_prompts=32, num_samples=4, max_new_tokens=16, batch_size=8)
    config.method.data.update(eval_records=8)
    config.stages = ("sft", "sample", "method")
    return config


def work(folder: str) -> None:
    """One process of a run: runs or resumes it to its end."""
    from rich.console import Console

    from alignax import launch, train

    launch.compilation_cache()
    log = io.StringIO()
    train.run(drill_config(), folder, console=Console(file=log, width=120))


def left(folder: pathlib.Path) -> dict[str, str]:
    """What a finished run leaves, as digests by name, without the timings."""
    result = json.loads((folder / "result.json").read_text())["stages"]
    out = {f"{stage} parameters": result[stage]["fingerprint"] for stage in TRAIN}
    out["pairs"] = hashlib.sha256((folder / "stages" / SAMPLE / "pairs.jsonl").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]
    out["metrics"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return out


def phase(folder: pathlib.Path) -> str:
    """What a run is at, told by its files."""
    stages = folder / "stages"
    for name in (*TRAIN[:1], SAMPLE, *TRAIN[1:]):
        if not (stages / name).is_dir():
            return "starting" if name == TRAIN[0] else "between stages"
        if not (stages / name / "done.json").exists():
            return "sampling" if name == SAMPLE else "checkpointing" if saving(stages / name) else "training"
    return "ending"


def saving(stage: pathlib.Path) -> bool:
    """Whether a checkpoint is being written or sealed."""
    names = {p.name for p in (stage / "checkpoints").glob("*")}
    return any("tmp" in n or (n.isdigit() and not (stage / "checkpoints.seals" / f"{n}.json").exists()) for n in names)


def rows(folder: pathlib.Path) -> int:
    """Lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def moment(kind: str, folder: pathlib.Path, draw: random.Random):
    """(ready, delay): when the moment has come, and how long to wait after it."""
    if kind == "checkpointing":
        after = draw.randrange(5)
        seen: set[str] = set()

        def ready() -> bool:
            seen.update(p.name for p in folder.glob("stages/*/checkpoints/*") if "tmp" in p.name)
            return len(seen) > after and phase(folder) == "checkpointing"

        return ready, draw.uniform(0, 0.05)
    if kind == "sampling":
        return lambda: phase(folder) == "sampling", draw.uniform(0, 1)
    if kind == "training":
        goal = rows(folder) + draw.randrange(1, 4)
        return lambda: rows(folder) >= goal, draw.uniform(0, 0.3)
    return lambda: True, draw.uniform(0, 12)


def strike(start, folder: pathlib.Path, kind: str, draw: random.Random) -> str | None:
    """Starts or resumes the run and kills it at such a moment; the phase that was hit, or None where the run ended."""
    process = start(folder)
    ready, delay = moment(kind, folder, draw)
    limit = time.monotonic() + PATIENCE
    while process.is_alive() and not ready():
        if time.monotonic() > limit:
            raise SystemExit(f"{folder}: the run neither ended nor came to a moment of {kind} in {PATIENCE} seconds")
        time.sleep(0.003)
    process.join(delay)
    if not process.is_alive():
        if process.exitcode:
            raise SystemExit(f"{folder}: a resumed run failed with exit code {process.exitcode}")
        return None
    hit = phase(folder)
    process.kill()
    process.join()
    return hit


def main() -> int:
    """Runs the drill and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many kills in all")
    parser.add_argument("--per-run", type=int, default=5, help="kills that one run takes before it may finish")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where the runs lie; a temporary folder by default")
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    console, draw = Console(width=100), random.Random(arguments.seed)
    base = pathlib.Path(arguments.folder or tempfile.mkdtemp(prefix="fault_drill_"))
    base.mkdir(parents=True, exist_ok=True)
    # Processes are forked from one that has imported everything and has not touched a device yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alignax.train", "alignax.launch"])

    def start(folder: pathlib.Path):
        process = context.Process(target=work, args=(str(folder),), daemon=True)
        process.start()
        return process

    def finish(folder: pathlib.Path) -> dict[str, str]:
        process = start(folder)
        process.join(PATIENCE)
        if process.exitcode != 0:
            raise SystemExit(f"{folder}: the run did not end well (exit code {process.exitcode})")
        return left(folder)

    expected = finish(base / "whole")
    hits: collections.Counter[str] = collections.Counter()
    spoiled: collections.Counter[str] = collections.Counter()
    kills = runs = identical = tries = 0
    while kills < arguments.kills:
        folder, struck = base / f"run{runs}", []
        while len(struck) < arguments.per_run and kills < arguments.kills:
            # In turn, in the order in which a run comes to them: few kills already cover each.
            hit = strike(start, folder, KINDS[tries % len(KINDS)], draw)
            tries += 1
            if hit is None:
                break
            struck.append(hit)
            kills += 1
        found = finish(folder)
        wrong = [name for name in expected if expected[name] != found[name]]
        runs, identical = runs + 1, identical + (not wrong)
        hits.update(struck)
        spoiled.update(struck if wrong else ())
        console.print(f"run {runs}: killed while {', '.join(struck) or '(ended before)'}: "
                      f"{'differs in ' + ', '.join(wrong) if wrong else 'identical'}")
        if not wrong:
            shutil.rmtree(folder)
    table = Table("killed while", "kills", "in runs that differ")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in sorted(hits.items()):
        table.add_row(name, str(count), str(spoiled[name]))
    table.add_section()
    table.add_row("all", str(kills), str(sum(spoiled.values())))
    console.print(table)
    console.print(f"{identical} of {runs} runs are identical to the one that nobody killed")
    if missed := [kind for kind in KINDS[:-1] if not hits[kind]]:
        console.print(f"no kill fell while {', '.join(missed)}: more --kills or another --seed reach it")
    if identical == runs and not arguments.folder:
        shutil.rmtree(base)
    return int(identical != runs)


if __name__ == "__main__":
    sys.exit(main())
