"""R1: peak memory of every loss is independent of vocabulary times sequence length.

Each test replays a failure that users of other frameworks reported; the docstring names the thread. Memory is what the
compiled program says of itself; no array of these sizes is made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import data, losses, models, optim, planning, sharding, step
from alignax.ops.head import STATS, Head, head_stats

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 2_000_000
FEW, MANY = 512, 32_768
WIDTH = 4
SHAPE = data.Shape(K=2, T=96, L=64, rows=2)
PROMPTS = 4
LOGITS = PROMPTS * SHAPE.K * SHAPE.L * MANY * 4  # of all slots at once: 67 MB


def decoder(vocab, **over):
    return models.DecoderConfig(**dict(vocab_size=vocab, hidden_size=WIDTH, intermediate_size=8, num_layers=1,
                                       num_heads=1, num_kv_heads=1, head_dim=4, max_positions=128) | over)


def setup(loss, vocab, *, budget=BUDGET, **more):
    return planning.make_setup(step.ModelSpec(decoder(vocab), byte_budget=budget), losses.get(loss),
                               optim.make(name="sgd", learning_rate=0.1), **more)


def temporaries(loss, vocab, *, layout="padded", **more):
    """Bytes that one compiled update holds beside its arguments."""
    mesh = planning.simulated_mesh({"data": 1})
    found = planning.measure(setup(loss, vocab, **more), planning.Size(PROMPTS, SHAPE, layout), mesh)
    return found["bytes"]["temporaries"]


def compiled(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def statistic(want, vocab, budget=BUDGET):
    """(function of hidden, weight, other's hidden, other's weight -> gradients, their shapes)."""
    targets = np.zeros((PROMPTS, SHAPE.K, SHAPE.L), np.int32)

    def run(hidden, weight, hidden_other, weight_other):
        other = (hidden_other, Head(weight_other)) if want.startswith("kl_") else None
        total = lambda h, w: head_stats(h, Head(w), targets, want=(want,), other=other, byte_budget=budget)[want].sum()
        return jax.grad(total, (0, 1))(hidden, weight)

    hidden = jax.ShapeDtypeStruct((*targets.shape, WIDTH), jnp.float32)
    weight = jax.ShapeDtypeStruct((vocab, WIDTH), jnp.float32)
    return run, (hidden, weight, hidden, weight)


@pytest.mark.parametrize("want", STATS)
def test_a_statistic_keeps_all_logits(want):
    """trl#3678 (batch x tokens x 151k logits), trl#2799, trl#2773, slime#2253, trl#5853: value and gradient of every
    statistic take the chunk's budget a few times over, and the weight's own size, never slots x vocabulary."""
    function, shapes = statistic(want, MANY)
    assert compiled(function, *shapes) <= 8 * BUDGET + 8 * MANY * WIDTH * 4 < 0.4 * LOGITS


def test_the_measure_sees_logits_that_are_kept():
    """What the test above forbids: with a budget for everything, all logits are in memory."""
    function, shapes = statistic("entropy", MANY, budget=10**9)
    assert compiled(function, *shapes) >= LOGITS


@pytest.mark.parametrize("loss, layout", [("dpo", "padded"), ("dpo", "packed"), ("wpo", "padded"), ("tdpo", "padded"),
                                          ("oreo", "padded"), ("ilql", "padded"), ("unlikelihood:token", "padded")])
def test_a_step_grows_with_the_vocabulary_times_the_tokens(loss, layout):
    """trl#3678, trl#7063, trl#234, trl#3701, trl#2688, OpenRLHF#718, LlamaFactory#10720 (out of memory), slime#2253
    (packed sequences): from 512 to 32 768 entries a whole update grows by copies of the embedding, not by logits."""
    reference = "frozen" if any(r.startswith(("ref_", "policy_ref")) for r in losses.get(loss).requests) else "none"
    small, large = (temporaries(loss, vocab, layout=layout, reference=reference) for vocab in (FEW, MANY))
    heads = 1 + 2 * ("q_values" in losses.get(loss).requests)
    assert large - small <= 8 * BUDGET + 12 * heads * MANY * WIDTH * 4, (small, large)
    assert large < LOGITS


def primitives_that_make(jaxpr, size):
    """Names of the equations, at any depth, that put out a float array of these sizes, in any order of axes."""
    found = set()
    for equation in jaxpr.eqns:
        inner = [getattr(q, "jaxpr", q) for p in equation.params.values()
                 for q in (p if isinstance(p, (tuple, list)) else (p,))]
        inner = [j for j in inner if hasattr(j, "eqns")]
        for one in inner:
            found |= primitives_that_make(one, size)
        if not inner and any(sorted(v.aval.shape) == sorted(size) and jnp.issubdtype(v.aval.dtype, jnp.floating)
                             for v in equation.outvars):
            found.add(equation.primitive.name)
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_frozen_head_has_a_gradient_buffer(accumulation):
    """trl#7076: full gradients of the LM head were built under LoRA. Nothing of the head's size is computed."""
    lora = models.AdapterConfig(rank=2, targets=("attention/query",))
    size, mesh, made = planning.Size(PROMPTS, SHAPE), sharding.abstract_mesh({"data": 1}), {}
    for name, adapters in (("lora", lora), ("all", None)):
        one = setup("dpo", MANY, adapters=adapters, reference="frozen", accumulation=accumulation)
        update = step.make_update(one.spec, one.loss, one.optimizer, accumulation=accumulation)
        jaxpr = jax.make_jaxpr(update)(*planning.program.abstract_arguments(one, size, mesh))
        made[name] = primitives_that_make(jaxpr.jaxpr, (MANY, WIDTH))
    assert made["lora"] <= {"stop_gradient", "convert_element_type", "copy", "optimization_barrier", "pvary"}
    assert {"dot_general", "mul"} & (made["all"] - made["lora"])  # the gradient, and the update with it


