"""What one member of a population costs against N: one program of N members, the same step alone, PyTorch's loop.

    python experiments/benchmarks/population.py                        # models of the quickstart's size, and toys
    python experiments/benchmarks/population.py --only toys --json FILE
    python experiments/benchmarks/population.py --quick                # a few seconds, to see that it runs

models: DPO on the quickstart's decoder (2 layers, width 96), 64 pairs of 48 tokens, AdamW. toys: DPO on the table of
four prompts and ten responses (a network 4-128-10), full batch, Adam. A number is the time of one update of one member:
`alone` runs the compiled update once per call, one member after the other, and has the whole machine for each; `one
device` and `all devices` run N members in one program, several updates per call, the latter divided over one simulated
device per core; `PyTorch` is the plain eager loop of the same model, on one thread or all, whichever is faster. All
take turns, and ratios are taken within a round.

What the machine allows is measured beside it: the products of one member's update at the rate that large products
reach, and at the rate that products of a layer's own shape reach.

Cost: about 6 minutes on two idle CPU cores. Expected: toys gain two orders of magnitude on PyTorch and thirty times or
more on one run after another, models a factor of about 2, since they are made of products.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from common import finish, machine, parser, quartiles, ratio, wide_console
from rich.console import Console

PAIRS, TOKENS, PROMPT = 64, 48, 8
MODEL = dict(vocab_size=256, hidden_size=96, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2,
             head_dim=24, max_positions=128)
BETA, RATE = 0.1, 1e-3
CHECK_EVERY = 20  # updates of toys, whose states cost what their arithmetic does


class Case(NamedTuple):
    """One member: its update, initial state, reference, batch and hyper-parameters, whether updates differ in their
    batch, and the FLOPs of an update's products (0: too few to matter)."""

    update: Callable
    state: Any
    ref: Any
    batch: Any
    hyper: Mapping[str, Any]
    changing: bool
    flops: float


class Run(NamedTuple):
    """A call and how many updates of a member it makes."""

    call: Callable[[], None]
    updates: int


def timed(run: Run) -> float:
    """Milliseconds of one update in one call."""
    began = time.perf_counter()
    run.call()
    return (time.perf_counter() - began) / run.updates * 1e3


