"""The providers of the rarer requests: each against a plain computation, and what a batch without them says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_test import CONFIG, SPEC, batch_of, one_update, records

from alignax import data, losses, models, step
from alignax.ops.head import Head
from alignax.types import DataError


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 3 * a, {"model": models.init_params(CONFIG, jax.random.key(0))})


@pytest.fixture(scope="module")
def other():
    return jax.tree.map(lambda a: 3 * a, {"model": models.init_params(CONFIG, jax.random.key(1))})


def log_table(params, record, completion):
    """Log-probs [tokens, V] after every token of prompt and completion, and the hidden states, from a plain forward."""
    tokens = np.concatenate([record.prompt, completion])[None]
    ones, position = np.ones_like(tokens), np.arange(tokens.shape[1])[None].astype(np.int32)
    hidden = models.forward(CONFIG, params["model"], tokens, ones, ones, position)
    return jax.nn.log_softmax(models.logits(CONFIG, params["model"], hidden))[0], hidden[0]


def compute(params, other, batch, *wanted):
    return jax.device_get(jax.jit(lambda b: step.compute(SPEC, params, other, b, set(wanted)))(batch))


@pytest.mark.parametrize("layout", [data.padded, data.shared_prefix])
def test_candidate_log_probs_and_targets(params, other, layout):
    rows = records(2, seed=3)
    out = compute(params, other, batch_of(rows, layout), "candidate_logps", "targets", "mask", "token_logps")
    for b, record in enumerate(rows):
        for k, completion in enumerate(record.completions):
            n = len(completion)
            table = np.asarray(log_table(params, record, completion)[0])[len(record.prompt) - 1:-1]
            expected = np.zeros_like(out["candidate_logps"][b, k])
            expected[:n, :n] = table[:, completion]
            np.testing.assert_allclose(out["candidate_logps"][b, k], expected, atol=2e-5)
            np.testing.assert_array_equal(out["targets"][b, k, :n], completion)
            np.testing.assert_allclose(np.diagonal(out["candidate_logps"][b, k]), out["token_logps"][b, k], atol=1e-6)


def test_candidates_with_soft_cap_bias_and_temperature():
    rng = np.random.default_rng(0)
    slots, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, 4, 6), (9, 6)))
    head = Head(weight, jnp.asarray(rng.normal(size=9), jnp.float32), 2.0)
    targets, mask = jnp.array([[[3, 8, 3, 0]]]), jnp.array([[[True, True, True, False]]])
    logits = 2.0 * jnp.tanh((slots @ weight.T + head.bias[None, None, None]) / 2.0) / 0.7
    table = jax.nn.log_softmax(logits)[0, 0]
    logps = jnp.take_along_axis(table, targets[0, 0][:, None], 1)[:, 0][None, None]
    got = step.candidate_logps(slots, head, targets, logps, mask, 0.7)[0, 0]
    expected = np.zeros((4, 4))
    expected[:3, :3] = np.asarray(table)[:3][:, np.asarray(targets[0, 0, :3])]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("layout", [data.padded, data.shared_prefix])
def test_prompt_embedding_is_the_mean_of_the_reference_over_the_prompt(params, other, layout):
    rows = records(3, seed=5)
    batch = batch_of(rows, layout)
    out = compute(params, other, batch, "prompt_embedding")["prompt_embedding"]
    for got, record in zip(out, rows, strict=True):
        hidden = log_table(other, record, record.completions[0])[1]
        np.testing.assert_allclose(got, np.asarray(hidden)[:len(record.prompt)].mean(0), atol=2e-5)
    given = dataclasses.replace(batch, data={**batch.data, "prompt_embedding": np.ones((3, 5), np.float32)})
    assert compute(params, other, given, "prompt_embedding")["prompt_embedding"].shape == (3, 5)


def test_old_log_probs_are_the_recorded_ones_or_those_of_the_start(params, other):
    batch = batch_of(records(2))
    out = compute(params, other, batch, "old_token_logps", "ref_token_logps", "token_logps")
    np.testing.assert_array_equal(out["old_token_logps"], out["ref_token_logps"])
    assert np.abs(out["old_token_logps"] - out["token_logps"]).max() > 0.1
    recorded = np.full(batch.streams["pair"].mask.shape, -2.0, np.float32)
    given = dataclasses.replace(batch, data={**batch.data, "old_token_logps": recorded})
    np.testing.assert_array_equal(compute(params, other, given, "old_token_logps")["old_token_logps"], recorded)


def test_sums_of_the_other_streams(params, other):
    """Policy and reference sums on a named stream are those of its completions laid out as the pairs."""
    rows = records(2)
    moved = batch_of(rows)
    plain = batch_of(data.mismatched(rows))
    names = ("aux_prompt_logps", "reference_sample_logps", "kl_logps", "aux_prompt_ref_logps", "kl_ref_logps")
    out = compute(params, other, moved, *names)
    expected = compute(params, other, plain, "logps", "ref_logps")
    for name in names:
        np.testing.assert_allclose(out[name], expected["ref_logps" if "ref_logps" in name else "logps"], rtol=1e-5)


def test_degree_logits_read_the_last_token(params, other):
    rows = records(2)
    rng = np.random.default_rng(0)
    tree = params | {"degree_head": {"weight": jnp.asarray(rng.normal(size=(4, CONFIG.hidden_size)), jnp.float32),
                                     "bias": jnp.arange(4.0)}}
    out = compute(tree, other, batch_of(rows), "degree_logits")["degree_logits"]
    assert out.shape == (2, 2, 4)
    partners = data.mismatched(rows)
    for b, record in enumerate(partners):
        for k, completion in enumerate(record.completions):
            last = np.asarray(log_table(params, record, completion)[1])[-1]
            expected = np.asarray(tree["degree_head"]["weight"]) @ last + np.arange(4.0)
            np.testing.assert_allclose(out[b, k], expected, atol=1e-4)


def test_annotators_default_to_one_person(params, other):
    batch = batch_of(records(2))
    np.testing.assert_array_equal(compute(params, other, batch, "annotator")["annotator"], [0, 0])
    given = dataclasses.replace(batch, data={**batch.data, "annotator": np.array([3, 1], np.int32)})
    np.testing.assert_array_equal(compute(params, other, given, "annotator")["annotator"], [3, 1])


@pytest.mark.parametrize("layout", [data.padded, data.shared_prefix])
def test_edited_tokens_and_record_numbers(params, other, layout):
    pairs = [([5, 6, 7, 8, 2], [5, 9, 2]),       # 6 7 8 became 9
             ([5, 6, 6, 2], [5, 6, 2]),          # one of two equal tokens deleted: the second
             ([5, 6, 2], [5, 6, 2]), ([5, 6], [7, 8, 9])]
    expected = [("01110", "010"), ("0010", "000"), ("000", "000"), ("11", "111")]
    rows = [data.token_record(f"r{i}", [1, 4], p, eos_ids=(2,)) for i, p in enumerate(pairs)]
    batch = layout(rows, K=2, T=16, L=6, pad_id=0)
    out = compute(params, other, batch, "diff", "ids", "mask")
    for got, marks in zip(out["diff"], expected, strict=True):
        for line, mark in zip(got, marks, strict=True):
            assert "".join("01"[int(x)] for x in line) == mark.ljust(6, "0")
    np.testing.assert_array_equal(out["ids"], [r.number for r in rows])
    # Slots that are not scored take no part in the comparison.
    stream = batch.streams["pair"]
    scored = np.asarray(stream.mask).copy()
    scored[0, 0, 1] = False  # 5 . 7 8 2 against 5 9 2
    assert np.asarray(step.edited(dataclasses.replace(stream, mask=scored)))[0].tolist() == [
        [False, False, True, True, False, False], [False, True, False, False, False, False]]
    given = dataclasses.replace(batch, data={**batch.data, "diff": np.ones_like(stream.mask)})
    assert compute(params, other, given, "diff")["diff"].all()
    with pytest.raises(DataError, match="diff: the batch has 3 completions"):
        step.edited(jax.tree.map(lambda a: np.concatenate([a, a[:, :1]], 1) if a.ndim == 3 else a, stream))


def test_what_a_batch_lacks_is_named(params, other):
    batch = data.padded(records(2), K=2, T=32, L=8, pad_id=0)
    with pytest.raises(DataError, match="aux_prompt_logps: the batch has no stream 'aux_prompt'; found: pair"):
        step.compute(SPEC, params, other, batch, {"aux_prompt_logps"})
    with pytest.raises(DataError, match="asks for 'scores'.*external score.*records lack"):
        bare = dataclasses.replace(batch, data={k: v for k, v in batch.data.items() if k != "scores"})
        step.compute(SPEC, params, other, bare, {"scores"})


@pytest.mark.parametrize("name", ["relative_po", "unlikelihood:token", "prdp", "self_supervised_po", "bco", "sampo"])
def test_micro_batches_give_the_whole_step(name, params, other):
    """Also for arrays of other ranks, other streams and heads."""
    loss = losses.get(name)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, other))
        whole, parts = (one_update(loss, *wide, batch_of(records()), accumulation=n)[0] for n in (1, 4))
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)
        moved = max(float(jnp.abs(a - b).max()) for a, b in
                    zip(jax.tree.leaves(whole.params["model"]), jax.tree.leaves(wide[0]["model"]), strict=True))
        # A classifier that starts at zero passes no gradient on; the DPO part moves the model all the same.
        assert moved > 1e-6
