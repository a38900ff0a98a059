"""Peak memory of an update against the vocabulary, 512 to 152,000, for every loss, from the compiled program.

    python experiments/benchmarks/memory.py [--losses dpo,simpo] [--vocabs 512,32000,128000,152000] [--quick]

Nothing is run: the update is compiled and XLA tells what it allocates. `working memory` is what the program holds
beside its arguments (weights, optimiser state, reference, batch) and one copy of the gradients, which grow with the
vocabulary by their own nature: activations, logits, whatever else. `growth` is working memory at the largest vocabulary
against the smallest; `peak growth` is that of everything together, less what weights, gradients, optimiser state and
reference grow by. The plain step takes log_softmax over the logits of every position, policy and reference.

Losses with the same requests and the same number of completions share a program up to arithmetic on [B, K, L] arrays;
each such set is compiled once, for the first of its losses (--each compiles every loss).

Cost: about 1.5 seconds a compilation, some 120 of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import TOY, Shape, finish, machine, megabytes, parser, wide_console
from rich.console import Console

from alignax import data, losses, models, optim, step
from alignax.planning import program
from alignax.types import REQUESTS, Batch, ConfigError, DataError

# XLA's effort on machine code changes no buffer, and compiling is all that is done here.
FAST = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "memory", peers=False)
    out.add_argument("--losses", default="", help="comma-separated losses (default: all)")
    out.add_argument("--each", action="store_true", help="compile every loss, also those with equal requests")
    out.add_argument("--vocabs", default="512,4096,32000,128000,152000", help="for dpo; others take first and last")
    out.add_argument("--pairs", type=int, default=8, help="pairs of an update (default 8)")
    out.add_argument("--length", type=int, default=512, help="tokens of prompt and completion together (default 512)")
    out.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default 128)")
    out.add_argument("--megabytes", type=float, default=64, help="budget of the logits, head_megabytes (default 64)")
    out.add_argument("--remat", default="none", choices=models.REMAT,
                     help="what layers keep in the table of losses (default none)")
    args = out.parse_args(argv)
    args.vocabs = [int(v) for v in args.vocabs.split(",")]
    if args.quick:
        args.losses, args.vocabs, args.pairs, args.length, args.prompt = "simpo", [64, 512], 2, 24, 8
    return args


def setup_of(args: argparse.Namespace, shape: Shape, loss: losses.Loss) -> program.Setup:
    """The train stage of a loss with the heads that it asks for, as shapes."""
    config = shape.decoder()
    spec = step.ModelSpec(config, remat=args.remat, byte_budget=int(args.megabytes * 1e6),
                          attention=models.choose_attention("auto", config, "float32", jax.default_backend()))
    second = any(REQUESTS[name].references for name in loss.requests)
    setup = program.make_setup(spec, loss, optim.make(clip_norm=1.0), reference="frozen" if second else "none")
    heads = jax.eval_shape(lambda: models.init_heads(loss.requests, shape.width, shape.vocab, jax.random.key(0)))
    return dataclasses.replace(setup, params={**setup.params, **heads})


def compiled_memory(update: Callable, given: tuple, state: Any) -> dict[str, int]:
    """Bytes of one update: everything that grows with the vocabulary by nature, and working memory beyond it."""
    memory = jax.jit(update, donate_argnums=0).lower(*given).compile(FAST).memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    return dict(states=arguments + gradients, working=max(memory.temp_size_in_bytes - gradients, 0),
                peak=arguments + memory.temp_size_in_bytes)


def ours(args: argparse.Namespace, shape: Shape, loss: losses.Loss, completions: int) -> dict[str, Any]:
    """The library's update of `loss`."""
    setup = setup_of(args, shape, loss)
    size = program.Size(args.pairs, data.Shape(completions, args.length, args.length - args.prompt, completions))
    given = program.abstract_arguments(setup, size, program.simulated_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    return compiled_memory(step.make_update(setup.spec, loss, setup.optimizer), given, given[0])


def plain(args: argparse.Namespace, shape: Shape) -> dict[str, int]:
    """DPO with log_softmax over the logits of all positions at once."""
    loss = losses.get("dpo")
    setup = setup_of(args, shape, loss)
    size = program.Size(args.pairs, data.Shape(2, args.length, args.length - args.prompt, 2))
    given = program.abstract_arguments(setup, size, program.simulated_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    config = setup.spec.config

    def sums(params: Any, batch: Batch) -> jax.Array:
        stream = batch.streams["pair"]
        hidden = models.forward(config, params["model"], stream.tokens, stream.segment, stream.prefix, stream.position,
                                remat=args.remat)
        logp = jax.nn.log_softmax(models.logits(config, params["model"], hidden))
        picked = jnp.take_along_axis(logp[:, :-1], stream.tokens[:, 1:, None], -1)[..., 0]
        scored = jnp.where(jnp.arange(args.length - 1)[None] >= args.prompt - 1, picked, 0.0)
        return scored.sum(-1).reshape(args.pairs, 2)

    def update(state, reference, batch, hyper, key, frozen):
        del hyper, key, frozen
        fixed = jax.lax.stop_gradient(sums(reference, batch))
        grads = jax.grad(lambda p: loss({"logps": sums(p, batch), "ref_logps": fixed}).mean())(state.params)
        moves, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
        return state._replace(params=jax.tree.map(jnp.add, state.params, moves), opt_state=opt_state)

    return compiled_memory(update, given, given[0])


def sets(args: argparse.Namespace) -> list[list[str]]:
    """Losses by equal requests, in the order of the index; one each where asked."""
    wanted = args.losses.split(",") if args.losses else list(losses.names())
    groups: dict[Any, list[str]] = {}
    for name in wanted:
        key = name if args.each else frozenset(losses.get(name).requests)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def measured(args: argparse.Namespace, base: Shape, name: str, vocab: int) -> dict[str, int]:
    """With two completions, or with as many as the loss needs."""
    shape = dataclasses.replace(base, vocab=vocab)
    for completions in (2, 3, 4):
        try:
            return ours(args, shape, losses.get(name), completions) | {"completions": completions}
        except (ConfigError, DataError, ValueError, IndexError, TypeError) as error:
            problem = error
    raise DataError(f"{name}: {problem}") from problem


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Compiles, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    base = TOY if args.quick else Shape()
    low, high = args.vocabs[0], args.vocabs[-1]
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    rows = []
    growth = lambda one: one[high]["working"] / one[low]["working"]
    peak = lambda one: (one[high]["working"] + one[low]["states"]) / (one[low]["working"] + one[low]["states"])
    for group in sets(args):
        with console.status(f"compiling {group[0]}"):
            try:
                one = {vocab: measured(args, base, group[0], vocab) for vocab in (low, high)}
            except DataError as error:
                absent[", ".join(group)] = str(error)
                continue
        found[group[0]] = {"losses": group, "memory": one}
        rows.append([", ".join(group), megabytes(one[low]["working"]), megabytes(one[high]["working"]),
                     f"{growth(one):.2f}", f"{peak(one):.2f}"])
    by_vocab: dict[str, dict[int, Any]] = {}
    for remat in ("none",) if args.quick else ("none", "dots", "full"):
        again = argparse.Namespace(**vars(args) | {"remat": remat})
        with console.status(f"compiling the plain step, remat {remat}"):
            by_vocab[remat] = {vocab: {"ours": measured(again, base, "dpo", vocab),
                                       "plain": plain(again, dataclasses.replace(base, vocab=vocab))}
                               for vocab in args.vocabs}
    tables = [
        dict(title=f"DPO by vocabulary, {args.pairs} pairs x {args.length} tokens, logits' budget "
                   f"{args.megabytes:.0f} MB",
             columns=["vocabulary", "remat", "weights, gradients, states MB", "working MB", "plain step, working MB",
                      "working / plain", "peak / plain"],
             rows=[[f"{v:,}", remat, megabytes(one["ours"]["states"]), megabytes(one["ours"]["working"]),
                    megabytes(one["plain"]["working"]), f"{one['ours']['working'] / one['plain']['working']:.2f}",
                    f"{one['ours']['peak'] / one['plain']['peak']:.2f}"]
                   for remat, table in by_vocab.items() for v, one in table.items()]),
        dict(title=f"Every loss: working memory at vocabularies {low:,} and {high:,}",
             columns=["losses", f"MB at {low:,}", f"MB at {high:,}", "growth", "peak growth"], rows=rows)]
    return finish(args, console, title="Memory against the vocabulary", about=[
        "From XLA's own account of the compiled update; nothing is run. Working memory is what the update holds beside "
        "its arguments and one copy of the gradients.",
        "`growth` is that of working memory, `peak growth` that of the whole peak less what weights, gradients, "
        "optimiser state and reference grow by."],
        tables=tables, data=dict(losses=found, by_vocabulary=by_vocab), started=started, before=before, absent=absent)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
