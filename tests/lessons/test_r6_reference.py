"""R6: the reference is an explicit rule (frozen copy, adapters off, precomputed, none), and the loss at the start is
what it has to be: log 2 for DPO.

Each test replays a failure that users of other frameworks reported; the docstring names the thread.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import configs, context, data, losses, models, reference, rollout, step, train
from alignax.models.adapters import scaled
from alignax.types import ConfigError

CONFIG = models.DecoderConfig(vocab_size=24, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, max_positions=64)
LORA = models.AdapterConfig(rank=2, alpha=4.0, targets=("attention/query", "mlp/down"))
SPEC, ADAPTED = step.ModelSpec(CONFIG), step.ModelSpec(CONFIG, adapters=LORA)


@pytest.fixture(scope="module")
def base():
    return {"model": jax.tree.map(lambda a: 3 * a, models.init_params(CONFIG, jax.random.key(0)))}


@pytest.fixture(scope="module")
def fresh(base):
    return {"adapters": models.init_adapters(base["model"], LORA, jax.random.key(1))}


@pytest.fixture(scope="module")
def moved(fresh):
    leaves, treedef = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return treedef.unflatten([a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [data.token_record(str(i), rng.integers(3, 24, 4), (rng.integers(3, 24, 6), rng.integers(3, 24, 5)))
            for i in range(4)]


@pytest.fixture(scope="module")
def batch(rows):
    return data.padded(rows, K=2, T=16, L=8, pad_id=0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def computed(spec, params, ref_params, batch, wanted):
    return step.compute(spec, params, ref_params, batch, wanted)


@functools.lru_cache
def _update(spec, name, accumulation):
    loss = losses.get(name)
    return loss, jax.jit(step.make_update(spec, loss, optax.sgd(0.1), accumulation=accumulation))


def start(spec, params, ref_params, batch, *, name="dpo", frozen=None, accumulation=1):
    """(state after one update, its metrics)."""
    loss, update = _update(spec, name, accumulation)
    state = step.TrainState(jnp.int32(0), params, optax.sgd(0.1).init(params), loss.init_state())
    state, metrics = update(state, ref_params, batch, {}, jax.random.key(0), frozen)
    return state, step.merge_metrics([metrics])


@pytest.mark.parametrize("rule", ["frozen", "adapter_off", "precomputed"])
def test_the_first_loss_is_not_log_2(base, fresh, batch, rule):
    """marin#4556, marin#4637: adapters have to start as nothing added, under every rule."""
    if rule == "frozen":
        _, metrics = start(SPEC, base, base, batch)
    elif rule == "adapter_off":
        _, metrics = start(ADAPTED, fresh, base, batch, frozen=base)
    else:
        sums = computed(SPEC, base, None, batch, ("logps",))["logps"]
        cached = dataclasses.replace(batch, data={**batch.data, "ref_logps": sums})
        _, metrics = start(ADAPTED, fresh, None, cached, frozen=base)
    tolerance = 1e-6 if rule != "precomputed" else 1e-4  # a program of its own rounds differently
    assert metrics["loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert metrics["margin"] == pytest.approx(0, abs=10 * tolerance) and metrics["grad_norm"] > 1e-4


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
def test_policy_and_reference_differ_before_the_first_step(base, fresh, rows, layout):
    """marin#4556: every log-ratio is exactly 0 at the start, token by token, in every layout."""
    laid = data.fill(rows, data.plan_shape(rows, layout, 8), layout, pad_id=0)
    arrays = computed(ADAPTED, base | fresh, base, laid, ("token_logps", "ref_token_logps"))
    np.testing.assert_array_equal(arrays["token_logps"], arrays["ref_token_logps"])
    assert float(np.abs(arrays["token_logps"]).max()) > 0.1


def test_the_reference_carries_the_adapters(base, fresh, moved, batch):
    """LLaMA-Factory#8459, LLaMA-Factory#2087, trl#495, trl#3194: the wrong reference beside adapters. Whatever the
    adapters become, the reference stays the base, and one update changes neither."""
    wanted = ("logps", "ref_logps")
    first = computed(ADAPTED, base | fresh, base, batch, wanted)
    later = computed(ADAPTED, base | moved, base, batch, wanted)
    np.testing.assert_array_equal(first["ref_logps"], later["ref_logps"])
    assert float(np.abs(later["logps"] - later["ref_logps"]).max()) > 1e-2
    before = jax.tree.map(np.asarray, base)
    state, _ = start(ADAPTED, moved, base, batch, frozen=base)
    assert state.params.keys() == {"adapters"}
    jax.tree.map(np.testing.assert_array_equal, before, base)


def test_a_missing_reference_makes_the_loss_reference_free(base, batch):
    """Tunix, `dpo_trainer.py`: `ref_model=None` silently trains another loss."""
    with pytest.raises(KeyError, match="no reference.*ref_logps"):
        step.compute(SPEC, base, None, batch, ("logps", "ref_logps"))
    with pytest.raises(ConfigError, match="'none' cannot supply 'ref_logps'.*frozen, adapter_off, precomputed"):
        reference.check("none", losses.get("dpo").requests)
    with pytest.raises(ConfigError, match="missing|lack.*ref_logps"):
        losses.get("dpo")({"logps": jnp.zeros((2, 2))})


def test_a_reference_that_nothing_reads_is_kept(base):
    """trl#495 and its like: a reference model in memory that the loss has no use for, or a rule that cannot work."""
    with pytest.raises(ConfigError, match="requests nothing of a reference"):
        reference.check("frozen", losses.get("simpo").requests)
    with pytest.raises(ConfigError, match="needs adapters"):
        reference.check("adapter_off", losses.get("dpo").requests)
    with pytest.raises(ConfigError, match="'precomputed' cannot supply 'ref_token_logps'"):
        reference.check("precomputed", losses.get("tdpo").requests, lora=True)
    with pytest.raises(ConfigError, match="'copy' is not a reference rule; allowed: frozen, adapter_off"):
        reference.check("copy", losses.get("dpo").requests)


def test_cached_log_probs_lose_their_rows(base, moved, rows):
    """trl#6043, trl#6348: precomputed sums are those of each record, however batches are cut, and give the same loss
    and update as the reference that runs beside the policy."""
    whole = data.padded(rows, K=2, T=16, L=8, pad_id=0)
    direct = computed(SPEC, base, None, whole, ("logps",))["logps"]
    single = [computed(SPEC, base, None, data.padded([row], K=2, T=16, L=8, pad_id=0), ("logps",))["logps"][0]
              for row in rows]
    np.testing.assert_allclose(np.stack(single), direct, atol=1e-5)
    cached = dataclasses.replace(whole, data={**whole.data, "ref_logps": np.stack(single)})
    (a, one), (b, two) = (start(ADAPTED, moved, ref, laid, frozen=base)
                          for ref, laid in ((base, whole), (None, cached)))
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    for new, old in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)
    parts = start(ADAPTED, moved, None, cached, frozen=base, accumulation=2)[1]
    assert parts["loss"] == pytest.approx(two["loss"], abs=1e-5)  # a cut batch takes its own rows along


