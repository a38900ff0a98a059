"""Time of an update with each loss against DPO, for the losses that see log-probs, lengths and reference log-probs.

    python experiments/benchmarks/losses.py [--quick]

One small model, one batch; every loss gets the same arrays and has a program of its own. Rounds: in each, every loss
runs one update, another one first each time. Ratios are medians of the rounds' own. A loss without a reference skips
the reference's forward pass and is listed apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import TOY, Shape, finish, machine, parser, quartiles, wide_console
from rich.console import Console

from alignax import data, losses, models, optim, step

INPUTS = {"logps", "ref_logps", "lengths"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "losses", peers=False)
    out.add_argument("--losses", default="", help="comma-separated, dpo always first (default: all of the kind)")
    out.add_argument("--rounds", type=int, default=12, help="updates of each loss (default 12)")
    out.add_argument("--pairs", type=int, default=8, help="pairs of an update (default 8)")
    out.add_argument("--length", type=int, default=128, help="tokens of prompt and completion together (default 128)")
    args = out.parse_args(argv)
    if args.quick:
        args.losses, args.rounds, args.pairs, args.length = "simpo", 3, 2, 16
    return args


class Run:
    """One loss's compiled update and its state."""

    def __init__(self, name: str, spec: step.ModelSpec, params, batch):
        self.name, self.batch = name, batch
        loss, optimizer = losses.get(name), optim.make(clip_norm=1.0)
        self.reference = {"model": params} if "ref_logps" in loss.requests else None
        start = jax.tree.map(jnp.copy, {"model": params})
        self.state = step.TrainState(jnp.int32(0), start, optimizer.init(start), loss.init_state())
        self.update = jax.jit(step.make_update(spec, loss, optimizer), donate_argnums=0)

    def seconds(self) -> float:
        """Wall time of the next update."""
        began = time.perf_counter()
        self.state, metrics = self.update(self.state, self.reference, self.batch, {}, jax.random.key(0))
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    shape = TOY if args.quick else dataclasses.replace(Shape(), layers=2, width=128, inner=352, heads=2, vocab=4096)
    known = [n for n in losses.names() if "logps" in losses.get(n).requests and set(losses.get(n).requests) <= INPUTS]
    wanted = args.losses.split(",") if args.losses else known
    config = shape.decoder()
    params = models.init_params(config, jax.random.key(0))
    draw, half = np.random.default_rng(0), args.length // 2
    ids = lambda: draw.integers(3, shape.vocab, half).tolist()
    records = [data.token_record(f"r{i}", ids(), (ids(), ids()), eos_ids=(2,)) for i in range(args.pairs)]
    batch = jax.device_put(data.padded(records, K=2, T=2 * half, L=half, pad_id=0))
    runs, absent = [], {}
    for name in dict.fromkeys(["dpo", *wanted]):
        with console.status(f"compiling {name}"):
            if "triple" in name:
                absent[name] = "it takes three completions of a prompt, so its inputs are not those of DPO"
                continue
            runs.append(Run(name, step.ModelSpec(config), params, batch))
            runs[-1].seconds()
    seconds = []
    for number in range(args.rounds):
        turn = number % len(runs)
        row = {run.name: run.seconds() for run in runs[turn:] + runs[:turn]}
        seconds.append([row[run.name] for run in runs])
    times = np.asarray(seconds)
    found = {run.name: quartiles(times[:, i] / times[:, 0]) for i, run in enumerate(runs)}
    kinds = [("with a reference", [r for r in runs if r.reference is not None]),
             ("without a reference", [r for r in runs if r.reference is None])]
    tables = [dict(title=f"Losses {kind}: time / DPO, {args.rounds} rounds",
                   columns=["loss", "time / DPO", "quartiles"],
                   rows=[[r.name, f"{found[r.name][1]:.3f}", "{:.3f}-{:.3f}".format(*found[r.name][::2])]
                         for r in sorted(some, key=lambda r: found[r.name][1])])
              for kind, some in kinds if some]
    return finish(args, console, title="Time of each loss against DPO", about=[
        f"One model of {sum(a.size for a in jax.tree.leaves(params)) / 1e6:.1f}M parameters, {args.pairs} pairs of "
        f"{2 * half} tokens; DPO takes {1e3 * float(np.median(times[:, 0])):.0f} ms. A ratio of 1.02 means 2% slower."],
        tables=tables, data=dict(ratios=found, seconds={r.name: times[:, i].tolist() for i, r in enumerate(runs)}),
        started=started, before=before, absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