def in_rounds(runs: Mapping[Any, Run], repeats: int, console: Console, title: str) -> dict[Any, list[float]]:
    """Milliseconds of one update in each of `repeats` rounds, by run, another run first in each; a call before."""
    names = list(runs)
    for number, name in enumerate(names):
        with console.status(f"{title}: {number + 1} of {len(names)} compiles"):
            runs[name].call()
    found: dict[Any, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        turn = number * len(names) // repeats
        with console.status(f"{title}: round {number + 1} of {repeats}"):
            for name in names[turn:] + names[:turn]:
                found[name].append(timed(runs[name]))
    return found


def model_case() -> Case:
    """A decoder of the quickstart's size."""
    import jax
    import jax.numpy as jnp

    from alignax import data, losses, models, optim, planning, step

    config = models.DecoderConfig(**MODEL)
    draw = np.random.default_rng(0)
    ids = lambda count: draw.integers(3, MODEL["vocab_size"], count).tolist()
    records = [data.token_record(str(i), ids(PROMPT), (ids(TOKENS - PROMPT), ids(TOKENS - PROMPT)), eos_ids=(2,))
               for i in range(PAIRS)]
    columns, slots = data.bucket_shape(records, 8)
    batch = data.padded(records, K=2, T=columns, L=slots, pad_id=0)
    params = {"model": models.init_params(config, jax.random.key(0))}
    section = dict(name="adamw", learning_rate=RATE, schedule="constant", warmup_steps=0, clip_norm=1.0, master=False,
                   options={})

    def update(state, ref, batch, hyper, key, frozen):
        optimizer = optim.from_section(section, 1, {"learning_rate": hyper["rate"]})
        one = step.make_update(step.ModelSpec(config, unroll=2), losses.get("dpo"), optimizer)
        state, metrics = one(state, ref, batch, {"beta": hyper["beta"]}, key, frozen)
        return state, {name: metrics[name] for name in ("loss", "finite")}

    state = step.TrainState(jnp.zeros((), jnp.int32), params, optim.from_section(section, 1).init(params), None)
    flops = planning.update_flops(config, 2 * PAIRS, columns, 2 * PAIRS * slots, losses.get("dpo").requests,
                                  reference="frozen")
    return Case(update, state, params, batch, {"rate": jnp.float32(RATE), "beta": jnp.float32(BETA)}, True, flops)


def toy_case() -> Case:
    """A toy."""
    import jax
    import jax.numpy as jnp
    import optax

    from alignax import losses
    from alignax.diagnostics import toy

    loss, pairs = losses.get("dpo"), toy.published_pairs()
    params = toy.mlp(jax.random.key(0))
    log_ref = toy.log_policy(toy.mlp_logits, params)

    def update(state, ref, batch, hyper, key, frozen):
        params, memory = state

        def value(params):
            inputs = toy.supply(loss.requests, toy.log_policy(toy.mlp_logits, params), ref, batch)
            return loss(inputs, beta=hyper["beta"]).mean()

        total, grads = jax.value_and_grad(value)(params)
        updates, memory = optax.adam(hyper["rate"]).update(grads, memory)
        return (optax.apply_updates(params, updates), memory), {"loss": total, "finite": jnp.isfinite(total)}

    state = params, optax.adam(RATE).init(params)
    return Case(update, state, log_ref, pairs, {"rate": jnp.float32(RATE), "beta": jnp.float32(BETA)}, False, 0.0)


def jax_runs(case: Case, counts: Sequence[int], length: int) -> dict[tuple[int, str], Run]:
    """(N, label) -> a member alone (N = 0), N on one device, and N on all of them, `length` updates per call."""
    import jax
    import jax.numpy as jnp

    from alignax import population

    update, state, ref, batch, hyper, changing, _ = case
    mesh = population.make_mesh()
    alone = jax.jit(update, donate_argnums=0)
    held = {"state": jax.tree.map(jnp.copy, state)}
    key = jax.random.key(0)
    # A batch of its own for every update, where the method has that: with one for all, the compiler would compute the
    # reference once for all updates of a call.
    turned = lambda i: jax.tree.map(lambda a: jnp.roll(a, i * (len(a) // PAIRS), axis=0), batch)  # by i prompts
    each = [turned(i) for i in range(length)] if changing else None

    def one_by_one():
        for number in range(length):
            held["state"], _ = alone(held["state"], ref, each[number] if each else batch, hyper, key, {})
        jax.block_until_ready(held["state"])

    runs = {(0, "alone"): Run(one_by_one, length)}
    for count in counts:
        for label, where in (("one device", None), ("all devices", mesh)):
            if where is not None and count % where.size or (label == "all devices" and mesh is None):
                continue
            run = population.make_steps(update, length=None if each else length, mesh=where,
                                        check_every=1 if each else CHECK_EVERY)
            spread = lambda tree, n=count: jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *jnp.shape(a))), tree)
            seen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if each else batch
            keys = jax.random.split(key, (length, count) if each else count)
            fixed = [population.place(part, where, axis=None) for part in (ref, seen)]
            many = [population.place(spread(hyper), where), population.place(keys, where, axis=1 if each else 0)]
            name = count, label
            held[name] = population.start(population.place(jax.tree.map(jnp.copy, spread(state)), where), mesh=where)

            def together(name=name, run=run, fixed=fixed, many=many):
                held[name], _ = run(held[name], *fixed, *many, {})
                jax.block_until_ready(held[name])

            runs[name] = Run(together, length * count)
    return runs


def product_rates(quick: bool) -> dict[str, float]:
    """FLOPs per second of float32 products, all cores: of large matrices, and of one of a layer's own shape."""
    import jax
    import jax.numpy as jnp

    from alignax import population

    mesh, found = population.make_mesh(), {}
    large = 256 if quick else 2048
    shapes = {f"{large} x {large} x {large}": (large, large, large),
              f"a layer's, {2 * PAIRS * TOKENS} x {MODEL['hidden_size']} x {MODEL['intermediate_size']}":
                  (2 * PAIRS * TOKENS, MODEL["hidden_size"], MODEL["intermediate_size"])}
    for label, (rows, inner, columns) in shapes.items():
        rates = []
        for where in {None, mesh}:
            size = 1 if where is None else where.size
            left, right = (population.place(jnp.ones(shape), where)
                           for shape in ((size, rows, inner), (size, inner, columns)))
            product = jax.jit(lambda a, b: a @ b)
            one = Run(lambda p=product, a=left, b=right: jax.block_until_ready(p(a, b)), size)
            one.call()
            rates.append(2e3 * rows * inner * columns / min(timed(one) for _ in range(20)))
        found[label] = max(rates)
    return found


def fastest(torch, loop: Callable[[], None], length: int) -> Run:
    """The loop with one of PyTorch's threads or with all of them, whichever is faster."""
    run, spent = Run(loop, length), {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        run.call()
        spent[threads] = min(timed(run) for _ in range(2))
    torch.set_num_threads(min(spent, key=spent.get))
    return run


def torch_model_run(length: int) -> Run | None:
    """The model in PyTorch's eager loop; None without torch and transformers."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(vocab_size=MODEL["vocab_size"], hidden_size=MODEL["hidden_size"],
                         intermediate_size=MODEL["intermediate_size"], num_hidden_layers=MODEL["num_layers"],
                         num_attention_heads=MODEL["num_heads"], num_key_value_heads=MODEL["num_kv_heads"],
                         head_dim=MODEL["head_dim"], max_position_embeddings=MODEL["max_positions"],
                         tie_word_embeddings=True)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE)
    tokens = torch.randint(3, MODEL["vocab_size"], (2 * PAIRS, TOKENS))

    def sums(model):
        logp = model(tokens[:, :-1]).logits[:, PROMPT - 1:].log_softmax(-1)
        return logp.gather(-1, tokens[:, PROMPT:, None])[..., 0].sum(-1)

    def loop():
        for _ in range(length):
            with torch.no_grad():
                base = sums(reference)
            ratio = sums(policy) - base
            loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:PAIRS] - ratio[PAIRS:])).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    return fastest(torch, loop, length)


def torch_toy_run(length: int) -> Run | None:
    """The toy in PyTorch's eager loop; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    from alignax.diagnostics import toy

    pairs = [torch.tensor(np.asarray(part)) for part in toy.published_pairs()[:3]]
    net = torch.nn.Sequential(torch.nn.Linear(toy.PROMPTS, toy.HIDDEN), torch.nn.ReLU(),
                              torch.nn.Linear(toy.HIDDEN, toy.RESPONSES))
    optimizer, prompts = torch.optim.Adam(net.parameters(), lr=RATE), torch.eye(toy.PROMPTS)
    picked = lambda logp: torch.stack([logp[pairs[0], pairs[1]], logp[pairs[0], pairs[2]]], -1)
    base = picked(net(prompts).log_softmax(-1)).detach()

    def loop():
        for _ in range(length):
            ratio = picked(net(prompts).log_softmax(-1)) - base
            loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return fastest(torch, loop, length)


LABELS = ("alone", "one device", "all devices", "PyTorch")


def rows_of(times: Mapping[tuple[int, str], Sequence[float]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """One row per N: medians by label, and the rounds behind them."""
    out = []
    for count in counts:
        rounds = {label: list(times[at]) for label in LABELS
                  for at in ((0 if label in ("alone", "PyTorch") else count, label),) if at in times}
        out.append({"members": count} | {label: quartiles(values)[1] for label, values in rounds.items()}
                   | {"rounds": rounds})
    return out


def tables(results: Mapping[str, Any]) -> list[dict]:
    """The rows as tables, with how often a member's update fits into one alone; and what the products allow."""
    out = []
    show = lambda value: "-" if value is None else f"{value:.3g}"
    for name, title in (("models", "Models of the quickstart's size"), ("toys", "Toys (network 4-128-10)")):
        rows = []
        for row in results.get(name, ()):
            rounds = row["rounds"]
            best = rounds[min((label for label in LABELS[1:3] if label in row), key=row.get)]
            rows.append([row["members"], *(show(row.get(label)) for label in LABELS), ratio(rounds["alone"], best),
                         ratio(rounds["PyTorch"], best) if "PyTorch" in rounds else "-"])
        if rows:
            out.append(dict(title=f"{title}: milliseconds of one update of one member", rows=rows, columns=[
                "members", *LABELS, "alone / best of one program", "PyTorch / best"]))
    if bound := results.get("products"):
        rows = [[label, f"{rate / 1e9:.0f}", show(1e3 * bound["flops"] / rate)]
                for label, rate in bound["rates"].items()]
        out.append(dict(title=f"What the products of a model's update allow ({bound['flops'] / 1e9:.2g} GFLOP)",
                        rows=rows, columns=["product", "GFLOP/s, all cores", "ms of an update at that rate"]))
    return out


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "population", peers=False)
    out.add_argument("--only", choices=("models", "toys"), help="measure these alone")
    return out.parse_args(argv)


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    from alignax import population

    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    cores = population.device_per_core()
    plans = {"models": (model_case, torch_model_run, (1, 2) if args.quick else (1, 2, 4, 8, 16),
                        2 if args.quick else 8),
             "toys": (toy_case, torch_toy_run, (2, 8) if args.quick else (1, 4, 16, 64, 256),
                      20 if args.quick else 500)}
    repeats, results, absent = 1 if args.quick else 5, {}, {}
    for name, (make, torch_run, counts, length) in plans.items():
        if args.only in (None, name):
            case = make()
            runs = jax_runs(case, counts, length)
            if (other := torch_run(length)) is None:
                absent["PyTorch"] = "torch or transformers is not installed"
            else:
                runs[0, "PyTorch"] = other
            results[name] = rows_of(in_rounds(runs, repeats, console, name), counts)
            if case.flops:
                results["products"] = {"flops": case.flops, "rates": product_rates(args.quick)}
    return finish(args, console, title="Populations", tables=tables(results), data=results, started=started,
                  before=before, absent=absent, about=[
        "`alone`: the compiled update once per call, one member after the other, the whole machine for each. `one "
        "device`, `all devices`: N members in one program, several updates per call, the latter divided over one "
        f"simulated device per core ({cores}). `PyTorch`: an eager loop of the same model, on one thread or all, "
        "whichever is faster. Ratios: medians over the rounds, quartiles in brackets. Models gain what a call costs "
        "and what small matrices leave of two cores, and no more: their products are as many for N members as for N "
        "runs, and the last table says how long those take by themselves, whoever runs them. Toys are made of calls, "
        "so they gain most.", "",
        "![milliseconds against members](population.png)"])


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
