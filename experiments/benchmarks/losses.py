"""Time of an update with each loss against DPO, beside the model passes that the request table declares for it.

    python experiments/benchmarks/losses.py [--quick] [--losses simpo,kto]

One small model and one set of records; every loss has a program of its own. A loss is timed in turns with DPO, update
by update, and its ratio is the median over these pairs. Programs of equal cost differ by some percent on a shared
machine (where their memory lies, what else runs): DPO compiled again and timed like a loss tells by how many.

Two kinds of losses: those that see log-probs, lengths and log-probs of the reference only, which should cost what DPO
costs (or less, without a reference); and the others, whose declared passes say what to expect: `expected` counts a
backward pass as two forward passes, and the completions that the loss takes. The ratio of FLOPs is the compiler's own
count, which no other job on the machine disturbs.

Cost: about 20 minutes on two idle cores, most of it compiling.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import TOY, Shape, finish, machine, parser, quartiles, wide_console
from rich.console import Console

from alignax import data, losses, metrics, models, optim, step
from alignax.types import REQUESTS, ConfigError, DataError, passes

AGAIN = 6  # further programs of DPO
GROUP = 12  # programs at a time: each maps much memory, and a process may map so much
INPUTS = {"logps", "ref_logps", "lengths"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "losses", peers=False)
    out.add_argument("--losses", default="", help="comma-separated (default: every loss whose batch can be made)")
    out.add_argument("--rounds", type=int, default=0, help="updates of each loss (default 48; 6 for the other kind)")
    out.add_argument("--pairs", type=int, default=4, help="prompts of an update (default 4)")
    out.add_argument("--length", type=int, default=128, help="tokens of prompt and completion together (default 128)")
    args = out.parse_args(argv)
    if args.quick:
        args.losses, args.rounds, args.pairs, args.length = "simpo,kto,orpo", 3, 2, 16
    return args


class Run:
    """One loss's compiled update, its batch and its state."""

    def __init__(self, name: str, shape: Shape, params, pairs: int, half: int, label: str = ""):
        self.name, self.loss = label or name, losses.get(name)
        self.completions = self.loss.info.completions or 2
        self.plain = set(self.loss.requests) <= INPUTS and self.completions == 2
        self.passes = passes(self.loss.requests)
        draw, K = np.random.default_rng(0), self.completions
        ids = lambda count=half: draw.integers(3, shape.vocab, count).tolist()
        record = lambda i, more: data.token_record(f"r{i}", ids(), [ids() for _ in range(more)], eos_ids=(2,),
                                                   scores=[1 - k / more for k in range(more)],
                                                   labels=[float(k == 0) for k in range(more)], margin=1.0)
        records = [record(i, K) for i in range(pairs)]
        wanted = {REQUESTS[r].stream for r in self.loss.requests if REQUESTS[r].passes} - {"pair"}
        extra = {stream: [record(i, K) for i in range(pairs)] for stream in wanted}
        self.batch = jax.device_put(data.padded(records, K=K, T=2 * half, L=half, pad_id=0, extra=extra))
        self.key = jax.random.key(0)
        self.reference = {"model": params} if any(p.reference_forward for p in self.passes.values()) else None
        heads = models.init_heads(self.loss.requests, shape.width, shape.vocab, self.key)
        start = jax.tree.map(jnp.copy, {"model": params, **heads})
        optimizer = optim.make(clip_norm=1.0)
        self.state = step.TrainState(jnp.int32(0), start, optimizer.init(start), self.loss.init_state())
        update = jax.jit(step.make_update(step.ModelSpec(shape.decoder()), self.loss, optimizer), donate_argnums=0)
        self.update = update.lower(self.state, self.reference, self.batch, {}, self.key).compile()
        self.flops = self.update.cost_analysis()["flops"]  # of one update, as the compiler counts

    @property
    def expected(self) -> float:
        """Passes over completions, relative to DPO's: forward and backward of the policy, forward of the reference."""
        units = sum(p.policy_forward + 2 * p.policy_backward + p.reference_forward for p in self.passes.values())
        return units * self.completions / 8

    def release(self) -> None:
        """Lets go of the program and the state."""
        self.update = self.state = self.batch = None

    def seconds(self) -> float:
        """Wall time of the next update."""
        began = time.perf_counter()
        self.state, metrics = self.update(self.state, self.reference, self.batch, {}, self.key)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began


def in_turns(run: Run, base: Run, rounds: int) -> list[tuple[float, float]]:
    """Seconds of an update of both, another one first each time, after one of the run."""
    run.seconds()
    turns = [(base, run) if i % 2 else (run, base) for i in range(rounds)]
    return [(both[run], both[base]) for both in ({r: r.seconds() for r in turn} for turn in turns)]


