"""A sweep of K small DPO runs: one program of ours against K runs of TRL and of Tunix in a row.

    python experiments/benchmarks/sweep_peers.py --trl-python ... --tunix-python ... [--members 1 8] [--quick]

The runs differ in beta, learning rate and order of the pairs. The model is of the quickstart's size (2 layers, width
96, 256 words, untied), each update sees 64 pairs of 48 tokens of which 8 are the prompt. The clock runs from the start
of the first process to the last update of the last run: imports, loading and compilation are part of a sweep. Peers run
twice: a process for each run, as a user's loop over commands does, and all runs in one process, which imports once.
Ours runs as one program of K members, and for comparison in a process for each run, too.

Before anything is timed: log-probs of the first batch, the loss of its update and of those after it. Afterwards the
losses of every run's second to fourth update pass the same gate, and how far the last ones are apart is told.

Cost: about 15 minutes on two idle cores for --members 1 8; 32 members (--members 1 8 32) take an hour more. Memory: 2
GB.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import time
from typing import Any

import numpy as np
from common import (
    Contender,
    Ring,
    Shape,
    Worker,
    WorkerFailed,
    finish,
    gate,
    machine,
    make_model,
    make_pairs,
    megabytes,
    parser,
    wide_console,
    workplace,
)
from rich.console import Console
from training import LATER_LOSS, check, ours, trl, tunix
from wire import read_pairs, write_pairs

OURS = "alignax, one program"
QUICKSTART = Shape(layers=2, width=96, inner=192, vocab=256, heads=4, positions=128)
BETAS, RATES = (0.1, 0.3, 0.05, 0.5), (1e-3, 3e-4, 5e-4, 1e-4)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "sweep_peers")
    out.add_argument("--members", type=int, nargs="+", default=[1, 8], help="numbers of runs (default 1 8); at most 32")
    out.add_argument("--updates", type=int, default=60, help="updates of a run (default 60)")
    out.add_argument("--pairs", type=int, default=64, help="pairs of an update (default 64)")
    out.add_argument("--per-call", type=int, default=10, help="our updates in one call (default 10)")
    args = out.parse_args(argv)
    if args.quick:
        args.members, args.updates, args.pairs, args.per_call = [2], 3, 4, 3
    if args.updates < 2:
        out.error(f"--updates={args.updates}: allowed: 2 and more")
    if not all(1 <= count <= 32 for count in args.members):
        out.error(f"--members={args.members}: allowed: 1 to 32")
    return args


def members_of(count: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The first `count` runs: two strengths, rates and orders, each run followed by its opposite; then four strengths
    and rates."""
    small = list(itertools.product(BETAS[:2], RATES[:2], (0, 1)))
    opposites = [run for both in zip(small[:4], small[:3:-1], strict=True) for run in both]
    grid = dict.fromkeys([*opposites, *itertools.product(BETAS, RATES, (0, 1))])
    return [dict(beta=b, rate=r, pairs=str(folder / f"pairs{seed}.npz")) for b, r, seed in list(grid)[:count]]


def in_a_row(one: Contender, folder: pathlib.Path, order: dict[str, Any], members: list[dict[str, Any]], updates: int,
             *, processes: bool) -> dict[str, Any]:
    """K runs one after another, in a process each or all in one: seconds in all and of each run, its losses, and
    the largest process's peak memory."""
    seconds, losses, peaks, worker = [], [], [], None
    try:
        for member in members:
            began = time.perf_counter()
            if worker is None:
                worker = Worker(one.name, one.python, one.script, one.settings, folder)
            loaded = worker.ask("load", **order | dict(one.settings) | member, gate=False)
            answer = worker.ask("steps", count=updates - 1)
            seconds.append(time.perf_counter() - began)
            losses.append([loaded["loss"], *answer["losses"]])
            peaks += [peak for peak in (loaded["peak"], answer["peak"]) if peak]
            if processes:
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()
    return dict(seconds=sum(seconds), runs=seconds, losses=losses, peak=max(peaks, default=None),
                version=loaded["version"])


