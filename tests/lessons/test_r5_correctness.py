"""R5: a loss has an oracle, does not depend on micro-batches, devices or padding, and states its denominator.

Each test replays a failure that users of other frameworks reported; the docstring names the thread. The laws for every
loss of the index stand in laws_test.py, accumulation_test.py, sharded_losses_test.py and packing_test.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from rich.console import Console

from alignax import configs, data, losses, metrics, models, step, train
from alignax.models import last_token_positions
from alignax.ops.head import Head, head_stats
from alignax.ops.reductions import REDUCTIONS, as_terms, denominator, reduce_term, reduce_terms
from alignax.types import REQUESTS, ConfigError, Term

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from laws_test import inputs_of  # noqa: E402  (support beside the other tests)

pytestmark = pytest.mark.slow

CONFIG = models.DecoderConfig(vocab_size=24, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG)
# Its method leaves out the pairs of an implausible margin: the number of those that are left is its denominator.
FILTERS = ("beta_dpo",)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [data.token_record(str(i), rng.integers(3, 24, 3), [[*rng.integers(3, 24, int(n)), 2] for n in lengths],
                              eos_ids=(2,)) for i, lengths in enumerate(rng.integers(1, 7, (count, 2)))]


@pytest.fixture(scope="module")
def params():
    tree = {"model": jax.tree.map(lambda a: 3 * a, models.init_params(CONFIG, jax.random.key(0)))}
    return tree | {"reward_head": models.init_scalar_head(jax.random.key(1), CONFIG.hidden_size)}


def test_a_loss_states_its_denominator():
    """trl#3021, trl#3138, trl#3256 (what a length-normalised loss is divided by): every term of every loss names its
    reduction, and its denominator is computed from nothing that the policy, the reference or a head says;
    the filters that do so by design are listed."""
    for name in losses.names():
        loss, inputs = losses.get(name), inputs_of(name)
        said = [r for r in inputs if REQUESTS[r].provider in ("policy", "reference", "head")]

        def counts(values, loss=loss, inputs=inputs):
            terms = as_terms(loss({**inputs, **values}))
            assert all(term.reduction in REDUCTIONS for term in terms.values())
            return [denominator(term) for term in terms.values()]

        jaxpr = jax.make_jaxpr(counts)({r: inputs[r] for r in said}).jaxpr
        _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        assert any(used) == (name in FILTERS), (name, [r for r, one in zip(sorted(said), used, strict=True) if one])


@pytest.mark.parametrize("reduction", ["tokens", "seq_mean_token_mean", "fixed_len"])
def test_parts_are_averaged_as_if_they_had_equal_lengths(reduction):
    """trl#3021, trl#3138, open-instruct#1161, open-instruct#1498: the mean of the means of micro-batches is not that
    of the batch. Shares under the batch's denominator add up to it; means of means do not."""
    rng = np.random.default_rng(0)
    mask = np.arange(9)[None, None] < np.array([9, 1, 2, 1, 7, 3, 0, 1])[:, None, None]
    whole = Term(jnp.asarray(rng.normal(size=(8, 1, 9)), jnp.float32), jnp.asarray(mask), reduction)
    parts = [Term(whole.values[i:i + 2], whole.weight[i:i + 2], reduction) for i in range(0, 8, 2)]
    total = denominator(whole)
    # All tokens; sequences that have any; those times the longest possible.
    assert float(total) == {"tokens": 24, "seq_mean_token_mean": 7, "fixed_len": 63}[reduction]
    np.testing.assert_allclose(sum(float(reduce_term(p, total)) for p in parts), reduce_term(whole), rtol=1e-6)
    naive = np.mean([float(reduce_term(p)) for p in parts])
    assert abs(naive - float(reduce_term(whole))) > 1e-2


def test_metrics_of_ranks_are_averaged():
    """trl#6380: means of ranks with unequal counts were averaged. Sums and counts are added, then divided once."""
    ranks = [{"kl": (8.0, 4.0)}, {"kl": (0.0, 0.0)}, {"kl": (1.0, 12.0)}]
    assert step.merge_metrics(ranks) == {"kl": 9 / 16}


