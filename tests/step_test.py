"""The update: requests, layouts, exact accumulation, devices, and every method's config traced."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import data, launch, losses, models, reference, sharding, step
from alignax.types import REQUESTS, Batch, ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = sorted(p.stem for p in (ROOT / "experiments" / "methods").glob("*.py"))
CONFIG = models.DecoderConfig(vocab_size=17, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG, unroll=2)


def records(n=8, completions=2, seed=0):
    rng = np.random.default_rng(seed)
    return [data.token_record(f"r{i}", [1, *rng.integers(3, 17, rng.integers(1, 5)).tolist()],
                              [[*rng.integers(3, 17, rng.integers(1, 6)).tolist(), 2] for _ in range(completions)],
                              eos_ids=(2,), scores=list(range(completions, 0, -1))) for i in range(n)]


@pytest.fixture(scope="module")
def params():
    tree = {"model": models.init_params(CONFIG, jax.random.key(0))}
    # Larger weights than at the start of a real run, so that differences between two layouts would show.
    return jax.tree.map(lambda a: 3 * a, tree)


@pytest.fixture(scope="module")
def other():
    return {"model": jax.tree.map(lambda a: 3 * a, models.init_params(CONFIG, jax.random.key(1)))}


def batch_of(rows, layout=data.padded):
    other = data.mismatched(rows)  # stands for every stream that is not the pairs
    streams = ("mismatched", "aux_prompt", "reference_sample", "degraded")
    return layout(rows, K=2, T=32, L=8, pad_id=0, extra=dict.fromkeys(streams, other))


def with_head(params, loss):
    dtype = params["model"]["embedding"].dtype
    heads = models.init_heads(set(loss.requests) - {"rewards"}, CONFIG.hidden_size, CONFIG.vocab_size,
                              jax.random.key(6))
    params = params | jax.tree.map(lambda a: a.astype(dtype), heads)
    if "rewards" in loss.requests:
        head = models.init_scalar_head(jax.random.key(5), CONFIG.hidden_size)
        dtype = params["model"]["embedding"].dtype
        return params | {"reward_head": jax.tree.map(lambda a: a.astype(dtype), head)}
    if "degree_logits" in loss.requests:
        zeros = {"weight": jnp.zeros((2, CONFIG.hidden_size)), "bias": jnp.zeros(2)}
        return params | {"degree_head": jax.tree.map(lambda a: a.astype(params["model"]["embedding"].dtype), zeros)}
    return params


def one_update(loss, params, other, batch, accumulation=1):
    optimizer = optax.sgd(0.1)
    params = with_head(params, loss)
    state = step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss.init_state())
    update = jax.jit(step.make_update(SPEC, loss, optimizer, accumulation=accumulation))
    return update(state, other, batch, {}, jax.random.key(7))


def double(tree):
    """Float64 copies: what is equal in exact arithmetic is then told from what is merely near."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)


def same_move(a, b, start, tolerance):
    """Two new states moved from `start` alike: the difference is small beside the move, and there was a move."""
    move = float(optax.tree.norm(optax.tree.sub(a.params, start)))
    apart = float(optax.tree.norm(optax.tree.sub(a.params, b.params)))
    assert move > 1e-4
    assert apart <= tolerance * move, (apart, move)
    for x, y in zip(jax.tree.leaves(a.loss_state), jax.tree.leaves(b.loss_state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


ONE_OF_EACH = ("sft", "dpo", "ipo", "simpo", "orpo", "rpo", "kto", "beta_dpo", "plackett_luce", "tdpo", "bt_rm", "aot")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("dpo", "kto", "beta_dpo", "tdpo") else
                                                pytest.mark.slow) for n in ONE_OF_EACH])
