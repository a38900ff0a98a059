"""What one member of a population costs against N: one program of N members, the same step alone, PyTorch's loop.

    python experiments/benchmarks/population.py                        # models of the quickstart's size, and toys
    python experiments/benchmarks/population.py --only toys --json FILE
    python experiments/benchmarks/population.py --quick                # a few seconds, to see that it runs

models: DPO on the quickstart's decoder (2 layers, width 96), 64 pairs of 48 tokens, AdamW. toys: DPO on the table of
four prompts and ten responses (a network 4-128-10), full batch, Adam. A number is the time of one update of one member:
`alone` runs the compiled update once per call, one member after the other, and has the whole machine for each; `one
device` and `all devices` run N members in one program, several updates per call, the latter divided over one simulated
device per core; `PyTorch` is the plain eager loop of the same model, on one thread or all, whichever is faster.

Cost: about 6 minutes on two idle CPU cores. Expected: toys gain two orders of magnitude, models a factor of about 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
from common import finish, machine, parser, wide_console
from rich.console import Console

PAIRS, TOKENS, PROMPT = 64, 48, 8
MODEL = dict(vocab_size=256, hidden_size=96, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2,
             head_dim=24, max_positions=128)
BETA, RATE = 0.1, 1e-3


def timed(call, updates: int, repeats: int) -> float:
    """Milliseconds of one update: the median over `repeats` of a call that makes `updates` of them, after a first."""
    call()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        spent.append((time.perf_counter() - began) / updates * 1e3)
    return statistics.median(spent)


def model_case():
    """(update, initial state, reference, batch, hyper, whether updates differ in their batch) of one member."""
    import jax
    import jax.numpy as jnp

    from alignax import data, losses, models, optim, step

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
    return update, state, params, batch, {"rate": jnp.float32(RATE), "beta": jnp.float32(BETA)}, True


def toy_case():
    """The same for one member of the toys."""
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
    return update, state, log_ref, pairs, {"rate": jnp.float32(RATE), "beta": jnp.float32(BETA)}, False


def jax_times(case, counts, *, length: int, repeats: int) -> list[dict]:
    """One row per N: milliseconds of a member's update alone, on one device, and on all of them."""
    import jax
    import jax.numpy as jnp

    from alignax import population

    update, state, ref, batch, hyper, changing = case
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

    rows, base = [], timed(one_by_one, length, repeats)
    for count in counts:
        row = {"members": count, "alone": base}
        for label, where in (("one device", None), ("all devices", mesh)):
            if where is not None and count % where.size or (label == "all devices" and mesh is None):
                continue
            run = population.make_steps(update, length=None if each else length, mesh=where)
            spread = lambda tree, n=count: jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *jnp.shape(a))), tree)
            seen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if each else batch
            keys = jax.random.split(key, (length, count) if each else count)
            fixed = [population.place(part, where, axis=None) for part in (ref, seen)]
            many = [population.place(spread(hyper), where), population.place(keys, where, axis=1 if each else 0)]
            held["many"] = population.start(population.place(jax.tree.map(jnp.copy, spread(state)), where), mesh=where)

            def together(run=run, fixed=fixed, many=many):
                held["many"], _ = run(held["many"], *fixed, *many, {})
                jax.block_until_ready(held["many"])

            row[label] = timed(together, length * count, repeats)
        rows.append(row)
    return rows


def fastest(torch, loop, length: int, repeats: int) -> float:
    """`timed` with one of PyTorch's threads and with all of them, whichever is faster."""
    spent = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        spent.append(timed(loop, length, repeats))
    return min(spent)


def torch_model_time(length: int, repeats: int) -> float | None:
    """Milliseconds of one update of the model in PyTorch's eager loop; None without torch and transformers."""
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

    return fastest(torch, loop, length, repeats)


def torch_toy_time(length: int, repeats: int) -> float | None:
    """The same for the toy."""
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

    return fastest(torch, loop, length, repeats)


def tables(results: dict) -> list[dict]:
    """The rows as tables, with how often a member's update fits into one alone."""
    labels, out = ("alone", "one device", "all devices", "PyTorch"), []
    show = lambda value: "-" if value is None else f"{value:.3g}"
    for name, title in (("models", "Models of the quickstart's size"), ("toys", "Toys (network 4-128-10)")):
        rows = []
        for row in results.get(name, ()):
            best = min(row[label] for label in labels[1:3] if label in row)
            rows.append([row["members"], *(show(row.get(label)) for label in labels), f"{row['alone'] / best:.1f}",
                         "-" if row.get("PyTorch") is None else f"{row['PyTorch'] / best:.1f}"])
        if rows:
            out.append(dict(title=f"{title}: milliseconds of one update of one member", rows=rows, columns=[
                "members", *labels, "alone / best of one program", "PyTorch / best"]))
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
    plans = {"models": (model_case, torch_model_time, (1, 2) if args.quick else (1, 2, 4, 8, 16),
                        2 if args.quick else 8),
             "toys": (toy_case, torch_toy_time, (2, 8) if args.quick else (1, 4, 16, 64, 256),
                      20 if args.quick else 500)}
    repeats, results, absent = 1 if args.quick else 5, {}, {}
    for name, (case, torch_time, counts, length) in plans.items():
        if args.only in (None, name):
            with console.status(name):
                rows = jax_times(case(), counts, length=length, repeats=repeats)
                other = torch_time(length, repeats)
            if other is None:
                absent["PyTorch"] = "torch or transformers is not installed"
            results[name] = [row | {"PyTorch": other} for row in rows]
    return finish(args, console, title="Populations", tables=tables(results), data=results, started=started,
                  before=before, absent=absent, about=[
        "`alone`: the compiled update once per call, one member after the other, the whole machine for each. `one "
        "device`, `all devices`: N members in one program, several updates per call, the latter divided over one "
        f"simulated device per core ({cores}). `PyTorch`: an eager loop of the same model, on one thread or all, "
        "whichever is faster. Models gain what a call costs and what small matrices leave of two cores, and no more: "
        "their products are as many for N members as for N runs. Toys are made of calls, so they gain most.", "",
        "![milliseconds against members](population.png)"])


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