def test_samples_of_a_policy_with_adapters_are_garbled(base, moved):
    """EasyDeL#234, EasyDeL#259: the sampler draws from the adapted policy, as merged weights do."""
    prompts, mask = np.asarray([[0, 5, 6], [7, 8, 9]], np.int32), np.asarray([[0, 1, 1], [1, 1, 1]], bool)
    draw = lambda params, **more: jax.device_get(rollout.generate(
        CONFIG, params, prompts, mask, np.arange(2, dtype=np.uint32), jax.random.key(3), num_samples=2,
        max_new_tokens=6, **more))
    adapted = draw(base["model"], adapters=scaled(moved["adapters"], LORA))
    merged = draw(models.merge(base["model"], moved["adapters"], LORA))
    np.testing.assert_array_equal(adapted.tokens, merged.tokens)
    np.testing.assert_allclose(adapted.logps, merged.logps, atol=1e-4)
    assert (draw(base["model"]).tokens != merged.tokens).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step of DPO with adapters and a precomputed reference, from a file."""
    folder = tmp_path_factory.mktemp("run")
    pairs = [{"id": f"r{i}", "prompt": "tom was at the park .", "chosen": " he smiled" + " and ran" * i + " .",
              "rejected": " he cried" + " and fell" * i + " ."} for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = configs.embedded_run("dpo", tiny=True, lora=dict(rank=2), reference="precomputed", batch_size=4, steps=1,
                                  eval_every=1, init="model", data=dict(path=str(folder / "pairs.jsonl"),
                                                                        eval_records=0, eval_fraction=0.0))
    config.stages = ("method",)
    train.run(config, folder / "run")
    return config, folder


@pytest.mark.slow
def test_a_precomputed_reference_with_adapters_is_wrong(run):
    """trl#6403, trl#6348 (precomputing under PEFT or DeepSpeed), open-instruct#1182 (a reduction over buffers of zeros
    would have zeroed cached log-probs): every sum is that of the base, none is 0, and the first loss is log 2."""
    config, folder = run
    with np.load(folder / "run" / "stages" / "method" / "reference.npz") as stored:
        cached = stored["logps"]
    tokenizer = context.load_tokenizer(config.tokenizer, "")
    spec, initial = context.load_model(config.model.to_dict(), vocab_size=tokenizer.vocab_size, seed=config.seed)
    rows = data.tokenize_records(data.read_jsonl(folder / "pairs.jsonl"), tokenizer, data.text_policy(tokenizer),
                                 ledger=data.Ledger())
    laid = data.padded(rows, K=2, T=48, L=32, pad_id=0)
    np.testing.assert_allclose(cached, computed(spec, initial, None, laid, ("logps",))["logps"], atol=1e-3)
    assert (cached < 0).all()
    written = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in written if row["stage"] == "method" and row["step"] == 0)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
