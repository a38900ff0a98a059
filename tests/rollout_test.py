"""Decoding rules and the sampler: what is sampled, what is recorded about it, and what it does not depend on."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from alignax import data, models, step
from alignax.ops.head import head_stats
from alignax.rollout import apply_temperature, categorical, generate, refill, sampler, stop_table, top_p_filter
from alignax.types import ConfigError, DataError

CONFIG = models.DecoderConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, tie_embeddings=False, max_positions=32)
EOS = (3, 7)
PROMPTS = np.array([[0, 0, 5, 2], [1, 9, 4, 4], [0, 0, 0, 8]], np.int32)
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
IDS = np.array([71, 5, 4_000_000_000], np.uint32)
SETTINGS = dict(num_samples=3, max_new_tokens=6, temperature=0.8, top_p=0.9, eos_ids=EOS, pad_id=0)


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def params():
    # Further from uniform, and from ignoring the context, than at initialisation: a wrong distribution is seen.
    params = models.init_params(CONFIG, jax.random.key(1))
    return params | {"embedding": params["embedding"] * 25, "head": params["head"] * 15}


@pytest.fixture(scope="module")
def key():
    return jax.random.key(7)


@pytest.fixture(scope="module")
def samples(params, key):
    return jax.device_get(generate(CONFIG, params, PROMPTS, MASK, IDS, key, **SETTINGS))


forward = jax.jit(models.forward, static_argnums=0)


def rescore(params, prompts, mask, tokens, live):
    """Hidden states that predict each sampled slot, [B,K,N,D], by the training forward pass on padded rows."""
    batch, count, new = tokens.shape
    text = np.concatenate([np.repeat(prompts, count, 0), tokens.reshape(-1, new)], axis=1)
    real = np.concatenate([np.repeat(mask, count, 0), live.reshape(-1, new)], axis=1)
    segment = jnp.asarray(real, jnp.int32)
    position = jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0), jnp.int32)
    hidden = forward(CONFIG, params, jnp.asarray(text, jnp.int32), segment, segment, position)
    width = prompts.shape[1]
    return hidden[:, width - 1:-1].reshape(batch, count, new, -1)


# --- decoding rules ----------------------------------------------------------------------------------------------


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probs = jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    for p, kept in ((0.35, [[1], [0, 1]]), (0.45, [[1, 3], [0, 1]]), (0.85, [[1, 2, 3], [0, 1, 2, 3]]),
                    (1e-6, [[1], [0]])):
        filtered, mass = top_p_filter(jnp.log(probs), p)
        for row, ids in enumerate(kept):
            assert np.flatnonzero(np.isfinite(filtered[row])).tolist() == ids
            np.testing.assert_allclose(mass[row], sum(float(probs[row, i]) for i in ids), rtol=1e-6)
            np.testing.assert_array_equal(filtered[row, jnp.array(ids)], jnp.log(probs)[row, jnp.array(ids)])


def test_top_p_of_one_keeps_everything_exactly_also_when_traced():
    logits = jax.random.normal(jax.random.key(0), (50, 301)) * 12  # the running sum reaches 1 long before the tail
    for p in (1.0, jnp.float32(1.0)):
        filtered, mass = jax.jit(top_p_filter, static_argnums=1 if isinstance(p, float) else ())(logits, p)
        np.testing.assert_array_equal(filtered, logits)
        np.testing.assert_array_equal(mass, np.ones(50))
    for p in (0.3, 0.9):
        static, traced = top_p_filter(logits, p), jax.jit(top_p_filter)(logits, p)
        np.testing.assert_array_equal(static[0], traced[0])
        assert (static[1] >= p - 1e-6).all()


def test_decoding_rules_are_float32_and_refuse_impossible_settings():
    half = jnp.array([1.0, 2.0], jnp.bfloat16)
    assert apply_temperature(half, 0.5).dtype == top_p_filter(half, 0.9)[0].dtype == jnp.float32
    np.testing.assert_array_equal(apply_temperature(half, 0.5), [2.0, 4.0])
    for bad in (0, 0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match="temperature.*> 0"):
            apply_temperature(half, bad)
    for bad in (0.0, -0.1, 1.1):
        with pytest.raises(ConfigError, match=r"\(0, 1\]"):
            top_p_filter(half, bad)


# --- the sampler ---------------------------------------------------------------------------------------------------


def test_shapes_and_dtypes(samples):
    kinds = [(a.dtype.name, a.shape) for a in samples]
    assert kinds == [("int32", (3, 3, 6)), ("bool", (3, 3, 6)), *[("float32", (3, 3, 6))] * 3, ("int8", (3, 3))]
    assert samples.finished.dtype == bool and samples.finished.shape == (3, 3)


def test_an_end_token_is_counted_and_stops_its_row(samples):
    ends = np.isin(samples.tokens, EOS) & samples.mask
    assert samples.finished.any() and not samples.finished.all()  # the seed shows both cases
    np.testing.assert_array_equal(samples.finished, ends.any(-1))
    for tokens, mask, finished, end in zip(*(a.reshape(-1, *a.shape[2:]) for a in (
            samples.tokens, samples.mask, samples.finished, ends)), strict=True):
        length = np.flatnonzero(end)[0] + 1 if finished else 6
        np.testing.assert_array_equal(mask, np.arange(6) < length)
        assert (tokens[length:] == 0).all()
    assert (samples.logps[~samples.mask] == 0).all() and (samples.behaviour_logps[~samples.mask] == 0).all()
    assert (samples.kept_mass[~samples.mask] == 1).all()


def test_rescoring_agrees_with_the_sampler(params, samples):
    hidden = rescore(params, PROMPTS, MASK, samples.tokens, samples.mask)
    scored = head_stats(hidden, models.head(CONFIG, params), jnp.asarray(samples.tokens))["logp"]
    np.testing.assert_allclose(np.where(samples.mask, scored, 0), samples.logps, atol=1e-4)
    assert samples.logps[samples.mask].min() < -1

    # The behaviour: temperature first, then the nucleus, renormalised.
    filtered, mass = top_p_filter(apply_temperature(models.logits(CONFIG, params, hidden), 0.8), 0.9)
    behaviour = jnp.take_along_axis(jax.nn.log_softmax(filtered), samples.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.where(samples.mask, behaviour, 0), samples.behaviour_logps, atol=1e-4)
    np.testing.assert_allclose(np.where(samples.mask, mass, 1), samples.kept_mass, atol=1e-4)
    tempered = jax.nn.log_softmax(models.logits(CONFIG, params, hidden) / 0.8)
    tempered = jnp.take_along_axis(tempered, samples.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(tempered - behaviour)[samples.mask], samples.kept_mass[samples.mask], atol=1e-4)
    assert (samples.kept_mass[samples.mask] < 0.99).any()


def test_plain_sampling_has_equal_behaviour_and_policy(params, key):
    out = generate(CONFIG, params, PROMPTS, MASK, IDS, key, num_samples=2, max_new_tokens=4)
    np.testing.assert_allclose(out.behaviour_logps, out.logps, atol=1e-6)
    assert (out.kept_mass == 1).all() and out.mask.all() and not out.finished.any()


def test_a_completion_does_not_depend_on_its_neighbours(params, key, samples):
    order = np.array([2, 0, 1])
    moved = generate(CONFIG, params, PROMPTS[order], MASK[order], IDS[order], key, **SETTINGS)
    np.testing.assert_array_equal(moved.tokens, samples.tokens[order])
    alone = generate(CONFIG, params, PROMPTS[:1], MASK[:1], IDS[:1], key, **SETTINGS)
    np.testing.assert_array_equal(alone.tokens, samples.tokens[:1])
    np.testing.assert_allclose(alone.logps, samples.logps[:1], atol=1e-5)
    fewer = generate(CONFIG, params, PROMPTS, MASK, IDS, key, **{**SETTINGS, "num_samples": 1})
    np.testing.assert_array_equal(fewer.tokens, samples.tokens[:, :1])
    wider = generate(CONFIG, params, np.pad(PROMPTS, ((0, 0), (3, 0)), constant_values=6),
                     np.pad(MASK, ((0, 0), (3, 0))), IDS, key, **SETTINGS)
    np.testing.assert_array_equal(wider.tokens, samples.tokens)


def test_a_place_in_the_batch_changes_no_bit(params, key):
    settings = SETTINGS | dict(top_k=8, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.1)
    first = jax.device_get(generate(CONFIG, params, PROMPTS, MASK, IDS, key, **settings))
    order = np.array([1, 2, 0])
    moved = jax.device_get(generate(CONFIG, params, PROMPTS[order], MASK[order], IDS[order], key, **settings))
    others = jax.device_get(generate(CONFIG, params, PROMPTS[[0, 2, 2]], MASK[[0, 2, 2]],
                                     np.array([71, 1, 2], np.uint32), key, **settings))
    for name, a, b, c in zip(first._fields, first, moved, others, strict=True):
        np.testing.assert_array_equal(a[order], b, err_msg=name)
        np.testing.assert_array_equal(a[0], c[0], err_msg=name)


def test_the_id_the_sample_and_the_seed_each_matter(params, key, samples):
    same_prompt = generate(CONFIG, params, PROMPTS[[1, 1, 1]], MASK[[1, 1, 1]], IDS, key, **SETTINGS)
    rows = {tuple(row) for row in np.asarray(same_prompt.tokens).reshape(-1, 6)}
    assert len(rows) >= 7  # nine draws; equal keys would give three or one
    other = generate(CONFIG, params, PROMPTS, MASK, IDS, jax.random.key(8), **SETTINGS)
    assert (np.asarray(other.tokens) != samples.tokens).any(axis=(1, 2)).all()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_sampled_frequencies_are_those_of_the_distribution(params, key, temperature, top_p):
    count = 4000
    out = generate(CONFIG, params, PROMPTS[:2], MASK[:2], IDS[:2], key, num_samples=count, max_new_tokens=1,
                   temperature=temperature, top_p=top_p)
    segment = jnp.asarray(MASK[:2], jnp.int32)
    position = jnp.maximum(jnp.cumsum(segment, axis=1) - 1, 0)
    hidden = forward(CONFIG, params, jnp.asarray(PROMPTS[:2]), segment, segment, position)[:, -1]
    probs = np.asarray(jax.nn.softmax(models.logits(CONFIG, params, hidden) / temperature), np.float64)
    for row in range(2):
        ranked = np.argsort(-probs[row])
        kept = ranked[:np.searchsorted(np.cumsum(probs[row][ranked]), top_p) + 1] if top_p < 1 else ranked
        assert len(kept) >= 2
        observed = np.bincount(np.asarray(out.tokens)[row, :, 0], minlength=CONFIG.vocab_size)
        assert observed[kept].sum() == count
        expected = probs[row, kept] / probs[row, kept].sum() * count
        small = expected < 5  # merged: the chi-square approximation needs counts
        merge = lambda a, small=small: np.append(a[~small], a[small].sum()) if small.any() else a
        assert scipy.stats.chisquare(merge(observed[kept]), merge(expected)).pvalue > 1e-3


def test_greedy_is_the_argmax_of_the_training_pass(params, key):
    out = jax.device_get(generate(CONFIG, params, PROMPTS, MASK, IDS, key, num_samples=2, max_new_tokens=5,
                                  temperature=0.0))
    np.testing.assert_array_equal(out.tokens[:, 0], out.tokens[:, 1])
    logits = models.logits(CONFIG, params, rescore(params, PROMPTS, MASK, out.tokens, out.mask))
    np.testing.assert_array_equal(out.tokens, jnp.argmax(logits, axis=-1))
    assert (out.behaviour_logps == 0).all() and (out.kept_mass == 1).all() and (out.logps < 0).any()


def test_the_loop_stops_when_every_row_has_ended(params, key, monkeypatch):
    steps = []
    original = models.decode_step

    def counting(config, params, tokens, *rest, **more):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda _: steps.append(1), tokens)
        return original(config, params, tokens, *rest, **more)

    monkeypatch.setattr(sampler.models, "decode_step", counting)
    monkeypatch.setattr(sampler, "_generate", sampler._generate.__wrapped__)
    run = lambda ids, n: (steps.clear(), jax.block_until_ready(generate(
        CONFIG, params, jnp.asarray(PROMPTS), jnp.asarray(MASK), jnp.asarray(IDS), key, num_samples=2,
        max_new_tokens=n, eos_ids=ids)), jax.effects_barrier())[1]
    out = run(tuple(range(11)), 9)
    assert len(steps) == 0 and out.mask.sum() == 6 and out.finished.all()
    run((), 9)
    assert len(steps) == 8
    out = run(EOS + (1, 2), 9)
    assert len(steps) == int(out.mask.sum(-1).max()) - 1


def test_equal_settings_compile_once(params, key):
    generate(CONFIG, params, PROMPTS, MASK, IDS, key, **SETTINGS)
    before = sampler._generate._cache_size()
    for seed in (1, 2):
        generate(CONFIG, params, PROMPTS, MASK, IDS, jax.random.key(seed), **{**SETTINGS, "eos_ids": [7, 3, 3]})
    assert sampler._generate._cache_size() == before


def test_the_trainer_scores_the_samples_as_the_sampler_did(params, samples):
    """Through the update's own forward pass, on the sampled ids in each layout of the data."""
    wanted, spec = ("token_logps", "logps"), step.ModelSpec(CONFIG)
    compute = jax.jit(lambda params, batch: step.compute(spec, {"model": params}, None, batch, wanted))
    records = [data.token_record(str(i), PROMPTS[i][MASK[i]].tolist(),
                                 [samples.tokens[i, k][samples.mask[i, k]].tolist() for k in range(3)], eos_ids=EOS)
               for i in range(3)]
    for fill in (data.padded, data.shared_prefix):
        batch = fill(records, K=3, T=24, L=8, pad_id=0)
        batch = jax.tree.map(jnp.asarray, batch)
        scored = compute(params, batch)
        token_logps = np.asarray(scored["token_logps"])[..., :6]
        np.testing.assert_allclose(np.where(samples.mask, token_logps, 0), samples.logps, atol=1e-4)
        np.testing.assert_allclose(scored["logps"], samples.logps.sum(-1), atol=1e-4)


