"""R4: log-probs accumulate in float32 from one shared model; sampler and trainer agree to float32 rounding; behaviour
log-probs are those of the distribution that was sampled.

Each test replays a failure that users of other frameworks reported; the docstring names the thread.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import data, losses, models, scoring, sources, step
from alignax.ops.head import Head, head_stats
from alignax.rollout import generate, token_bias

CONFIG = models.DecoderConfig(vocab_size=19, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, tie_embeddings=False, max_positions=32)
SPEC = step.ModelSpec(CONFIG)
PROMPTS = [np.asarray(p, np.int32) for p in ([5, 2], [1, 9, 4, 4], [8], [6, 6, 7])]
NUMBERS = [71, 5, 4_000_000_000, 12]
EOS = (3,)


@pytest.fixture(scope="module")
def params():
    # Further from uniform than at initialisation: a wrong distribution is seen.
    params = models.init_params(CONFIG, jax.random.key(1))
    return {"model": params | {"embedding": params["embedding"] * 25, "head": params["head"] * 15}}


def sampled(params, *, batch_size=4, prompts=PROMPTS, numbers=NUMBERS, **rules):
    return sources.rollout(CONFIG, params["model"], prompts, numbers, jax.random.key(7), num_samples=2,
                           max_new_tokens=6, eos_ids=EOS, pad_id=0, batch_size=batch_size, **rules)


def records(out):
    return [data.token_record(str(i), prompt, row, eos_ids=EOS)
            for i, (prompt, row) in enumerate(zip(PROMPTS, out.tokens, strict=True))]


@functools.partial(jax.jit, static_argnums=0)
def _trained(spec, params, batch):
    return step.compute(spec, params, None, batch, ("token_logps", "logps"))


def trained(params, out, *, layout="padded", spec=SPEC):
    """Token log-probs of sampled ids by the training pass, as nested lists like those of the rollouts."""
    rows = records(out)
    batch = data.fill(rows, data.plan_shape(rows, layout, 8), layout, pad_id=0)
    arrays, mask = _trained(spec, params, batch), batch.streams["pair"].mask
    return [[np.asarray(arrays["token_logps"][b, k])[mask[b, k]] for k in range(2)] for b in range(len(rows))]


def flat(lists):
    return np.concatenate([array for row in lists for array in row])


@pytest.fixture(scope="module")
def plain(params):
    return sampled(params)


@pytest.fixture(scope="module")
def nucleus(params):
    return sampled(params, temperature=0.8, top_p=0.8)


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
def test_sampler_and_trainer_disagree(params, plain, layout):
    """verl#2953 (two engines), marin#1879 (trainer against inference), trl#3867, trl#4772, trl#5231 (corrections for
    it, and logs of the raw ratios): what one engine sampled and another scored differ. Here one model definition
    serves both."""
    np.testing.assert_allclose(flat(trained(params, plain, layout=layout)), flat(plain.token_logps), atol=1e-4)
    sums = [[array.sum() for array in row] for row in plain.token_logps]
    np.testing.assert_allclose(plain.logps, sums, atol=1e-5)
    assert flat(plain.token_logps).min() < -1


def test_the_trainer_normalises_over_the_vocabulary_and_the_sampler_over_the_kept_set(params, nucleus):
    """trl#6789, trl#7269: with top-p the ratio of the two is the kept mass, not 1; so both are recorded."""
    tempered = flat(trained(params, nucleus, spec=step.ModelSpec(CONFIG, temperature=0.8)))
    mass = flat(nucleus.kept_mass)
    np.testing.assert_allclose(np.exp(tempered - flat(nucleus.behaviour_logps)), mass, atol=1e-4)
    assert (mass < 0.95).any() and (mass >= 0.8 - 1e-5).all()


def test_the_temperature_is_missing_on_one_side(params):
    """trl#4159: a trainer with the sampler's temperature gives the behaviour's log-probs; one without gives others."""
    out = sampled(params, temperature=0.6)
    behaviour = flat(out.behaviour_logps)
    with_it, without = (flat(trained(params, out, spec=step.ModelSpec(CONFIG, temperature=t))) for t in (0.6, 1.0))
    np.testing.assert_allclose(with_it, behaviour, atol=1e-4)
    np.testing.assert_allclose(without, flat(out.token_logps), atol=1e-4)
    assert np.abs(without - behaviour).max() > 0.05


def test_processed_log_probs_pass_for_the_policys(params):
    """open-instruct#1678: with a bias, penalties and a nucleus the policy's own log-probs stay those of the model."""
    bias = token_bias(CONFIG.vocab_size, {4: 3.0, 9: -2.0}, banned=(10,))
    out = sampled(params, bias=bias, repetition_penalty=1.3, presence_penalty=0.4, top_k=7)
    np.testing.assert_allclose(flat(trained(params, out)), flat(out.token_logps), atol=1e-4)
    assert np.abs(flat(out.token_logps) - flat(out.behaviour_logps)).max() > 0.1