def test_a_step_in_micro_batches_is_the_whole_step(name, params, other):
    loss = losses.get(name)
    batch = batch_of(records())
    with jax.enable_x64(True):
        params, other = double(params), double(other)
        whole, metrics = one_update(loss, params, other, batch)
        parts, metrics_parts = one_update(loss, params, other, batch, accumulation=4)
        same_move(whole, parts, with_head(params, loss), 1e-10)
    np.testing.assert_allclose(metrics["loss"][0], metrics_parts["loss"][0], rtol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shared_prefix_gives_the_padded_step(name, params, other):
    loss = losses.get(name)
    with jax.enable_x64(True):
        params, other = double(params), double(other)
        a, _ = one_update(loss, params, other, batch_of(records()))
        b, _ = one_update(loss, params, other, batch_of(records(), data.shared_prefix))
        # The softmax of attention runs in float32, over other columns in the two layouts.
        same_move(a, b, with_head(params, loss), 5e-6)


def test_policy_equal_to_reference_gives_log_ratios_of_exactly_zero(params):
    wanted = {"logps", "ref_logps", "token_logps", "ref_token_logps", "ref_policy_kl"}
    out = jax.jit(lambda b: step.compute(SPEC, params, params, b, wanted))(batch_of(records()))
    assert (np.asarray(out["logps"]) == np.asarray(out["ref_logps"])).all()
    assert (np.asarray(out["token_logps"]) == np.asarray(out["ref_token_logps"])).all()
    assert np.abs(out["ref_policy_kl"]).max() < 1e-6
    assert (np.asarray(out["logps"]) < 0).all()


def test_requests_equal_a_plain_forward(params, other):
    """Every per-token request of one pair against numpy in float64 on the full logits."""
    rows = records(1, seed=3)
    batch = batch_of(records(1, seed=3) + records(1, seed=4))
    wanted = {"logps", "ref_logps", "entropy", "ref_policy_kl", "policy_ref_kl", "log_sum_sq", "lengths"}
    out = jax.device_get(step.compute(SPEC, params, other, batch, wanted))
    record = rows[0]
    for k, completion in enumerate(record.completions):
        tokens = np.concatenate([record.prompt, completion])[None]
        ones = np.ones_like(tokens)
        position = np.arange(tokens.shape[1])[None].astype(np.int32)
        table = []
        for tree in (params, other):
            hidden = models.forward(CONFIG, tree["model"], tokens, ones, ones, position)
            logits = np.asarray(models.logits(CONFIG, tree["model"], hidden), np.float64)[0]
            table.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        p, q = (t[len(record.prompt) - 1:-1] for t in table)
        index = np.arange(len(completion)), completion
        n = len(completion)
        np.testing.assert_allclose(out["logps"][0, k], p[index].sum(), atol=1e-4)
        np.testing.assert_allclose(out["ref_logps"][0, k], q[index].sum(), atol=1e-4)
        np.testing.assert_allclose(out["entropy"][0, k, :n], -(np.exp(p) * p).sum(-1), atol=1e-4)
        np.testing.assert_allclose(out["ref_policy_kl"][0, k, :n], (np.exp(q) * (q - p)).sum(-1), atol=1e-4)
        np.testing.assert_allclose(out["policy_ref_kl"][0, k, :n], (np.exp(p) * (p - q)).sum(-1), atol=1e-4)
        np.testing.assert_allclose(out["log_sum_sq"][0, k, :n], np.log((np.exp(p) ** 2).sum(-1)), atol=1e-4)
        assert out["lengths"][0, k] == n
        assert (out["entropy"][0, k, n:] == 0).all()


def test_a_non_finite_step_leaves_the_state_alone(params, other):
    loss = losses.get("dpo")
    broken = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), other)
    state, metrics = one_update(loss, params, broken, batch_of(records()))
    assert float(metrics["finite"][0]) == 0
    assert int(state.step) == 0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_does_not_touch_running_state(params, other):
    loss = losses.get("beta_dpo")
    before = loss.init_state()
    evaluate = step.make_evaluate(SPEC, loss, diagnostics=("entropy", "ref_policy_kl"))
    metrics, arrays = jax.jit(evaluate)(params, other, batch_of(records()), {}, jax.random.key(0), before)
    assert {"loss", "entropy", "kl_at_data_prefixes", "accuracy"} <= metrics.keys()
    assert "state" not in arrays
    state, _ = one_update(loss, params, other, batch_of(records()))
    assert any(float(jnp.abs(a - b)) > 0 for a, b in
               zip(jax.tree.leaves(state.loss_state), jax.tree.leaves(before), strict=True))