def test_capped_logits_and_windows_agree_with_the_trainer(params, key):
    config = dataclasses.replace(CONFIG, final_softcap=2.0, attention_softcap=3.0, windows=(2, 0))
    out = jax.device_get(generate(config, params, PROMPTS, MASK, IDS, key, **SETTINGS))
    records = [data.token_record(str(i), PROMPTS[i][MASK[i]].tolist(),
                                 [out.tokens[i, k][out.mask[i, k]].tolist() for k in range(3)], eos_ids=EOS)
               for i in range(3)]
    batch = jax.tree.map(jnp.asarray, data.padded(records, K=3, T=24, L=8, pad_id=0))
    scored = step.compute(step.ModelSpec(config), {"model": params}, None, batch, ("token_logps",))["token_logps"]
    np.testing.assert_allclose(np.where(out.mask, scored[..., :6], 0), out.logps, atol=1e-4)
    assert out.logps.min() > -4 - np.log(11)  # logits lie in [-2, 2]


def test_adapters_sample_as_the_merged_parameters_do(params, key):
    draw = lambda shape, n: jax.random.normal(jax.random.key(n), shape) * 0.5
    adapters = {"attention": {"query": {"a": draw((2, 16, 2), 1), "b": draw((2, 2, 16), 2)}},
                "mlp": {"down": {"a": draw((2, 24, 3), 3), "b": draw((2, 3, 16), 4)}}}
    layers = jax.tree.map(lambda a: a, params["layers"])
    for block, name in (("attention", "query"), ("mlp", "down")):
        leaf = adapters[block][name]
        layers[block][name] = layers[block][name] + leaf["a"] @ leaf["b"]
    out = generate(CONFIG, params, PROMPTS, MASK, IDS, key, adapters=adapters, **SETTINGS)
    merged = generate(CONFIG, params | {"layers": layers}, PROMPTS, MASK, IDS, key, **SETTINGS)
    plain = generate(CONFIG, params, PROMPTS, MASK, IDS, key, **SETTINGS)
    np.testing.assert_array_equal(out.tokens, merged.tokens)
    np.testing.assert_allclose(out.logps, merged.logps, atol=1e-4)
    assert (np.asarray(out.tokens) != np.asarray(plain.tokens)).any()


