"""How long until a policy wins: DPO on the controlled-sentiment task, ours and TRL, from process start to a win rate.

    python experiments/benchmarks/win_rate.py --trl-python ... [--model FOLDER] [--seeds 5] [--quick]

The task is experiments/controlled_sentiment.py: its story model and pairs of the model's own samples, labelled by a
lexicon, are made once and not timed. Then, for each seed, every contender starts in a process of its own and trains on
the same pairs in that seed's order with the same beta, learning rate, clipping and AdamW, and leaves a snapshot of its
parameters every few updates; writing it stops the clock. The clock starts with the process: imports, loading,
compilation, updates. Afterwards one judge, ours, samples held-out openings from every snapshot and finds the first
whose win rate against the starting model is at least --win-rate at no more than --nats of KL. A seed without one is
told as such. Before anything is timed: log-probs of the first batch, the loss of the first update and later ones.

The strengths of the config itself (0.15 to 0.45) pass 0.8 beyond 3 nats; beta 1 at a learning rate of 7e-5, on pairs of
more openings, stays below.

Cost: about 30 minutes on two idle cores, seven for --seeds 1, and 2 GB of memory. Expected: seeds reach the level
between updates 40 and 80, both contenders at the same snapshot. --model is the story model's Hugging Face folder;
default: models/stories260K of the folder that ALIGNAX_SHARED names, else of `shared` beside this repository.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
from common import (
    HERE,
    Contender,
    Ring,
    Worker,
    finish,
    machine,
    parser,
    quartiles,
    spread,
    wide_console,
    workplace,
)
from rich.console import Console
from training import check, ours, trl
from wire import write_pairs

OURS, TRL = "alignax", "TRL, fp32"
NEW_TOKENS, PAIRS = 64, "best_worst"
NO_TUNIX = "0.1.7 rotates with base 1,000,000 whatever a config says; the story model's is 10,000"


def default_model() -> pathlib.Path:
    """The story model where the shared material is."""
    root = HERE.parents[1]
    return pathlib.Path(os.environ.get("ALIGNAX_SHARED") or root.parent / "shared") / "models" / "stories260K"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "win_rate")
    out.add_argument("--model", type=pathlib.Path, default=default_model(), help="the story model's folder")
    out.add_argument("--seeds", type=int, default=5, help="orders of the pairs (default 5)")
    out.add_argument("--beta", type=float, default=1.0, help="strength of DPO (default 1)")
    out.add_argument("--rate", type=float, default=7e-5, help="learning rate, constant (default 7e-5)")
    out.add_argument("--batch", type=int, default=32, help="pairs of an update (default 32)")
    out.add_argument("--updates", type=int, default=90, help="updates of a run (default 90)")
    out.add_argument("--every", type=int, default=5, help="updates between two snapshots (default 5)")
    out.add_argument("--prompts", type=int, default=1200, help="openings that the pairs come from (default 1200)")
    out.add_argument("--held-out", type=int, default=512, help="openings that the judge samples (default 512)")
    out.add_argument("--win-rate", type=float, default=0.8, help="the level (default 0.8)")
    out.add_argument("--lower", type=float, nargs="*", default=[0.7], help="lower levels, from the same runs "
                     "(default 0.7)")
    out.add_argument("--nats", type=float, default=3.0, help="the KL allowed (default 3)")
    args = out.parse_args(argv)
    if not (args.model / "config.json").is_file():
        out.error(f"--model={args.model}: expected the Hugging Face folder of the story model")
    if args.quick:
        args.seeds, args.batch, args.updates, args.every, args.prompts, args.held_out = 1, 4, 4, 2, 16, 16
    return args


class Task:
    """The story model, its pairs, and the judge; `folder` takes what the stages write."""

    def __init__(self, args: argparse.Namespace, folder: pathlib.Path, console: Console):
        import jax

        from alignax import launch, sample, train

        place = HERE.parent / "controlled_sentiment.py"
        config = launch.load_config(f"{place}:tiny" if args.quick else str(place))
        config.model.path, config.stages = str(args.model), ("sample",)
        config.sample.num_prompts, config.sample.pairs = args.prompts, PAIRS
        with console.status("the task's pairs"):
            train.run(config, folder, console=Console(quiet=True))
        self.args, self.ctx = args, train.make_context(config, folder, Console(quiet=True))
        self.records = sample.read_pairs(folder / "stages" / "sample", sorted(self.ctx.text.eos_ids))[0]
        self.asked = sample.load_prompts(self.ctx, "builtin:openings", split="eval", n=args.held_out, max_prompt=0)
        self.start, self.gold = self.ctx.params_of("model"), None
        self.size = sum(leaf.size for leaf in jax.tree.leaves(self.start))

    def write(self, path: pathlib.Path, seed: int) -> None:
        """The pairs of a run, epoch after epoch, each in an order of its own that `seed` decides."""
        draw, needed = np.random.default_rng(seed), self.args.batch * self.args.updates
        epochs = [draw.permutation(len(self.records)) for _ in range(-(-needed // len(self.records)))]
        picked = [self.records[i] for i in np.concatenate(epochs)[:needed]]
        write_pairs(path, [tuple(ids.tolist() for ids in (r.prompt, *r.completions)) for r in picked])

    def _sampled(self, params: Any, salt: int) -> tuple[np.ndarray, Any]:
        """Scores of one completion per opening, and the rollouts."""
        from alignax import sample

        rolled, texts = sample.draw(self.ctx, "judge", params, self.asked, num_samples=1, temperature=1.0, top_p=1.0,
                                    max_new_tokens=NEW_TOKENS, batch_size=min(256, len(self.asked)), salt=salt)
        return np.asarray(sample.reward_fn("lexicon")([row[0] for row in texts]), np.float64), rolled

    def judge(self, folder: pathlib.Path) -> dict[str, float]:
        """Win rate against the starting model with its 95% interval, ties half, and KL on the policy's own samples,
        nats per sequence, of the parameters in a Hugging Face folder. All snapshots meet the same draws."""
        from alignax import evaluate, models
        from alignax.diagnostics import compare

        if self.gold is None:
            self.gold = self._sampled(self.start, 5000)[0]
        params = self.ctx.place({"model": models.load(folder)[1]})
        gold, rolled = self._sampled(params, 5001)
        both = evaluate.score_samples(self.ctx, params, self.start, self.asked, [row[0] for row in rolled.tokens],
                                      batch_size=min(256, len(self.asked)))
        rate, low, high = compare.win_rate(gold, self.gold)
        kl, error = compare.kl_on_policy(*both)
        return dict(win_rate=rate, low=low, high=high, kl=kl, kl_se=error, reward=float(gold.mean()))


def run(one: Contender, folder: pathlib.Path, updates: int, every: int, order: dict[str, Any]) -> dict[str, Any]:
    """One run from process start: {"snapshots": [{"update", "clock", "updates_clock", "folder"}], "first", "version"}.

    clock: seconds since the process was started, without those spent on writing snapshots. updates_clock: those of the
    updates alone, without the first, which compiles.
    """
    began, out = time.perf_counter(), []
    worker = Worker(one.name, one.python, one.script, one.settings, folder)
    try:
        loaded = worker.ask("load", **order | dict(one.settings), gate=False)
        clock, steady, done = time.perf_counter() - began, 0.0, 1
        while done < updates:
            count = min(every - done % every, updates - done)
            began = time.perf_counter()
            answer = worker.ask("steps", count=count)
            clock, steady, done = clock + time.perf_counter() - began, steady + sum(answer["seconds"]), done + count
            place = folder / f"{done}"
            worker.ask("save", path=str(place))
            out.append(dict(update=done, clock=clock, updates_clock=steady, folder=str(place)))
    finally:
        worker.close()
    return dict(snapshots=out, version=loaded["version"])


def reached(snapshots: list[dict[str, Any]], level: float, nats: float) -> dict[str, Any] | None:
    """The first snapshot at `level` or above and at no more than `nats`; None where there is none."""
    return next((one for one in snapshots if one["win_rate"] >= level and one["kl"] <= nats), None)


def told(row: dict[str, Any] | None, key: str, digits: int = 1) -> str:
    """A number of a snapshot; where there is none, that it was not reached in the column of the update."""
    if row is None:
        return "not reached" if key == "update" else "-"
    return f"{row[key]:.{digits}f}"


def level_table(runs: dict[str, list[dict]], level: float, nats: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(table, numbers) of one level: seed by seed the first snapshots that reach it, and the ratios of their clocks."""
    rows, ratios = [], {"clock": [], "updates_clock": []}
    for seed in range(len(runs[OURS])):
        found = {name: reached(per_seed[seed]["snapshots"], level, nats) for name, per_seed in runs.items()}
        here = found[OURS]
        for name, row in found.items():
            both = row is not None and here is not None
            shares = {key: row[key] / here[key] if both else None for key in ratios}
            if both and name != OURS:
                for key, values in ratios.items():
                    values.append(shares[key])
            rows.append([f"{seed}, {name}", told(row, "update", 0), told(row, "win_rate", 3), told(row, "kl", 2),
                         told(row, "clock"), told(row, "updates_clock"),
                         *("-" if share is None else f"{share:.2f}" for share in shares.values())])
    if ratios["clock"]:
        rows.append([f"median, seeds: {len(ratios['clock'])}", *[""] * 5, *(spread(v) for v in ratios.values())])
    table = dict(title=f"Until a win rate of {level:g} at no more than {nats:g} nats", rows=rows, columns=[
        "seed, contender", "update", "win rate", "KL, nats", "s since the start", "s of updates",
        "since the start / ours", "updates / ours"])
    return table, {key: quartiles(values) for key, values in ratios.items() if values}