def together(folder: pathlib.Path, order: dict[str, Any], members: list[dict[str, Any]], updates: int,
             per_call: int) -> dict[str, Any]:
    """The same runs as one program of ours."""
    began = time.perf_counter()
    worker = Worker(OURS, sys.executable, "worker_population.py", {}, folder)
    try:
        version = worker.ask("load", **order, members=members, updates=updates, per_call=per_call, remat="none",
                             unroll=2)["version"]
        answer = worker.ask("train")
        seconds = time.perf_counter() - began
    finally:
        worker.close()
    return dict(seconds=seconds, calls=answer["seconds"], losses=np.transpose(answer["losses"]).tolist(),
                peak=answer["peak"], version=version)


def prepare(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Writes the model and the pairs in both orders; returns what all runs share."""
    shape = Shape(layers=1, width=16, inner=32, vocab=64, heads=2, positions=64) if args.quick else QUICKSTART
    model, drawn = folder / "model", folder / "drawn.npz"
    make_model(model, shape)
    make_pairs(drawn, [(4, 4, 4) if args.quick else (8, 40, 40)] * args.pairs * args.updates, shape.vocab)
    pairs = read_pairs(drawn)
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(len(pairs))
        write_pairs(folder / f"pairs{seed}.npz", [pairs[i] for i in order])
    return dict(model=str(model), batch=args.pairs, clip=1.0)


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    alone = [ours("alignax", remat="none", unroll=2), trl("TRL, fp32", args.trl_python),
             tunix("Tunix, fp32", args.tunix_python)]
    rows, measured, apart = [], {}, {}
    with workplace() as name:
        folder = pathlib.Path(name)
        order = prepare(args, folder)
        with Ring(alone, folder, console, **order, **members_of(1, folder)[0]) as ring:
            check(ring)
            parity = check(ring, {who: answer["losses"] for who, answer in ring.all("steps", count=2).items()})
            absent = ring.absent
        for count in args.members:
            members = members_of(count, folder)
            with console.status(f"{count} runs: {OURS}"):
                found = {OURS: together(folder, order, members, args.updates, args.per_call)}
            for one in alone:
                for way, processes in (("a process for each run", True), ("all in one process", False)):
                    title = f"{one.name}, {way}"
                    if one.name in absent or not processes and (one.name == "alignax" or count == 1):
                        continue
                    with console.status(f"{count} runs: {title}"):
                        try:
                            found[title] = in_a_row(one, folder, order, members, args.updates, processes=processes)
                        except WorkerFailed as error:
                            absent[f"{count} x {title}"] = str(error)
            losses = {title: np.asarray(result["losses"]) for title, result in found.items()}
            gate({title: each[:, 1:4].ravel() for title, each in losses.items()}, LATER_LOSS, "losses of the sweep")
            apart[count] = {title: float(np.abs(each - losses[OURS])[:, -1].max()) for title, each in losses.items()}
            base = found[OURS]["seconds"]
            for title, result in found.items():
                rows.append([f"{count} x {title}", f"{result['seconds']:.1f}", f"{result['seconds'] / count:.2f}",
                             f"{result['seconds'] / base:.2f}", megabytes(result["peak"]),
                             f"{apart[count][title]:.1e}"])
                measured[f"{count} x {title}"] = result
    table = dict(title=f"K runs of {args.updates} updates, {args.pairs} pairs each", rows=rows, columns=[
        "runs", "s in all", "s per run", "time / ours", "peak RSS MB", "last losses apart"])
    return finish(args, console, title="A sweep against runs in a row", about=[
        "From the start of the first process to the last update of the last run: imports, loading and compilation are "
        "part of a sweep. The runs differ in beta, learning rate and order of the pairs. `all in one process` imports "
        "once, and what it compiles depends on the library. `last losses apart`: the largest difference to ours in any "
        "run's last loss; those of updates 2 to 4 agree to 2e-3. One measurement of each; the peak is of one "
        "process."],
        tables=[table], data=dict(measured=measured, parity=parity, last_apart=apart), started=started, before=before,
        absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