def test_bfloat16_parameters_keep_float32_records(params, key):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    out = generate(CONFIG, half, PROMPTS, MASK, IDS, key, num_samples=1, max_new_tokens=2)
    assert out.logps.dtype == jnp.float32 and np.isfinite(out.logps).all()


@pytest.mark.parametrize("change, words", [
    ({"num_samples": 0}, "num_samples=.: found 0"), ({"max_new_tokens": 1.5}, "max_new_tokens=.: found 1.5"),
    ({"max_new_tokens": 29}, "4 prompt columns . 29 new tokens, allowed: at most max_positions = 32"),
    ({"temperature": -0.1}, "temperature.*found -0.1"), ({"temperature": 1e-9}, "temperature"),
    ({"temperature": float("nan")}, "temperature.*nan"), ({"top_p": 0.0}, "top_p.*found 0.0"),
    ({"top_p": 1.01}, "top_p.*1.01"), ({"eos_ids": (11,)}, "eos_ids.*found 11, allowed: ids in 0 .. 10"),
    ({"eos_ids": 3}, "eos_ids.*a tuple"), ({"pad_id": -1}, "pad_id.*found -1"),
])
def test_settings_out_of_range_are_refused(params, key, change, words):
    with pytest.raises(ConfigError, match=words):
        generate(CONFIG, params, PROMPTS, MASK, IDS, key, **{**SETTINGS, **change})