def curve_table(snapshots: list[dict[str, Any]]) -> dict[str, Any]:
    """Our first seed's way through win rate and KL."""
    rows = [[one["update"], f"{one['win_rate']:.3f} ({one['low']:.3f}-{one['high']:.3f})",
             f"{one['kl']:.2f} ({one['kl_se']:.2f})", f"{one['reward']:+.2f}"] for one in snapshots]
    return dict(title="Seed 0, alignax: snapshot by snapshot", rows=rows, columns=[
        "update", "win rate (95%)", "KL, nats (standard error)", "reward"])


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    levels = sorted({args.win_rate, *args.lower}, reverse=True)
    contenders = [ours(OURS, remat="none", unroll=8), trl(TRL, args.trl_python)]
    with workplace() as name:
        folder = pathlib.Path(name)
        task = Task(args, folder / "task", console)
        order = dict(model=str(args.model), batch=args.batch, beta=args.beta, rate=args.rate, clip=1.0)
        paths = [folder / f"pairs{seed}.npz" for seed in range(args.seeds)]
        for seed, path in enumerate(paths):
            task.write(path, seed)
        with Ring(contenders, folder, console, **order, pairs=str(paths[0])) as ring:
            check(ring)
            parity = check(ring, {who: answer["losses"] for who, answer in ring.all("steps", count=3).items()})
            absent = ring.absent | {"Tunix, fp32": NO_TUNIX}
        racing = [one for one in contenders if one.name not in absent]
        runs: dict[str, list[dict]] = {one.name: [] for one in racing}
        for seed, path in enumerate(paths):
            for one in racing[::1 - 2 * (seed % 2)]:
                with console.status(f"seed {seed}: {one.name}"):
                    (place := folder / f"{seed} {one.script}").mkdir()
                    runs[one.name].append(run(one, place, args.updates, args.every, order | dict(pairs=str(path))))
        for who, per_seed in runs.items():
            for seed, found in enumerate(per_seed):
                judged = []
                for one in found["snapshots"]:
                    with console.status(f"seed {seed}: judging {who} after {one['update']} updates"):
                        judged.append(one | task.judge(pathlib.Path(one["folder"])))
                    del judged[-1]["folder"]
                    if (seed or who != OURS) and reached(judged, levels[0], args.nats):
                        break  # our first seed's whole way is shown
                found["snapshots"] = judged
    tables, summary = zip(*(level_table(runs, level, args.nats) for level in levels), strict=True)
    args.model = args.model.name  # the file tells no place of this machine
    return finish(args, console, title="Time to a win rate", about=[
        f"Controlled sentiment, a story model of {task.size:,} parameters: DPO at beta {args.beta:g}, learning rate "
        f"{args.rate:g}, {args.updates} updates of {args.batch} pairs, a snapshot every {args.every}. Judged on "
        f"{args.held_out} held-out openings, the same draws for every snapshot; win rate against the starting model, "
        "ties half; KL on the policy's own samples, nats per sequence.",
        "The clock starts with the process and counts imports, loading, compilation and updates; `s of updates` leaves "
        "out the first update, which compiles. Making the pairs, writing snapshots and judging are not counted. Ratios "
        "are of one seed; above 1 means that ours is faster."],
        tables=[*tables, curve_table(runs[OURS][0]["snapshots"])],
        data=dict(runs=runs, parity=parity, pairs=len(task.records), levels=dict(zip(map(str, levels), summary,
                                                                                    strict=True)),
                  versions={who: per_seed[0]["version"] for who, per_seed in runs.items()}),
        started=started, before=before, absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
