"""The four layouts side by side: non-pad tokens per second and fill on preference pairs of HH-like lengths.

    python experiments/benchmarks/layouts.py [--quick] [--json runs/benchmarks/layouts.json]

One DPO update (frozen reference, AdamW) of a random decoder on the same pairs in every layout. Prompts and
completions have log-normal lengths, medians 90 and 35 tokens and log-spreads 1.0 and 0.95: those of HH's harmless-base
test dialogues at four characters to a token. Before anything is timed, the log-probs of every sequence of a batch
must agree between the layouts to 1e-4 nats plus four units in the last place of a float32 of that size. Then rounds:
each round times one update in every layout on the same records, so that a slow moment of a shared machine hits all of
them.

Tokens are those of the padded layout (a prompt counts with each of its completions) in every row of the table, so
that the ratio is one of time. `fill` is the share of grid cells that hold a token. Times are medians with quartiles
over the rounds, ratios medians of the rounds' own ratios. Placing a batch on the device is part of the time.

Cost: four compilations and (rounds + warmup) updates in each layout; `--quick` takes well under a minute on an idle
machine. Expected fill at the default size: padded and shared_prefix 0.33, packed 0.80, shared_prefix_packed 0.81; with
--batch 128 the packed ones reach 0.88 and 0.90. One shape holds the fullest batch of the run, so larger batches, which
vary less, are packed better.
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import finish, gate, machine, parser, quartiles, wide_console, written
from rich.console import Console

from alignax import data, losses, models, step

TOLERANCE = 1e-4  # nats, of a sequence's sum in float32


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "layouts", peers=False)
    out.add_argument("--batch", type=int, default=32, help="pairs of an update (default 32)")
    out.add_argument("--rounds", type=int, default=30, help="timed updates of each layout (default 30)")
    out.add_argument("--warmup", type=int, default=5, help="updates of each layout before them (default 5)")
    out.add_argument("--max-prompt", type=int, default=384, help="longest prompt (default 384)")
    out.add_argument("--max-completion", type=int, default=128, help="longest completion (default 128)")
    out.add_argument("--columns", type=int, default=0, help="least row length of the packed layouts (default: none)")
    out.add_argument("--hidden", type=int, default=128, help="model width; 2 layers per 128 (default 128)")
    out.add_argument("--vocab", type=int, default=4096, help="vocabulary (default 4096)")
    out.add_argument("--seed", type=int, default=0, help="seed of lengths, tokens and parameters")
    args = out.parse_args(argv)
    if args.quick:
        args.batch, args.rounds, args.warmup, args.max_prompt, args.max_completion = 4, 3, 1, 48, 16
        args.hidden, args.vocab = 32, 64
    return args


def pairs(args: argparse.Namespace) -> list[data.TokenRecord]:
    """Random ids with lengths as the module says, cut to the bounds; one record per timed or warm-up pair."""
    rng = np.random.default_rng(args.seed)

    def lengths(median: float, spread: float, least: int, most: int) -> np.ndarray:
        scale = min(most / 4, median)  # a quick run keeps the shape of the lengths
        return np.clip(np.exp(rng.normal(np.log(scale), spread, n)).astype(int), least, most)

    n = args.batch * (args.rounds + args.warmup)
    prompts = lengths(90, 1.0, 4, args.max_prompt)
    sides = [lengths(35, 0.95, 2, args.max_completion) for _ in range(2)]
    draw = lambda size: rng.integers(3, args.vocab, size).tolist()
    return [data.token_record(f"r{i}", draw(prompts[i]), [[*draw(side[i] - 1), 2] for side in sides], eos_ids=(2,))
            for i in range(n)]


class Layout:
    """One layout's compiled update with its own state."""

    def __init__(self, name: str, records: list[data.TokenRecord], args: argparse.Namespace):
        plan = data.Plan(len(records), args.batch, args.seed)
        self.name, self.records, self.plan = name, records, plan
        self.shape = data.plan_shape(records, name, 32, batches=plan.sequence(args.rounds + args.warmup),
                                     columns=args.columns)
        config = models.DecoderConfig(
            vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
            num_layers=2 * max(args.hidden // 128, 1), num_heads=4, num_kv_heads=4, head_dim=args.hidden // 4,
            max_positions=args.max_prompt + args.max_completion)
        spec, optimizer, self.loss = step.ModelSpec(config), optax.adamw(1e-4), losses.get("dpo")
        tree = lambda seed: {"model": models.init_params(config, jax.random.key(seed))}
        params, self.reference = tree(args.seed), tree(args.seed + 1)
        self.state = step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)
        self.evaluate = jax.jit(step.make_evaluate(spec, self.loss))
        self.cells = self.tokens = 0
        batch, key = jax.device_put(self.batch(0)), jax.random.key(0)
        began = time.perf_counter()
        update = jax.jit(step.make_update(spec, self.loss, optimizer), donate_argnums=0)
        self.update = update.lower(self.state, self.reference, batch, {}, key).compile()
        self.compile_seconds = time.perf_counter() - began
        self.temporaries = self.update.memory_analysis().temp_size_in_bytes

    def batch(self, number: int):
        """Global batch `number` of the plan on the host."""
        return data.fill([self.records[i] for i in self.plan.batch_indices(number)], self.shape, self.name, pad_id=0)

    def log_probs(self) -> np.ndarray:
        """[B, 2] of batch 0 under the starting parameters."""
        arrays = self.evaluate(self.state.params, self.reference, self.batch(0), {}, None, None)[1]
        return np.asarray(arrays["logps"])

    def seconds(self, number: int) -> float:
        """Wall time of update `number`, with the transfer of its batch; rows were filled before."""
        batch = self.batch(number)
        tokens, cells = data.occupancy(batch)
        self.tokens, self.cells = self.tokens + tokens, self.cells + cells
        began = time.perf_counter()
        self.state, metrics = self.update(self.state, self.reference, jax.device_put(batch), {}, jax.random.key(0))
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began