@pytest.mark.parametrize("count", [1, 3])
def test_kto_on_an_odd_batch(count):
    """trl#1911, trl#1970 (odd batches failed), trl#2153 (the KL estimate needs more than one example), trl#1380,
    trl#1402, trl#2554, LlamaFactory#7509: three prompts work, every prompt with another's completion, each used once;
    one prompt is refused with a message."""
    some = rows(count)
    if count == 1:
        with pytest.raises(ConfigError, match="1 record.*at least 2"):
            data.mismatched(some)
        return
    other = data.mismatched(some)
    for record, swapped in zip(some, other, strict=True):
        np.testing.assert_array_equal(record.prompt, swapped.prompt)
        assert swapped.completions is not record.completions
    assert {id(r.completions) for r in other} == {id(r.completions) for r in some}
    rng = np.random.default_rng(0)
    shape = (count, 2)
    inputs = {"logps": -rng.uniform(1, 9, shape), "ref_logps": -rng.uniform(1, 9, shape),
              "kl_logps": -rng.uniform(1, 9, shape), "kl_ref_logps": -rng.uniform(5, 13, shape),
              "labels": np.array([[1, 0]] * count), "valid": np.ones(shape, bool)}
    loss = losses.get("kto")
    value, gradient = jax.value_and_grad(lambda x: reduce_terms(loss({**asked, "logps": x}))[0])(
        (asked := {n: jnp.asarray(v, jnp.float32 if v.dtype != bool else bool) for n, v in inputs.items()})["logps"])
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.all(np.asarray(gradient) != 0)
    single = losses.get("kto")({**asked, "valid": asked["valid"].at[2, 1].set(False)})
    assert np.isfinite(float(reduce_terms(single)[0]))


def test_a_kl_is_negative():
    """trl#235, trl#925, trl#1161: estimates of a KL from samples went below 0 and alarmed. What is reported is the sum
    over the vocabulary, which is not negative beyond rounding, in any dtype."""
    rng = np.random.default_rng(0)
    targets = jnp.zeros((2, 2, 5), jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        draw = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)
        found = head_stats(draw(2, 2, 5, 4), Head(draw(32, 4)), targets, other=(draw(2, 2, 5, 4), Head(draw(32, 4))),
                           want=("kl_other_policy", "kl_policy_other"))
        assert all(float(v.min()) > 0 for v in found.values())
        same, head = draw(2, 2, 5, 4), Head(draw(32, 4))
        zero = head_stats(same, head, targets, other=(same, head), want=("kl_other_policy", "kl_policy_other"))
        assert all(float(jnp.abs(v).max()) < 1e-6 for v in zero.values())


def test_scores_depend_on_the_batch_and_its_padding(params):
    """reward-bench#137, trl#6952: a reward read beside more padding, or in another batch, was another one."""
    some = rows(4)
    wanted = ("logps", "token_logps", "rewards")
    compute = jax.jit(lambda batch: step.compute(SPEC, params, None, batch, wanted))
    narrow = jax.device_get(compute(data.padded(some, K=2, T=12, L=8, pad_id=0)))
    wide = jax.device_get(compute(data.padded(some[2:], K=2, T=24, L=8, pad_id=7)))
    for name in wanted:
        np.testing.assert_allclose(wide[name], narrow[name][2:], rtol=1e-5, atol=2e-5, err_msg=name)
        assert np.abs(narrow[name]).max() > 0.1


def test_a_reward_stands_on_a_pad():
    """trl#3750: PPO put the reward on the pad. Where the pad is the end token, the reward is read at the last scored
    token, the first end token, and at no pad behind it."""
    some = [data.token_record("a", [5, 6], [[7, 8, 2], [9, 2]], eos_ids=(2,))]
    row, col = last_token_positions(data.padded(some, K=2, T=9, L=4, pad_id=2).streams["pair"])
    assert np.asarray(row).tolist() == [[0, 1]] and np.asarray(col).tolist() == [[4, 3]]