@pytest.mark.parametrize("prompts, mask, ids, words", [
    (PROMPTS, MASK[:, ::-1].copy(), IDS, "row 0: found .1, 1, 0, 0.*left-padded"),
    (PROMPTS, np.zeros_like(MASK), IDS, "row 0.*at least one 1"),
    (PROMPTS, MASK.astype(np.int32), IDS, "prompt_mask: found int32"),
    (PROMPTS, MASK, IDS.astype(np.int64), "prompt_ids: found int64.*uint32"),
    (PROMPTS, MASK, IDS[:2], r"prompt_ids: found uint32 \(2,\)"),
    (PROMPTS[0], MASK[0], IDS, r"prompts: found int32 \(4,\)"),
])
def test_arrays_of_the_wrong_kind_are_refused(params, key, prompts, mask, ids, words):
    with pytest.raises(DataError, match=words):
        generate(CONFIG, params, prompts, mask, ids, key, **SETTINGS)


EIGHT = """
import jax, numpy as np
from alignax import models, sharding
from alignax.rollout import generate, stop_table
from alignax.sources import rollout
from jax.sharding import NamedSharding, PartitionSpec
assert jax.device_count() == 8
config = models.DecoderConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, tie_embeddings=False, max_positions=32)
params = models.init_params(config, jax.random.key(1))
params |= {"embedding": params["embedding"] * 25, "head": params["head"] * 15}
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 16, size=n).astype(np.int32) for n in (3, 1, 5, 4, 2, 2)]
settings = dict(num_samples=2, max_new_tokens=7, eos_ids=(3, 7), pad_id=0, batch_size=6, temperature=0.9, top_k=12,
                top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.1,
                stops=stop_table(["ab", "cc"], [bytes([97 + i % 4]) for i in range(16)], 16))
one = rollout(config, params, prompts, range(6), jax.random.key(1), **settings)
assert len(set(one.reason.ravel().tolist())) == 3
for sizes in (dict(data=2, fsdp=2, tensor=2), dict(data=8)):
    mesh = sharding.make_mesh(sizes)
    placed = jax.device_put({"model": params}, sharding.param_shardings({"model": params}, mesh))["model"]
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    many = rollout(config, placed, prompts, range(6), jax.random.key(1), rows=rows, **settings)
    np.testing.assert_array_equal(one.reason, many.reason)
    for name in ("tokens", "token_logps", "behaviour_logps", "kept_mass"):
        for a, b in zip(sum(getattr(one, name), []), sum(getattr(many, name), []), strict=True):
            np.testing.assert_allclose(a, b, atol=0 if name == "tokens" else 1e-5, err_msg=name)
    grid = jax.device_put(np.ones((8, 4), np.int32), rows)
    out = generate(config, placed, grid, jax.device_put(np.ones((8, 4), bool), rows),
                   jax.device_put(np.arange(8, dtype=np.uint32), rows), jax.random.key(1), max_new_tokens=3)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    assert out.tokens.sharding.shard_shape(out.tokens.shape)[0] == 8 // ways, out.tokens.sharding
print("same")
"""


