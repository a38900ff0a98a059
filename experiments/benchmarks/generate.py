"""Sampling: ours, transformers' generate and Tunix's sampler on the same weights and prompts, new tokens per second.

    python experiments/benchmarks/generate.py --trl-python ... --tunix-python ... [--quick]

The model of dpo_step.py (58.5 million parameters, float32), prompts of 64 tokens, 128 new tokens, temperature 1, the
whole vocabulary. Equal lengths: nothing ends a completion. Skewed lengths: a share of the vocabulary counts as end
tokens, so that lengths are geometric; four batches' worth of prompts, tokens after an end not counted. Ours refills
rows that have ended (rollout.refill); the others take batch after batch, each of which waits for its longest one.

Before anything is timed, what each contender sampled is scored by one forward pass: the mean of -log p(token) -
entropy over its tokens has expectation 0 under the right law and must be within 5 standard errors of it. Ours also
returns three log-probs for each token, which the others do not.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    TOY,
    Contender,
    Ring,
    Shape,
    finish,
    machine,
    make_model,
    megabytes,
    parser,
    ratio,
    spread,
    wide_console,
    workplace,
)
from rich.console import Console

from alignax import models
from alignax.types import DataError

OURS = "alignax"
_BATCHES = 2  # of prompts, in the skewed case


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "generate")
    out.add_argument("--batches", default="8,32", help="comma-separated batch sizes (default 8,32)")
    out.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default 64)")
    out.add_argument("--new", type=int, default=128, help="new tokens (default 128)")
    out.add_argument("--skewed", type=int, default=32, help="batch of the skewed case, 0 for none (default 32)")
    out.add_argument("--mean", type=int, default=32, help="mean length where completions end (default 32)")
    out.add_argument("--rounds", type=int, default=3, help="interleaved rounds of each case (default 3)")
    args = out.parse_args(argv)
    if args.quick:
        args.batches, args.prompt, args.new, args.skewed, args.mean, args.rounds = "2", 8, 16, 4, 6, 2
    return args


def law(folder: pathlib.Path, prompts: list[list[int]], tokens: list[list[int]]) -> tuple[float, float]:
    """(mean, standard error) of -log p(token) - entropy over completions of equal length, in nats."""
    config, params = models.load(folder)
    ids = jnp.concatenate([jnp.asarray(prompts, jnp.int32), jnp.asarray(tokens, jnp.int32)], 1)
    rows, columns = ids.shape

    def surprise(ids: jax.Array) -> jax.Array:
        ones = jnp.ones(ids.shape, jnp.int32)
        position = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32)[None], ids.shape)
        hidden = models.forward(config, params, ids, ones, 0 * ones, position)[:, len(prompts[0]) - 1:-1]
        logp = jax.nn.log_softmax(models.logits(config, params, hidden))
        entropy = -(jnp.exp(logp) * logp).sum(-1)
        return -jnp.take_along_axis(logp, ids[:, len(prompts[0]):, None], -1)[..., 0] - entropy

    found = np.concatenate([np.asarray(one) for one in map(jax.jit(surprise), jnp.split(ids, rows))]).ravel()
    return float(found.mean()), float(found.std() / np.sqrt(found.size))


def check_laws(ring: Ring, folder: pathlib.Path, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Every contender's samples against the model's own distribution. Raises DataError where they differ."""
    out = {}
    for name, answer in ring.all("generate", prompts=prompts, new=new, seed=1, ends=[], batch=len(prompts),
                                 show=True).items():
        mean, error = law(folder, prompts, answer["ids"])
        out[name] = {"mean": mean, "standard_error": error}
        if not abs(mean) < 5 * error:
            raise DataError(f"{name}: sampled tokens are {mean:.4f} nats from the model's law, allowed 5 standard "
                            f"errors of {error:.4f}; nothing was timed")
    return out


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    shape = TOY if args.quick else Shape()
    draw = np.random.default_rng(0)
    cases = [(f"{size} equal", int(size), int(size), []) for size in args.batches.split(",")]
    if args.skewed:
        ends = list(range(3, 3 + round(shape.vocab / args.mean)))
        cases.append((f"{args.skewed} skewed", _BATCHES * args.skewed, args.skewed, ends))
    contenders = [Contender(OURS, sys.executable, "worker_ours.py"),
                  Contender("transformers", args.trl_python, "worker_trl.py"),
                  Contender("Tunix", args.tunix_python, "worker_tunix.py")]
    measured: dict[str, Any] = {}
    rows = []
    with workplace() as name:
        folder = pathlib.Path(name)
        make_model(folder / "model", shape)
        with Ring(contenders, folder, console, model=str(folder / "model"), task="generate") as ring:
            # No id that could end or pad anything stands in a prompt.
            most = max(count for _, count, _, _ in cases)
            prompts = draw.integers(shape.vocab // 2, shape.vocab, (most, args.prompt))
            laws = check_laws(ring, folder / "model", prompts[:cases[0][1]].tolist(), args.new)
            for case, count, size, ends in cases:
                given = dict(prompts=prompts[:count].tolist(), new=args.new, ends=ends, batch=size)
                first = ring.all("generate", **given, seed=2)  # compiles
                answers = ring.rounds(args.rounds, console, "generate", **given, seed=3)
                speed = {name: [a["tokens"] / a["seconds"] for a in one] for name, one in answers.items()}
                measured[case] = {name: dict(tokens_per_second=speed[name], tokens=[a["tokens"] for a in one],
                                             cpu=[a["cpu"] for a in one], first_seconds=first[name]["seconds"],
                                             peak=one[-1]["peak"])
                                  for name, one in answers.items()}
                rows += [[case, name, spread(values, 0), f"{measured[case][name]['cpu'][-1]:.2f}",
                          ratio(speed[OURS], values), f"{measured[case][name]['first_seconds']:.1f}",
                          megabytes(measured[case][name]["peak"])]
                         for name, values in speed.items()]
            absent, found = ring.absent, {name: one["version"] for name, one in ring.loaded.items()}
    table = dict(title=f"Sampling, prompts of {args.prompt} tokens, {args.new} new ones",
                 columns=["batch", "contender", "new tokens/s", "CPU s", "ours / it", "first call, s", "peak RSS MB"],
                 rows=rows)
    return finish(args, console, title="Sampling", about=[
        "Temperature 1 over the whole vocabulary, float32. `ours / it` is the median (quartiles) of the rounds' own "
        "ratios of speed, so above 1 means that ours is faster. The first call includes compilation.",
        f"Skewed: {_BATCHES} batches of prompts, whose completions end at random, {args.mean} tokens long on average "
        f"and {args.new} at most; tokens are counted up to the end. Ours refills rows that have ended; the others take "
        "batch after batch, each as long as its longest completion."],
        tables=[table], data=dict(measured=measured, laws=laws, versions=found), started=started, before=before,
        absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