def test_a_sequence_ratio_is_a_mean_over_tokens(params, plain):
    """trl#5814, trl#5815: the ratio of two sequences is the product over their tokens, so log-probs are sums."""
    rows = records(plain)
    batch = data.fill(rows, data.plan_shape(rows, "padded", 8), "padded", pad_id=0)
    arrays = _trained(SPEC, params, batch)
    np.testing.assert_allclose(arrays["logps"], plain.logps, atol=1e-4)
    np.testing.assert_allclose(scoring.score(SPEC, params, rows, pad_id=0)["logp"], plain.logps, atol=1e-4)


def test_log_probs_come_back_in_another_order(params, plain):
    """tunix#718: data-parallel sampling scrambled them. Batches that do not divide, and another order of prompts."""
    order = [2, 0, 3, 1]
    moved = sampled(params, batch_size=3, prompts=[PROMPTS[i] for i in order], numbers=[NUMBERS[i] for i in order])
    for place, i in enumerate(order):
        for k in range(2):
            np.testing.assert_array_equal(moved.tokens[place][k], plain.tokens[i][k])
            np.testing.assert_allclose(moved.token_logps[place][k], plain.token_logps[i][k], atol=1e-5)


def test_bfloat16_log_probs_lose_the_tail():
    """transformers#31267, trl#5333, genlm-backend#66: log-probs of bfloat16 states are computed in float32. A
    vocabulary of 4096, logits as far apart as those of a trained model."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 2, 8, 32)) * 2, jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(4096, 32)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 4096, (2, 2, 8)), jnp.int32)
    found = head_stats(hidden, Head(weight), targets)["logp"]
    exact = np.einsum("bktd,vd->bktv", np.asarray(hidden, np.float64), np.asarray(weight, np.float64))
    exact -= exact.max(-1, keepdims=True)
    exact = np.take_along_axis(exact - np.log(np.exp(exact).sum(-1, keepdims=True)), np.asarray(targets)[..., None], -1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact[..., 0], rtol=1e-5, atol=1e-4)
    narrow = jax.nn.log_softmax(jnp.einsum("bktd,vd->bktv", hidden, weight))  # what the threads saw
    narrow = jnp.take_along_axis(narrow, targets[..., None], -1)[..., 0].astype(jnp.float32)
    assert np.abs(narrow - exact[..., 0]).max() > 0.05


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto"])
def test_sums_in_bfloat16_pass_unnoticed(name):
    """transformers#31267: at 500 nats bfloat16 steps by 2, so a loss refuses such sums rather than train on them."""
    loss = losses.get(name)
    inputs = {request: jnp.full((2, 2), -500, jnp.bfloat16) for request in loss.requests}
    with pytest.raises(TypeError, match="logps.*bfloat16.*float32"):
        loss(inputs)


def test_the_bfloat16_mismatch_passes_the_gate(params):
    """NeMo-RL's documentation gates on exp(mean |log-ratio|) <= 1.05; bfloat16 on both sides stays inside it."""
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    out = sampled(half)
    gap = np.abs(flat(trained(half, out)) - flat(out.token_logps))
    assert np.exp(gap.mean()) <= 1.05 and flat(out.token_logps).dtype == np.float32
    exact = np.abs(flat(trained(params, out)) - flat(out.token_logps))
    assert exact.max() > 1e-4  # bfloat16 is what is measured here


def test_the_sampled_distribution_with_a_cache_is_another_one(params):
    """marin#1879: greedy choices of the cached sampler are the argmax of the training pass at every token."""
    out = sampled(params, temperature=0.0)
    for prompt, row in zip(PROMPTS, out.tokens, strict=True):
        ids = np.asarray([*prompt, *row[0]], np.int32)[None]
        ones, position = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
        hidden = models.forward(CONFIG, params["model"], ids, ones, ones, position)
        best = jnp.argmax(models.logits(CONFIG, params["model"], hidden), -1)[0, len(prompt) - 1:-1]
        assert best.tolist() == row[0].tolist()


def test_left_padding_changes_what_is_sampled(params, plain):
    """Of the family of verl#2953: a prompt's width in the batch (its padding) is no part of the distribution."""
    for i, width in ((0, 2), (0, 11), (1, 4)):  # rollouts pad to 8
        prompt = PROMPTS[i]
        wide = np.concatenate([np.zeros(width - len(prompt), np.int32), prompt])[None]
        mask = np.arange(width)[None] >= width - len(prompt)
        alone = generate(CONFIG, params["model"], wide, mask, np.asarray([NUMBERS[i]], np.uint32), jax.random.key(7),
                         num_samples=2, max_new_tokens=6, eos_ids=EOS, pad_id=0)
        for k in range(2):
            np.testing.assert_array_equal(np.asarray(alone.tokens)[0, k][np.asarray(alone.mask)[0, k]],
                                          plain.tokens[i][k])
