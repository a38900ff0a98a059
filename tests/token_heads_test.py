"""What fine-grained losses ask for: columns that the batch may hold, states, value and Q heads, token weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from requests_test import compute, log_table
from step_test import CONFIG, SPEC, batch_of, one_update, records

from alignax import data, losses, models, step
from alignax.models import token_heads
from alignax.ops.head import Head
from alignax.types import DataError

HEADS = {"values", "prompt_values", "q_values", "reward_mask", "kl_mask"}


@pytest.fixture(scope="module")
def params():
    tree = jax.tree.map(lambda a: 3 * a, {"model": models.init_params(CONFIG, jax.random.key(0))})
    heads = models.init_heads(HEADS, CONFIG.hidden_size, CONFIG.vocab_size, jax.random.key(2))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), heads)
    return tree | moved


@pytest.fixture(scope="module")
def other():
    return jax.tree.map(lambda a: 3 * a, {"model": models.init_params(CONFIG, jax.random.key(1))})


def with_data(batch, **columns):
    return dataclasses.replace(batch, data={**batch.data, **columns})


def test_steps_are_the_batch_s_or_the_runs_of_scored_tokens(params, other):
    record = data.token_record("r", [1, 4], [[5, 6, 7, 8, 9, 2], [5, 6, 2]], eos_ids=(2,))
    scored = (np.array([1, 1, 0, 0, 1, 1], bool), np.array([0, 1, 1], bool))
    batch = data.padded([dataclasses.replace(record, scored=scored)], K=2, T=16, L=7, pad_id=0)
    out = compute(params, other, batch, "steps")["steps"]
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out[0], [[0, 0, -1, -1, 1, 1, -1], [-1, 0, 0, -1, -1, -1, -1]])
    given = np.arange(14, dtype=np.int32).reshape(1, 2, 7)
    np.testing.assert_array_equal(compute(params, other, with_data(batch, steps=given), "steps")["steps"], given)


def test_columns_that_come_from_the_scores(params, other):
    batch = batch_of(records(2))  # scores 2 and 1
    mask = np.asarray(batch.streams["pair"].mask)
    names = ("token_rewards", "segment_scores", "advantages")
    out = compute(params, other, batch, *names)
    last = mask & (np.cumsum(mask, -1) == mask.sum(-1, keepdims=True))
    score = np.array([2.0, 1.0])[None, :, None]
    np.testing.assert_array_equal(out["token_rewards"], last * score)
    np.testing.assert_array_equal(out["segment_scores"], mask * score)
    np.testing.assert_array_equal(out["advantages"], mask * (score - 1.5))
    given = np.full(mask.shape, 0.25, np.float32)
    again = compute(params, other, with_data(batch, **dict.fromkeys(names, given)), *names)
    assert all((again[name] == given).all() for name in names)
    bare = dataclasses.replace(batch, data={k: v for k, v in batch.data.items() if k != "scores"})
    with pytest.raises(DataError, match="'advantages'.*records lack"):
        compute(params, other, bare, "advantages")


@pytest.mark.parametrize("layout", [data.padded, data.shared_prefix])
def test_heads_read_the_states_that_predict_the_tokens(params, other, layout):
    rows = records(2, seed=3)
    batch = batch_of(rows, layout)
    names = ("hidden", "values", "detached_values", "prompt_values", "q_values", "q_logps", "target_q_values",
             "reward_mask", "kl_mask", "mask")
    out = compute(params, other, batch, *names)
    value, prompt = (jax.tree.map(np.asarray, params[name]) for name in ("value_head", "prompt_value_head"))
    for b, record in enumerate(rows):
        theirs = np.asarray(log_table(other, record, record.completions[0])[1])
        at_end = theirs[len(record.prompt) - 1] @ prompt["weight"] + prompt["bias"]
        np.testing.assert_allclose(out["prompt_values"][b], at_end, atol=2e-5)
        for k, completion in enumerate(record.completions):
            n = len(completion)
            states, ref = (np.asarray(log_table(tree, record, completion)[1])[len(record.prompt) - 1:-1]
                           for tree in (params, other))
            np.testing.assert_allclose(out["hidden"][b, k, :n], states, atol=2e-5)
            for name in ("values", "detached_values"):
                np.testing.assert_allclose(out[name][b, k, :n], states @ value["weight"] + value["bias"], atol=3e-5)
            q = np.einsum("td,hvd->thv", states, params["q_head"]["weight"]) + np.asarray(params["q_head"]["bias"])
            taken = np.take_along_axis(q, completion[:, None, None], 2)[..., 0]
            np.testing.assert_allclose(out["q_values"][b, k, :n], taken, atol=1e-4)
            np.testing.assert_array_equal(out["target_q_values"], out["q_values"])
            np.testing.assert_allclose(out["q_logps"][b, k, :n], taken - np.log(np.exp(q).sum(-1)), atol=1e-4)
            for name in ("reward_mask", "kl_mask"):
                net = jax.tree.map(np.asarray, params[f"{name}_head"])
                x = (ref - ref.mean(-1, keepdims=True)) / np.sqrt(ref.var(-1, keepdims=True) + 1e-5)
                inner = (x * net["scale"] + net["shift"]) @ net["weight"] + net["bias"]
                expected = np.maximum(np.asarray(net["mix"]) * np.maximum(inner, 0), 0)
                np.testing.assert_allclose(out[name][b, k, :n], expected, atol=2e-5)
    for name in ("hidden", "values", "q_values", "reward_mask"):
        assert not out[name][~out["mask"]].any()
    given = with_data(batch, prompt_values=np.array([3.0, 4.0], np.float32))
    np.testing.assert_array_equal(compute(params, other, given, "prompt_values")["prompt_values"], [3, 4])


def test_where_gradients_of_heads_go(params, other):
    batch = batch_of(records(2))

    def reached(name):
        total = lambda p: jnp.square(step.compute(SPEC, p, other, batch, {name})[name]).sum()
        found = jax.jit(jax.grad(total))(params)
        return {part for part, tree in found.items() if any(np.any(np.asarray(g)) for g in jax.tree.leaves(tree))}

    assert reached("values") == {"model", "value_head"}
    assert reached("detached_values") == {"value_head"}
    assert reached("prompt_values") == {"prompt_value_head"}
    assert reached("q_values") == {"model", "q_head"}
    assert reached("target_q_values") == set()
    assert reached("kl_mask") == {"kl_mask_head"}


def test_a_copy_of_the_q_heads_gives_the_targets(params, other):
    trailing = params | {"target_q_head": jax.tree.map(lambda a: 0.5 * a, params["q_head"])}
    out = compute(trailing, other, batch_of(records(2)), "q_values", "target_q_values")
    np.testing.assert_allclose(out["target_q_values"], 0.5 * out["q_values"], atol=1e-6)


def test_activation_masks():
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(1, 2, 4, 3)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    mask = jnp.array([[[True, True, True, False], [False, True, False, False]]])
    found = np.asarray(token_heads.activation_mask(states, Head(weight), mask))
    parts = []
    for x in (np.asarray(states[0, 0, :3]).mean(-1), (np.asarray(states[0, 0, :3]) @ np.asarray(weight).T).mean(-1)):
        parts.append((x - x.min()) / (x.max() - x.min()))
    np.testing.assert_allclose(found[0, 0, :3], sum(parts) / 2, rtol=1e-5)
    assert not found[0, 1].any() and found[0, 0, 3] == 0  # a single token has no range
    assert found.min() >= 0 and found.max() <= 1
    # Any increasing affine map of the activations, standardising for one, gives the same mask.
    np.testing.assert_allclose(token_heads.activation_mask(7 * states + 2, Head(weight), mask), found, atol=1e-6)


def test_an_activation_mask_comes_from_the_reference(params, other):
    batch = batch_of(records(2))
    out = compute(params, other, batch, "activation_mask", "mask")
    assert (out["activation_mask"] == compute(other, other, batch, "activation_mask")["activation_mask"]).all()
    assert (out["activation_mask"] != compute(params, params, batch, "activation_mask")["activation_mask"]).any()
    assert not out["activation_mask"][~out["mask"]].any() and out["activation_mask"].max() <= 1
    given = np.full(out["mask"].shape, 0.5, np.float32)
    assert (compute(params, other, with_data(batch, activation_mask=given), "activation_mask")["activation_mask"]
            == 0.5).all()


def test_fresh_heads():
    assert models.init_heads({"logps", "lengths"}, 8, 17, jax.random.key(0)) == {}
    heads = models.init_heads(HEADS | {"rewards", "detached_values"}, 8, 17, jax.random.key(0))
    assert set(heads) == {"kl_mask_head", "prompt_value_head", "q_head", "reward_mask_head", "reward_head",
                          "value_head"}
    assert not np.asarray(heads["value_head"]["weight"]).any()
    q = np.asarray(heads["q_head"]["weight"])
    assert q.shape == (2, 17, 8) and (q[0] != q[1]).all()
    states = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), jnp.float32)
    weights = np.asarray(token_heads.token_weight(heads["kl_mask_head"], states))
    assert 0.3 < weights.min() < weights.max() < 1.7


@pytest.mark.parametrize("name", ["ilql", "sparse_po", "tpo_tree", "a_lol", "oreo:step", "svpo"])
def test_micro_batches_give_the_whole_step(name, params, other):
    loss = losses.get(name)
    start = {"model": params["model"]}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (start, other))
        whole, parts = (one_update(loss, *wide, batch_of(records()), accumulation=n)[0] for n in (1, 4))
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)
        moved = max(float(jnp.abs(a - b).max()) for a, b in
                    zip(jax.tree.leaves(whole.params["model"]), jax.tree.leaves(wide[0]["model"]), strict=True))
        assert moved > 1e-6


def test_a_policy_with_a_reward_head_is_evaluated_on_both(params, other):
    """Losses that ask for rewards and log-probs."""
    tree = params | models.init_heads({"rewards"}, CONFIG.hidden_size, CONFIG.vocab_size, jax.random.key(3))
    evaluate = step.make_evaluate(SPEC, losses.get("dph"))
    metrics, arrays = jax.jit(evaluate)(tree, other, batch_of(records(2)), {}, jax.random.key(0), None)
    assert {"rewards", "logps", "ref_logps"} <= arrays.keys() and np.isfinite(metrics["loss"][0])