def test_a_reference_beside_adapters_is_a_second_copy():
    """trl#6053: with adapters the reference is the frozen base itself, and costs no bytes."""
    lora = models.AdapterConfig(rank=2, targets=("attention/query",))
    found = planning.measure(setup("dpo", FEW, adapters=lora, reference="adapter_off"), planning.Size(PROMPTS, SHAPE),
                             sharding.abstract_mesh({"data": 1}))
    assert found["bytes"]["reference"] == 0 and found["bytes"]["frozen"] > 0


def chunk_loops(jaxpr):
    """Lengths of the loops whose body multiplies by the head."""
    out = []
    for equation in jaxpr.eqns:
        inner = [getattr(q, "jaxpr", q) for p in equation.params.values()
                 for q in (p if isinstance(p, (tuple, list)) else (p,))]
        below = [length for one in inner if hasattr(one, "eqns") for length in chunk_loops(one)]
        out += below
        if equation.primitive.name == "scan" and not below and any(
                MANY in v.aval.shape for e in _flat(equation.params["jaxpr"].jaxpr) for v in e.outvars):
            out.append(equation.params["length"])
    return out


def _flat(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for p in equation.params.values():
            for q in p if isinstance(p, (tuple, list)) else (p,):
                q = getattr(q, "jaxpr", q)
                if hasattr(q, "eqns"):
                    yield from _flat(q)


@pytest.mark.parametrize("chunk", [8, 16])
def test_the_chunk_size_is_ignored_in_training(chunk):
    """NeMo-RL#2872, NeMo-RL#2883: the setting reached scoring only. In an update all three passes over the head (the
    reference's, the policy's, its gradient) run in the chunks that the budget gives."""
    one = setup("dpo", MANY, budget=PROMPTS * SHAPE.K * MANY * 4 * chunk, reference="frozen")
    arguments = planning.program.abstract_arguments(one, planning.Size(PROMPTS, SHAPE), sharding.abstract_mesh(
        {"data": 1}))
    jaxpr = jax.make_jaxpr(step.make_update(one.spec, one.loss, one.optimizer))(*arguments)
    assert chunk_loops(jaxpr.jaxpr) == [math.ceil(SHAPE.L / chunk)] * 3


def test_a_bfloat16_gradient_is_rounded_at_every_chunk():
    """TRL 1.16's note on its kernel: products of a chunk that are rounded to bfloat16 before they are summed bias
    training. 16 chunks, and slices of the vocabulary, give the gradient of one, rounded once."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 2, 32, 8)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 64, (2, 2, 32)), jnp.int32)

    def gradient(budget, dtype):
        total = lambda w: head_stats(hidden.astype(dtype), Head(w), targets, byte_budget=budget)["logp"].sum()
        return np.asarray(jax.grad(total)(weight.astype(dtype)), np.float64)

    whole = gradient(10**9, jnp.float32)
    scale = np.abs(whole).max()
    for budget in (2 * 2 * 64 * 4 * 2, 2 * 2 * 4 * 16):
        found = gradient(budget, jnp.bfloat16)
        np.testing.assert_allclose(found, whole, rtol=2**-8, atol=2e-6 * scale)


GATHERS = """
import json, sys
sys.path.insert(0, {tests!r})
import test_r1_memory as t
print(json.dumps(t.gathered()))
"""


def gathered():
    """Chunks -> how often an update on fsdp=4 gathers the head's weight."""
    out, vocab = {}, 1024
    mesh = planning.simulated_mesh({"fsdp": 4})
    for chunks in (1, 8):
        budget = SHAPE.K * vocab * 4 * SHAPE.L // chunks  # of the prompt that a device holds
        one = setup("dpo", vocab, budget=budget, reference="frozen")
        spec = dataclasses.replace(one.spec, activations=sharding.over_activations(mesh))
        one = dataclasses.replace(one, spec=spec)
        arguments = planning.program.abstract_arguments(one, planning.Size(PROMPTS, SHAPE), mesh)
        text = jax.jit(step.make_update(one.spec, one.loss, one.optimizer)).lower(*arguments).compile().as_text()
        lines = planning.hlo.instructions(text)
        tables = [line.times for line in lines if line.opcode.startswith("all-gather")
                  and any(vocab in shape for _, shape in line.arrays)]
        out[chunks] = {"tables": sum(tables), "inside loops": sum(n for n in tables if n > 1),
                       "loops": max((line.times for line in lines if line.opcode == "dot"), default=1)}
    return out


def test_every_chunk_gathers_the_head():
    """trl#6077: under FSDP2 each chunk gathered the head again. Eight chunks gather it as often as one."""
    done = subprocess.run([sys.executable, "-c", GATHERS.format(tests=str(Path(__file__).parent))],
                          capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
                          env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["8"]["loops"] == 8 and found["1"]["loops"] == 1, found
    assert found["8"]["tables"] == found["1"]["tables"] >= 1 and found["8"]["inside loops"] == 0, found
