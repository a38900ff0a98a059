"""Before the first step the policy is its reference: in every layout, under every reference rule, in the update itself.

The log-ratios are read inside the program that computes gradients, where a compiler could treat the policy, whose
intermediates are kept, and the reference, whose are not, in two ways.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packing_test import CONFIG, SPEC, alike, batch_of

from alignax import data, models, step
from alignax.losses.info import MethodInfo
from alignax.losses.loss import Loss
from alignax.types import Term, Terms

pytestmark = pytest.mark.slow

DEEP = dataclasses.replace(CONFIG, num_layers=3)
LORA = models.AdapterConfig(rank=2, alpha=4.0, targets=("attention/query", "mlp/down"))
BASE = dataclasses.replace(SPEC, config=DEEP)


def audit(tokens):
    """A pair loss that reports the largest log-ratio of a sequence and, with `tokens`, of a token and its KL."""
    requests = ("logps", "ref_logps", "lengths") + tokens * ("token_logps", "ref_token_logps", "ref_policy_kl")

    def run(logps, ref_logps, lengths, *rest):
        apart = jnp.abs(logps - ref_logps)
        found = {"sequence": apart.max(), "per_token": (apart / jnp.maximum(lengths, 1)).max(), "size": -logps.min()}
        if rest:
            found |= {"token": jnp.abs(rest[0] - rest[1]).max(), "kl": jnp.abs(rest[2]).max()}
        margin = (logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]
        metrics = {key: (value, jnp.float32(1)) for key, value in found.items()}
        return Terms({"loss": Term(-jax.nn.log_sigmoid(margin))}, metrics=metrics)

    return Loss("audit", run, requests, {}, MethodInfo("audit", "Audit", "", "reconstruction"))


def start(dtype):
    """Weights larger than at the start of a real run: a difference between two programs would show."""
    model = jax.tree.map(lambda a: (3 * a).astype(dtype), models.init_params(DEEP, jax.random.key(0)))
    adapters = models.init_adapters(model, LORA, jax.random.key(1))
    return {"model": model}, {"adapters": adapters}


@functools.cache
def laid(layout):
    """The law's batch in a grid that all layouts share, so that one program serves them."""
    return alike(batch_of(layout, False), groups=2, rows=12, T=24)


@functools.cache
def programs(rule, accumulation, remat):
    spec = dataclasses.replace(BASE, remat=remat, adapters=LORA if rule == "adapter_off" else None)
    optimizer = optax.sgd(0.1)
    return (jax.jit(step.make_update(spec, audit(rule != "precomputed"), optimizer, accumulation=accumulation)),
            jax.jit(step.make_evaluate(spec, None)), optimizer)


def found(rule, layout, dtype, accumulation=1, remat="none"):
    """The metrics of the first update."""
    update, evaluate, optimizer = programs(rule, accumulation, remat)
    base, adapters = start(dtype)
    params, frozen = (adapters, base) if rule == "adapter_off" else (base, {})
    batch, reference = laid(layout), base
    if rule == "precomputed":
        sums = evaluate(base, None, batch, {}, None, None)[1]["logps"]
        batch, reference = dataclasses.replace(batch, data={**batch.data, "ref_logps": sums}), None
    state = step.TrainState(jnp.int32(0), params, optimizer.init(params), None)
    _, metrics = update(state, reference, batch, {}, jax.random.key(0), frozen)
    out = step.merge_metrics([metrics])
    assert out["size"] > 5 and out["grad_norm"] > 1e-4  # log-probs that could differ, and a program with a gradient
    return out


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
@pytest.mark.parametrize("rule, accumulation, remat", [("frozen", 1, "none"), ("frozen", 2, "full"),
                                                       ("adapter_off", 1, "none")])
def test_every_log_ratio_is_exactly_zero(rule, accumulation, remat, layout):
    out = found(rule, layout, jnp.float32, accumulation, remat)
    assert out["sequence"] == out["token"] == 0.0 and out["margin"] == 0.0
    assert out["kl"] < 1e-6
    assert out["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
def test_a_precomputed_reference_is_near(layout):
    """Another program computed it: 1e-4 nats for each sequence."""
    out = found("precomputed", layout, jnp.float32)
    assert out["sequence"] <= 1e-4
    assert out["loss"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
@pytest.mark.parametrize("rule", ["frozen", "adapter_off", "precomputed"])
def test_bfloat16_stays_within_a_thousandth_of_a_nat_for_each_token(rule, layout):
    assert found(rule, layout, jnp.bfloat16)["per_token"] <= 1e-3
