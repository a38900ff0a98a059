"""Epochs over data: the reference computed once against in every update, and what packing and sharing are worth.

    python experiments/benchmarks/epochs.py reference [--quick]
    python experiments/benchmarks/epochs.py hh --trl-python ... --tunix-python ...
    python experiments/benchmarks/epochs.py prefix

reference: three epochs over the same pairs, with log-probs of the reference computed once (their cost counted) and
with the reference run in every update, ours and TRL's.
hh: one epoch over pairs of HH-like lengths (log-normal, medians 90 and 35 tokens, log-spreads 1.0 and 0.95): ours
packs, shares prompts and computes the reference once; TRL and Tunix run as they do by default, and TRL with its own
precomputed reference. The cost of computing the reference is counted.
prefix: a prompt that both completions share against rows of their own, prompt/completion 2048/64, 512/512, 64/512, with
the model of dpo_step.py.

Contenders go through the same parity gate as in dpo_step.py and run update by update in interleaved rounds, on the same
batches in the same order. First updates (compilation) are not part of an epoch and are given beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import (
    TOY,
    Contender,
    Ring,
    Shape,
    finish,
    machine,
    make_model,
    make_pairs,
    megabytes,
    parser,
    ratio,
    spread,
    wide_console,
    workplace,
)
from rich.console import Console
from training import ours, timed, trl, tunix

SMALL = Shape(layers=4, width=256, inner=704, heads=4)
PREFIX = ((2048, 64), (512, 512), (64, 512))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "epochs")
    out.add_argument("what", choices=("reference", "hh", "prefix"), help="which comparison")
    out.add_argument("--pairs", type=int, default=0, help="pairs of an update (default: reference 4, hh 16, prefix 1)")
    out.add_argument("--updates", type=int, default=0, help="timed updates of an epoch (default: 6, 6, 8)")
    out.add_argument("--vocab", type=int, default=32_000, help="vocabulary (default 32000)")
    out.add_argument("--max-prompt", type=int, default=384, help="hh: longest prompt (default 384)")
    out.add_argument("--max-completion", type=int, default=128, help="hh: longest completion (default 128)")
    out.add_argument("--columns", type=int, default=512, help="hh: least length of a packed row (default 512)")
    args = out.parse_args(argv)
    usual = {"reference": (4, 6), "hh": (16, 6), "prefix": (1, 8)}[args.what]
    args.pairs, args.updates = args.pairs or usual[0], args.updates or usual[1]
    if args.json == pathlib.Path("runs/benchmarks/epochs.json"):
        args.json = args.json.with_name(f"epochs_{args.what}.json")
    if args.quick:
        args.pairs, args.updates, args.vocab, args.max_prompt, args.max_completion = 2, 2, TOY.vocab, 24, 12
        args.columns = 0
    return args


def hh_lengths(args: argparse.Namespace, count: int) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) lengths, cut to the bounds."""
    draw = np.random.default_rng(0)

    def some(median: float, log_spread: float, least: int, most: int) -> np.ndarray:
        return np.clip(np.exp(draw.normal(np.log(min(median, most / 3)), log_spread, count)).astype(int), least, most)

    sides = [some(35, 0.95, 2, args.max_completion) for _ in range(2)]
    return list(zip(some(90, 1.0, 4, args.max_prompt).tolist(), *(s.tolist() for s in sides), strict=True))


def run(args: argparse.Namespace, console: Console, contenders: Sequence[Contender], shape: Shape,
        lengths: Sequence[tuple[int, int, int]], *, warmup: int = 1, epochs: int = 1) -> tuple[dict, dict, dict]:
    """(measured, parity, absent) of `epochs` epochs: after the warm-up, update after update."""
    with workplace() as name:
        folder = pathlib.Path(name)
        make_model(folder / "model", shape)
        make_pairs(folder / "pairs.npz", lengths, shape.vocab)
        with Ring(contenders, folder, console, model=str(folder / "model"), pairs=str(folder / "pairs.npz"),
                  batch=args.pairs, beta=0.1, rate=1e-4, clip=1.0) as ring:
            measured, apart = timed(ring, console, rounds=args.updates * epochs, steps=1, warmup=warmup)
            return measured, apart, ring.absent


def totals(measured: dict, batches: int, updates: int) -> dict[str, float]:
    """Seconds of all timed updates, and of computing the reference for as many batches where it is computed once."""
    return {name: sum(one["rounds"]) + one["reference_seconds"] / batches * updates for name, one in measured.items()}