def declared(run: Run) -> str:
    """The passes as words: `policy 1 + 1 back, reference 1`, and the streams beside the pairs."""
    words = []
    for stream, one in sorted(run.passes.items(), key=lambda item: item[0] != "pair"):
        parts = ([f"policy {one.policy_forward}" + f" + {one.policy_backward} back" * bool(one.policy_backward)]
                 * bool(one.policy_forward) + [f"reference {one.reference_forward}"] * bool(one.reference_forward))
        words.append(("" if stream == "pair" else f"{stream}: ") + ", ".join(parts))
    return "; ".join(words)


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    shape = TOY if args.quick else dataclasses.replace(Shape(), layers=2, width=128, inner=352, heads=2, vocab=4096)
    half, wanted = args.length // 2, args.losses.split(",") if args.losses else losses.names()
    params = models.init_params(shape.decoder(), jax.random.key(0))
    absent = {}

    def made(job: tuple[str, str]) -> Run | None:
        name, label = job
        try:
            return Run(name, shape, params, args.pairs, half, label)
        except (ConfigError, DataError) as error:
            absent[name] = " ".join(str(error).split())
            return None

    base, runs, times = Run("dpo", shape, params, args.pairs, half), [], {}
    base.seconds()
    jobs = [(name, "") for name in wanted if name != "dpo"]
    again = [f"dpo, again {i}" for i in range(1, AGAIN + 1)] if not args.losses else []
    for number, label in enumerate(again):  # spread over the run: its slow moments show
        jobs.insert(number * (len(wanted) // AGAIN) + number, ("dpo", label))
    with metrics.progress(console) as bar, concurrent.futures.ThreadPoolExecutor(2) as pool:
        task = bar.add_task("losses", total=len(jobs), numbers="")
        for first in range(0, len(jobs), GROUP):
            # A list: nothing compiles while another is timed.
            for run in list(pool.map(made, jobs[first:first + GROUP])):
                if run is not None:
                    bar.update(task, description=run.name)
                    times[run.name] = in_turns(run, base, args.rounds or (48 if run.plain else 6))
                    run.release()
                    runs.append(run)
                bar.advance(task)
            jax.clear_caches()
    found = {name: quartiles(np.divide(*np.transpose(some))) for name, some in times.items()}
    ratio = lambda run: [f"{found[run.name][1]:.3f}", "{:.3f}-{:.3f}".format(*found[run.name][::2]),
                         f"{run.flops / base.flops:.3f}"]
    tables = []
    plain = [r for r in runs if r.plain and r.name not in again]
    for kind, some in (("with a reference", [r for r in plain if r.reference is not None]),
                       ("without a reference", [r for r in plain if r.reference is None])):
        rows = [[r.name, *ratio(r)] for r in sorted(some, key=lambda r: found[r.name][1])]
        tables += [dict(title=f"Losses of log-probs and lengths, {kind}: one update / DPO's",
                        columns=["loss", "time / DPO", "quartiles", "FLOPs / DPO"], rows=rows)] * bool(rows)
    if again:
        tables.append(dict(title="DPO compiled again: what equal programs come to",
                           columns=["program", "time / DPO", "quartiles", "FLOPs / DPO"],
                           rows=[[r.name, *ratio(r)] for r in runs if r.name in again]))
    others = [[r.name, *ratio(r), f"{r.expected:.2f}", r.completions, declared(r)]
              for r in sorted((r for r in runs if not r.plain), key=lambda r: r.expected)]
    if others:
        tables.append(dict(title="The other losses beside the passes that they declare", rows=others,
                           columns=["loss", "time / DPO", "quartiles", "FLOPs / DPO", "expected", "completions",
                                    "passes"]))
    spent = float(np.median([pair[1] for some in times.values() for pair in some]))
    millions = sum(a.size for a in jax.tree.leaves(params)) / 1e6
    about = (f"One model of {millions:.1f}M parameters, {args.pairs} prompts, rows of {2 * half} tokens; DPO takes "
             f"{1e3 * spent:.0f} ms. A ratio of 1.02 means 2% slower. Expected: the declared passes, a backward pass "
             "counted as two, times completions, relative to DPO's.")
    return finish(args, console, title="Time of each loss against DPO", about=[about], tables=tables,
                  data=dict(ratios=found, seconds=times, flops={r.name: r.flops for r in [base, *runs]}),
                  started=started, before=before, absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
