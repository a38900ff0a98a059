"""One DPO update of a Llama on a CPU: ours, TRL and Tunix, on the same weights and token ids.

    python experiments/benchmarks/dpo_step.py --trl-python ... --tunix-python ... [--quick]

The baseline case: 58.5 million parameters in float32 (8 layers, width 512, MLP 1,408, vocabulary 32,000, untied), 4
pairs of 256 tokens of which 64 are the prompt; policy forward and backward, reference forward, clipping at 1, AdamW.
Every contender goes through its own trainer's step, from token ids on the host to new parameters. Parity is checked
before anything is timed: log-probs of each sequence, the loss of the first step and those after it.

Matched rows: `frozen` runs the reference in every step, as TRL (fp32) and Tunix do. The others use what each offers:
TRL's bfloat16 autocast and its precomputed reference; ours with a precomputed reference, and with a prompt that both
completions share. Ours runs with the settings of the library's configs (layers in a loop, 64 MB of logits, attention
auto) but for model.remat=dots.

Memory needed: about 2 GB for each contender. --only picks some of them.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

from common import (
    TOY,
    Ring,
    Shape,
    finish,
    machine,
    make_model,
    make_pairs,
    megabytes,
    parser,
    quartiles,
    ratio,
    spread,
    wide_console,
    workplace,
)
from rich.console import Console
from training import ours, timed, trl, tunix

OURS = "alignax, frozen reference"


def contenders(args: argparse.Namespace) -> list:
    """All rows; ours first, since ratios are taken against it."""
    rows = [ours(OURS), trl("TRL, fp32", args.trl_python), trl("TRL, bf16 autocast", args.trl_python, bf16=True),
            tunix("Tunix, fp32", args.tunix_python), ours("alignax, precomputed reference", reference="precomputed"),
            ours("alignax, shared prefix", layout="shared_prefix"),
            ours("alignax, shared prefix, precomputed", layout="shared_prefix", reference="precomputed"),
            trl("TRL, fp32, precomputed reference", args.trl_python, reference="precomputed")]
    wanted = args.only.split(";") if args.only else [row.name for row in rows]
    unknown = set(wanted) - {row.name for row in rows}
    if unknown:
        raise SystemExit(f"--only: {sorted(unknown)}; allowed, separated by semicolons: {[row.name for row in rows]}")
    return [row for row in rows if row.name in wanted]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "dpo_step")
    out.add_argument("--vocab", type=int, default=32_000, help="vocabulary (default 32000)")
    out.add_argument("--pairs", type=int, default=4, help="pairs of an update (default 4)")
    out.add_argument("--length", type=int, default=256, help="tokens of prompt and completion together (default 256)")
    out.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    out.add_argument("--rounds", type=int, default=6, help="interleaved rounds (default 6)")
    out.add_argument("--steps", type=int, default=1, help="updates of each contender in a round (default 1)")
    out.add_argument("--warmup", type=int, default=2, help="updates before them, after the first (default 2)")
    out.add_argument("--only", default="", help="names of contenders, separated by semicolons (default: all)")
    args = out.parse_args(argv)
    if args.quick:
        args.vocab, args.pairs, args.length, args.prompt, args.rounds = TOY.vocab, 2, 24, 8, 2
    return args


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    shape = TOY if args.quick else Shape(vocab=args.vocab)
    completion = args.length - args.prompt
    with workplace() as name:
        folder = pathlib.Path(name)
        model, pairs = folder / "model", folder / "pairs.npz"
        count = make_model(model, shape)
        # Another batch each time, so that nothing is learned by heart and no update meets a loss of 0.
        batches = 1 + args.warmup + args.rounds * args.steps
        make_pairs(pairs, [(args.prompt, completion, completion)] * args.pairs * batches, shape.vocab)
        with Ring(contenders(args), folder, console, model=str(model), pairs=str(pairs), batch=args.pairs, beta=0.1,
                  rate=1e-4, clip=1.0) as ring:
            measured, apart = timed(ring, console, rounds=args.rounds, steps=args.steps, warmup=args.warmup)
            absent = ring.absent
    tokens = 2 * args.pairs * args.length
    first = measured.get(OURS) or next(iter(measured.values()))
    rows = []
    for name, one in measured.items():
        seconds = one["rounds"]
        rows.append([name, spread(seconds), f"{quartiles(one['cpu'])[1]:.2f}", f"{tokens / quartiles(seconds)[1]:,.0f}",
                     ratio(seconds, first["rounds"]), f"{one['first_seconds']:.1f}", megabytes(one["peak"]),
                     f"{one['peak'] / first['peak']:.2f}" if one["peak"] and first["peak"] else "-"])
    table = dict(title=f"DPO update, {count / 1e6:.1f}M parameters, {args.pairs} pairs x {args.length} tokens",
                 columns=["contender", "s per update", "CPU s", "tokens/s", "time / ours", "first update, s",
                          "peak RSS MB", "RSS / ours"], rows=rows)
    return finish(args, console, title="One DPO update", about=[
        "Matched rows run the reference in every update; `time / ours` is the median (quartiles) of the rounds' own "
        f"ratios against \"{OURS}\", so above 1 means that ours is faster.",
        "Times go from token ids on the host to new parameters, through each library's own trainer. The first update "
        "includes compilation. RSS is the high-water mark of the process, loading and compiling included. "
        "CPU seconds are those of all threads; other jobs of a shared machine touch them less than the clock."],
        tables=[table], data=dict(parameters=count, measured=measured, parity=apart), started=started, before=before,
        absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