def reference(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Three epochs of the same batches."""
    shape = TOY if args.quick else dataclasses.replace(SMALL, vocab=args.vocab)
    length = (8, 16, 16) if args.quick else (64, 192, 192)
    rows = [ours("alignax, every update"), ours("alignax, computed once", reference="precomputed"),
            trl("TRL, every update", args.trl_python),
            trl("TRL, computed once", args.trl_python, reference="precomputed")]
    measured, apart, absent = run(args, console, rows, shape, [length] * args.pairs * args.updates, epochs=3)
    total = totals(measured, args.updates, args.updates)
    shown = []
    for first in ("alignax", "TRL"):
        every, once = f"{first}, every update", f"{first}, computed once"
        shown += [[name, spread(measured[name]["rounds"], 3), f"{measured[name]['reference_seconds']:.1f}",
                   f"{total[name]:.1f}", f"{total[every] / total[name]:.2f}" if every in total else "-"]
                  for name in (every, once) if name in measured]
    table = dict(title=f"Three epochs of {args.updates} updates, {args.pairs} pairs x {sum(length[:2])} tokens",
                 columns=["reference", "s per update", "reference, s", "three epochs, s", "gain"], rows=shown)
    return dict(title="Reference computed once", tables=[table], data=dict(measured=measured, parity=apart),
                absent=absent, about=["`three epochs` counts the pass that computes the reference once; `gain` is "
                                      "against the same library running the reference in every update."])


def hh(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One epoch of unequal lengths."""
    shape = TOY if args.quick else dataclasses.replace(SMALL, vocab=args.vocab)
    first = "alignax, packed, shared prefix, reference once"
    rows = [ours(first, layout="shared_prefix_packed", reference="precomputed", columns=args.columns, multiple=32),
            ours("alignax, padded, reference in every update", multiple=32),
            trl("TRL, fp32", args.trl_python),
            trl("TRL, fp32, reference once", args.trl_python, reference="precomputed"),
            trl("TRL, bf16 autocast", args.trl_python, bf16=True), tunix("Tunix, fp32", args.tunix_python)]
    warmup = 1
    batches = args.updates + warmup + 1
    lengths = hh_lengths(args, args.pairs * batches)
    measured, apart, absent = run(args, console, rows, shape, lengths, warmup=warmup)
    total = totals(measured, batches, args.updates)
    tokens = sum(2 * p + c + r for p, c, r in lengths[args.pairs * (batches - args.updates):])
    # The share of an update that its part of the reference's pass adds, round by round.
    whole = {n: [s + one["reference_seconds"] / batches for s in one["rounds"]] for n, one in measured.items()}
    table = dict(title=f"An epoch of {args.updates} updates of {args.pairs} HH-like pairs",
                 columns=["contender", "epoch, s", "tokens/s", "time / ours", "reference, s", "first update, s",
                          "peak RSS MB"],
                 rows=[[name, f"{total[name]:.1f}", f"{tokens / total[name]:,.0f}", ratio(whole[name], whole[first]),
                        f"{one['reference_seconds'] / batches * args.updates:.1f}", f"{one['first_seconds']:.1f}",
                        megabytes(one["peak"])] for name, one in measured.items()])
    return dict(title="An epoch over HH-shaped data", tables=[table], data=dict(measured=measured, parity=apart),
                absent=absent, about=[
                    "Lengths are log-normal, medians 90 (prompt) and 35 (completion) tokens, at most "
                    f"{args.max_prompt} and {args.max_completion}. Tokens are counted as in rows of their own: a "
                    "prompt with each of its completions. An epoch counts the pass that computes the reference once.",
                    "Each contender sees the same batches in file order. Tunix pads to the longest pair of the data, "
                    "since each further shape is another compilation; TRL pads to the longest of a batch."])


def prefix(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Shared prefix against rows of their own."""
    shape = TOY if args.quick else Shape(vocab=args.vocab)
    cases = ((16, 4), (8, 8)) if args.quick else PREFIX
    shown, kept = [], {}
    for prompt, completion in cases:
        pairs = args.pairs
        rows = [ours("padded"), ours("shared_prefix", layout="shared_prefix")]
        lengths = [(prompt, completion, completion)] * pairs * (args.updates + 2)
        measured, apart, _ = run(args, console, rows, shape, lengths)
        kept[f"{prompt}/{completion}"] = dict(measured=measured, parity=apart)
        apart_rows, shared = measured["padded"], measured["shared_prefix"]
        shown.append([f"{prompt}/{completion}", spread(apart_rows["rounds"], 3), spread(shared["rounds"], 3),
                      ratio(apart_rows["rounds"], shared["rounds"]),
                      f"{2 * (prompt + completion) / (prompt + 2 * completion):.2f}",
                      f"{(shared['peak'] or 0) / (apart_rows['peak'] or 1):.2f}"])
    table = dict(title=f"One update of {args.pairs} pair(s), frozen reference",
                 columns=["prompt/completion", "padded, s", "shared prefix, s", "speed-up", "fewer tokens by",
                          "RSS shared / padded"], rows=shown)
    return dict(title="Shared prefix", tables=[table], data=kept, absent={}, about=[
        "Ours against ours: the prompt computed once for both completions, or with each of them."])


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    made = {"reference": reference, "hh": hh, "prefix": prefix}[args.what](args, console)
    return finish(args, console, started=started, before=before, **made)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
