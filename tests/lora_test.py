"""LoRA through the step and the loop: the base stays, the reference is the base, and a finished stage can be used."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import configs, context, data, losses, models, step, train
from alignax.types import ConfigError

CONFIG = models.DecoderConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, max_positions=64)
LORA = models.AdapterConfig(rank=2, alpha=4.0, targets=("attention/query", "mlp/down"))
SPEC = step.ModelSpec(CONFIG, adapters=LORA)


@pytest.fixture(scope="module")
def base():
    return {"model": models.init_params(CONFIG, jax.random.key(0))}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    records = [data.token_record(str(i), rng.integers(3, 40, 4), (rng.integers(3, 40, 6), rng.integers(3, 40, 5)))
               for i in range(4)]
    return data.padded(records, K=2, T=16, L=8, pad_id=0)


def adapters_of(base, *, apart: bool):
    tree = models.init_adapters(base["model"], LORA, jax.random.key(1))
    if apart:
        leaves, treedef = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        tree = treedef.unflatten([a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    return {"adapters": tree}


def updated(base, batch, params, accumulation=1):
    loss, optimizer = losses.get("dpo", beta=0.5), optax.sgd(0.1)
    state = step.TrainState(jnp.int32(0), params, optimizer.init(params), loss.init_state())
    update = jax.jit(step.make_update(SPEC, loss, optimizer, accumulation=accumulation))
    return update(state, base, batch, {}, jax.random.key(0), base)


def test_at_the_start_every_log_ratio_is_zero(base, batch):
    """A fresh adapter adds exactly nothing, so the loss is log 2 (LLaMA-Factory#8459, marin#4556)."""
    arrays = step.compute(SPEC, base | adapters_of(base, apart=False), base, batch, ("token_logps", "ref_token_logps"))
    np.testing.assert_array_equal(arrays["token_logps"], arrays["ref_token_logps"])
    _, metrics = updated(base, batch, adapters_of(base, apart=False))
    assert step.merge_metrics([metrics])["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_only_the_adapters_move(base, batch):
    """The state holds nothing else, and its update is the gradient through the merged weights."""
    start = adapters_of(base, apart=True)
    state, metrics = updated(base, batch, start)
    assert state.params.keys() == {"adapters"}

    def merged_loss(tree):
        merged = {"model": models.merge(base["model"], tree["adapters"], LORA)}
        inputs = step.compute(step.ModelSpec(CONFIG), merged, base, batch, ("logps", "ref_logps"))
        return losses.get("dpo", beta=0.5)(inputs).mean()

    value, gradient = jax.value_and_grad(merged_loss)(start)
    assert step.merge_metrics([metrics])["loss"] == pytest.approx(float(value), abs=1e-5)
    for new, old, g in zip(*map(jax.tree.leaves, (state.params, start, gradient)), strict=True):
        np.testing.assert_allclose(new, old - 0.1 * g, atol=2e-5)


def test_accumulation_is_exact(base, batch):
    start = adapters_of(base, apart=True)
    whole, parts = updated(base, batch, start)[0], updated(base, batch, start, accumulation=2)[0]
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """sft of all parameters, then DPO of adapters, then the evaluation of both."""
    config = configs.embedded_run("dpo", tiny=True, lora=dict(rank=2), reference="adapter_off")
    folder = tmp_path_factory.mktemp("lora") / "run"
    return config, folder, train.run(config, folder)


@pytest.mark.slow
def test_a_run_stores_adapters_only(finished):
    config, folder, summary = finished
    stage = folder / "stages" / "method"
    assert not (stage / "params").exists() and (stage / "adapters").exists()
    assert json.loads((stage / "adapters.json").read_text())["base"] == "sft"
    assert "win_rate" in summary
    evals = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in evals if r["stage"] == "method" and r["step"] == 0 and r["split"].startswith("eval"))
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == 0.0


@pytest.mark.slow
def test_a_finished_stage_is_its_base_with_the_adapters_merged(finished):
    config, folder, _ = finished
    tokenizer = context.load_tokenizer(config.tokenizer, "")
    _, initial = context.load_model(config.model.to_dict(), vocab_size=tokenizer.vocab_size, seed=config.seed)
    before = context.stage_params(folder, "sft", initial)["model"]
    after = context.stage_params(folder, "method", initial)["model"]
    np.testing.assert_array_equal(before["embedding"], after["embedding"])
    moved = np.abs(before["layers"]["attention"]["query"] - after["layers"]["attention"]["query"]).max()
    assert moved > 0
    assert context.finished_stages(folder, config.stages) == ["sft", "method"]


def test_adapter_off_without_adapters_is_refused(tmp_path):
    config = configs.embedded_run("dpo", tiny=True, reference="adapter_off")
    with pytest.raises(ConfigError, match="needs adapters"):
        train.run(config, tmp_path / "run")


def test_an_unknown_target_is_refused_before_anything_runs(tmp_path):
    config = configs.embedded_run("dpo", tiny=True, lora=dict(rank=2, targets=("attention/quary",)))
    with pytest.raises(ConfigError, match="attention/quary"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_stage_is_exported_merged_and_as_adapters(finished, tmp_path, capsys):
    """`alignax convert` writes the merged model and the adapters alone; the two say the same."""
    from alignax import cli
    from alignax.models import peft_files

    _, folder, _ = finished
    assert cli.main(["convert", "--run", str(folder), "--to-hf", str(tmp_path / "merged")]) == 0
    assert cli.main(["convert", "--run", str(folder), "--stage", "sft", "--to-hf", str(tmp_path / "base")]) == 0
    assert cli.main(["convert", "--run", str(folder), "--to-peft", str(tmp_path / "adapter")]) == 0
    config, base = models.load(tmp_path / "base")
    settings, tree = peft_files.load_peft(tmp_path / "adapter", config)
    merged = models.merge(base, tree, settings)
    for a, b in zip(jax.tree.leaves(models.load(tmp_path / "merged")[1]), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    capsys.readouterr()
    assert cli.main(["convert", "--run", str(folder), "--stage", "sft", "--to-peft", str(tmp_path / "none")]) == 2
    assert "has no adapters" in capsys.readouterr().err