@pytest.mark.slow
def test_eight_devices_sample_what_one_does(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True, timeout=600,
                          cwd=pathlib.Path(__file__).resolve().parents[1])
    assert done.returncode == 0 and done.stdout.split() == ["same"], done.stderr[-3000:]


@pytest.mark.parametrize(("lanes", "change"), [
    (1, {}), (2, {}), (4, dict(stops=True)), (20, {}),
    (3, dict(repetition_penalty=1.4, presence_penalty=0.3, min_new_tokens=2, temperature=np.array([0.0, 0.7, 1.3])))])
def test_refilled_rows_hold_what_generate_samples(params, key, lanes, change):
    """Any number of lanes, each rule that keeps something about a row: the same completions, in the same places."""
    change = dict(change)
    if change.pop("stops", False):
        change["stops"] = stop_table(["f", "ce"], [b"abcdefghijk"[i:i + 1] for i in range(11)], 11)
    settings = SETTINGS | change
    expected = jax.device_get(generate(CONFIG, params, PROMPTS, MASK, IDS, key, **settings))
    found = jax.device_get(refill(CONFIG, params, PROMPTS, MASK, IDS, key, lanes=lanes, **settings))
    assert len(set(expected.mask.sum(-1).ravel().tolist())) > 2  # lengths differ, so lanes are refilled out of step
    for name in ("tokens", "mask", "reason"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in ("logps", "behaviour_logps", "kept_mass"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_draw_has_the_law_of_its_logits_over_many_blocks():
    """Of 700 tokens, three blocks of which the last is not full, half are banned: chi-square against the softmax."""
    logits = np.random.default_rng(0).normal(size=(1, 700)).astype(np.float32)
    logits[:, ::2] = -np.inf
    rows = 40_000
    draw = jax.jit(lambda keys: categorical(keys, jnp.broadcast_to(logits, (rows, 700))))
    count = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(3), rows))), minlength=700)
    odd = np.exp(logits[0, 1::2].astype(np.float64))
    assert count.shape == (700,) and count[::2].sum() == 0
    assert scipy.stats.chisquare(count[1::2], odd / odd.sum() * rows).pvalue > 1e-3


def test_refill_names_what_it_refuses(params, key):
    with pytest.raises(ConfigError, match="lanes"):
        refill(CONFIG, params, PROMPTS, MASK, IDS, key, lanes=0, **SETTINGS)