def test_merging_metrics_divides_once():
    merged = step.merge_metrics([{"a": (3.0, 1.0), "b": (1.0, 0.0)}, {"a": (1.0, 3.0)}])
    assert merged == {"a": (3 + 1) / (1 + 3)}


def test_reference_rules_refuse_what_they_cannot_supply():
    reference.check("frozen", ("logps", "ref_logps"))
    reference.check("none", ("logps", "lengths"))
    for rule, requests in (("none", ("ref_logps",)), ("precomputed", ("ref_policy_kl",)),
                           ("precomputed", ("kl_ref_logps",)), ("frozen", ("logps", "lengths")),
                           ("ema", ("ref_logps",))):
        with pytest.raises(ConfigError, match="reference"):
            reference.check(rule, requests)


def test_split_batch_cuts_every_leaf():
    batch = batch_of(records())
    parts = step.split_batch(batch, 4)
    assert parts.streams["pair"].groups == batch.streams["pair"].groups // 4
    assert all(a.shape[0] == 4 for a in jax.tree.leaves(parts))
    assert isinstance(parts, Batch)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_config_resolves_and_traces(method, params):
    """The config is legal, its requests are known, and its step traces abstractly on its reference rule."""
    from alignax import configs

    config = launch.load_config(str(ROOT / "experiments" / "methods" / f"{method}.py") + ":tiny")
    configs.check(config)
    stage = config.method
    loss = losses.from_section(stage.loss.to_dict())
    assert set(loss.requests) <= REQUESTS.keys()
    reference.check(stage.reference, loss.requests)
    optimizer = optax.adamw(1e-3)
    tree = with_head(params, loss)
    state = step.TrainState(jnp.zeros((), jnp.int32), tree, optimizer.init(tree), loss.init_state())
    ref = params if stage.reference == "frozen" else None
    new, metrics = jax.eval_shape(step.make_update(SPEC, loss, optimizer), state, ref, batch_of(records()), {},
                                  jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, new.params) == jax.tree.map(lambda a: a.shape, tree)
    assert "loss" in metrics


def test_every_loss_has_a_config():
    assert {losses.get(n).fn.__name__ for n in losses.names()} == set(METHODS) - {"compose"}  # made of parts


_EIGHT = """
import json, sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
import step_test as t
from alignax import losses, sharding, step, models
out = {{}}
mesh = sharding.make_mesh({{"data": 4, "fsdp": 2}})
assert jax.device_count() == 8
tree = lambda key: {{"model": models.init_params(t.CONFIG, jax.random.key(key))}}
scale = lambda key: jax.tree.map(lambda a: 3 * t.double(a), tree(key))
place = lambda p: jax.device_put(p, sharding.param_shardings(p, mesh))
for name in {names!r}:
    batch = sharding.shard_batch(t.batch_of(t.records()), mesh)
    state, metrics = t.one_update(losses.get(name), place(scale(0)), place(scale(1)), batch)
    out[name] = [float(np.abs(np.asarray(a, np.float64)).sum()) for a in jax.tree.leaves(state.params)]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_eight_devices_give_the_step_of_one():
    names = ONE_OF_EACH
    script = _EIGHT.format(tests=str(ROOT / "tests"), names=list(names))
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = json.loads(done.stdout.splitlines()[-1])
    with jax.enable_x64(True):
        start = [jax.tree.map(lambda a: 3 * double(a), {"model": models.init_params(CONFIG, jax.random.key(k))})
                 for k in (0, 1)]
        for name in names:
            state, _ = one_update(losses.get(name), *start, batch_of(records()))
            single = [float(np.abs(np.asarray(a)).sum()) for a in jax.tree.leaves(state.params)]
            np.testing.assert_allclose(sharded[name], single, rtol=1e-6, err_msg=name)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    mesh = sharding.make_mesh()
    fake = dataclasses.make_dataclass("Mesh", ["shape"])({"data": 3, "fsdp": 1, "tensor": 1})
    assert sharding.shard_batch(batch_of(records()), mesh).ids.shape == (8,)
    with pytest.raises(ConfigError, match="does not divide over 3"):
        sharding.shard_batch(batch_of(records()), fake)
    with pytest.raises(ConfigError, match="unknown axis"):
        sharding.make_mesh({"rows": 2})