def measure(args: argparse.Namespace, console: Console) -> list[dict]:
    """Parity, then the rounds; one row of numbers for each layout. Raises DataError where log-probs differ."""
    records = pairs(args)
    made = []
    for name in data.LAYOUT_NAMES:
        with console.status(f"compiling {name}"):
            made.append(Layout(name, records, args))
    apart = gate({one.name: one.log_probs().ravel() for one in made}, TOLERANCE, "log-probs")
    for number in range(args.warmup):
        for one in made:
            one.seconds(number)
    tokens, seconds = [], []
    for one in made:
        one.tokens = one.cells = 0
    for number in range(args.warmup, args.warmup + args.rounds):
        some = [records[i] for i in made[0].plan.batch_indices(number)]
        tokens.append(sum(len(r.prompt) + len(c) for r in some for c in r.completions))
        # Another layout begins each round, so that none always runs on the other's warm caches.
        turn = number % len(made)
        row = {one.name: one.seconds(number) for one in made[turn:] + made[:turn]}
        seconds.append([row[one.name] for one in made])
    times, counts = np.asarray(seconds), np.asarray(tokens, float)
    return [dict(layout=one.name, shape=one.shape._asdict(), fill=one.tokens / one.cells,
                 cells_per_update=one.cells / args.rounds, tokens_per_second=quartiles(counts / times[:, i]),
                 speed_against_padded=quartiles(times[:, 0] / times[:, i]), log_probs_apart=apart[one.name],
                 compile_seconds=one.compile_seconds, temporary_megabytes=one.temporaries / 1e6)
            for i, one in enumerate(made)]


def shown(row: dict) -> list[str]:
    """A row of the table."""
    columns = row["shape"]["T"]
    return [row["layout"], f"{row['cells_per_update'] / columns:.0f} x {columns}", f"{row['fill']:.2f}",
            written(row["tokens_per_second"], 0), written(row["speed_against_padded"]),
            f"{row['temporary_megabytes']:.0f}", f"{row['compile_seconds']:.1f}"]


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    rows = measure(args, console)
    table = dict(title=f"{args.batch} pairs of HH-like lengths", rows=[shown(row) for row in rows], columns=[
        "layout", "rows x T", "fill", "tokens/s", "time padded / it", "temporaries MB", "compile s"])
    about = ("One update of a small model on the same pairs in every layout, frozen reference. Tokens are those of the "
             "padded layout, so that the ratio is one of time.")
    return finish(args, console, title="The four layouts", about=[about], tables=[table], data={"layouts": rows},
                  started=started, before=before)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