def test_the_log_prob_is_that_of_another_token(params):
    """NeMo-RL#3297: targets were shifted by one. Scoring a completion with one token replaced moves the log-probs of
    that token and of those behind it, and of none before."""
    record = data.token_record("a", [5, 6], [[7, 8, 9, 10, 2]] * 2, eos_ids=(2,))
    changed = dataclasses.replace(record, completions=(record.completions[0], np.asarray([7, 8, 11, 10, 2], np.int32)))
    batch = data.padded([changed], K=2, T=8, L=5, pad_id=0)
    logps = np.asarray(step.compute(SPEC, params, None, batch, ("token_logps",))["token_logps"])[0]
    apart = np.abs(logps[0] - logps[1])
    assert (apart[:2] == 0).all() and (apart[2:] > 1e-6).all()
    hidden = models.forward(CONFIG, params["model"], *(np.asarray(a, np.int32) for a in (
        [[5, 6, 7, 8, 9, 10]], [[1] * 6], [[1] * 6], [list(range(6))])))
    table = jax.nn.log_softmax(models.logits(CONFIG, params["model"], hidden))[0]
    np.testing.assert_allclose(logps[0], [table[1 + i, t] for i, t in enumerate([7, 8, 9, 10, 2])], atol=1e-5)


def test_each_kl_has_the_gradient_of_its_definition():
    """NeMo-RL#2506, NeMo-RL#2958 (the backward pass of a KL was wrong): finite differences in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
        hidden, weight, towards = draw(1, 1, 3, 4), draw(9, 4), draw(9, 4)
        other, targets = (draw(1, 1, 3, 4), Head(draw(9, 4))), jnp.asarray([[[1, 8, 0]]])
        for name in ("kl_other_policy", "kl_policy_other", "entropy", "log_sum_sq", "logp"):
            of = lambda w, name=name: head_stats(hidden, Head(w), targets, want=(name,), other=other)[name].sum()
            slope = (of(weight + 1e-5 * towards) - of(weight - 1e-5 * towards)) / 2e-5
            np.testing.assert_allclose(jnp.vdot(jax.grad(of)(weight), towards), slope, rtol=1e-7, err_msg=name)


STATEFUL = [n for n in losses.names() if losses.get(n).info.init_state]


@pytest.mark.parametrize("name", STATEFUL)
def test_an_evaluation_moves_the_running_state(name, params):
    """Of the family of trl#5079 (rewards overwritten by a later step): an evaluation hands on no state at all, and the
    next value of a loss with running statistics is the same after it, to the bit, whatever it was evaluated on."""
    loss = losses.get(name)
    heads = models.init_heads(loss.requests, CONFIG.hidden_size, CONFIG.vocab_size, jax.random.key(2))
    batch = data.padded(rows(4), K=2, T=12, L=8, pad_id=0, extra={"mismatched": data.mismatched(rows(4))})
    brought = {r: np.ones((4, 2), np.float32) for r in loss.requests
               if REQUESTS[r].provider == "data" and REQUESTS[r].axes == "BK"} | dict(batch.data)
    batch = dataclasses.replace(batch, data=brought)
    out = jax.eval_shape(step.make_evaluate(SPEC, loss), params | heads, params, batch, {}, jax.random.key(0),
                         loss.init_state())
    assert "loss" in out[0] and not {"state", "new_state"} & {*out[0], *out[1]}
    inputs, before = inputs_of(name), loss.init_state()
    first = reduce_terms(loss(inputs))[0]
    loss(inputs_of(name, seed=9))  # what an evaluation does
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), loss.init_state(), before))
    np.testing.assert_array_equal(reduce_terms(loss(inputs))[0], first)


def test_evaluating_more_often_changes_the_training(tmp_path):
    """Of the family of trl#5079: a run of a loss with running statistics that evaluates after every step trains as one
    that evaluates at its ends only, to the bit."""
    pairs = [{"prompt": "tom was at the park .", "chosen": " he smiled" + " again" * (i % 3) + " .",
              "rejected": " he cried" + " again" * (i % 2) + " ."} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    found = []
    for often in (1, 100):
        config = configs.base(tokenizer="builtin:stories", stages=("method",))
        config.model = configs.model_section(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
                                             num_kv_heads=1, head_dim=8, max_positions=64)
        config.method = configs.train_stage(
            "beta_dpo", data=dict(path=str(tmp_path / "pairs.jsonl"), on_identical="keep"), steps=3, batch_size=4,
            log_every=1, eval_every=often, checkpoint_every=100, optim=dict(name="sgd", learning_rate=0.5))
        result = train.run(config, tmp_path / str(often), console=Console(file=io.StringIO(), width=160))
        rows = metrics.read_metrics(tmp_path / str(often), split="train")
        found.append((result["stages"]["method"]["fingerprint"],
                      [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]))
    assert len(found[0][1]) == 3 and found[0] == found[1]
