"""Continuous refill where completions are drawn: stages, commands, rollouts under a mesh; the same completions as
without, and what is refused."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from chat_command_test import folder, generate  # noqa: F401  (folder: a fixture)
from train_test import quiet, tiny_base

from alignax import cli, configs, models, sources, train
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

CONFIG = models.DecoderConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, tie_embeddings=False, max_positions=32)
PROMPTS = [np.random.default_rng(0).integers(0, 11, size=n).astype(np.int32) for n in (3, 1, 5, 4, 2)]
SETTINGS = dict(num_samples=3, max_new_tokens=9, eos_ids=(3, 7), pad_id=0, batch_size=4)


@pytest.fixture
def calls(monkeypatch):
    """(lanes, prompts of a batch) of every call of refill."""
    found, own = [], sources.refill

    def refill(config, params, prompts, *arguments, lanes, **settings):
        found.append((lanes, len(prompts)))
        return own(config, params, prompts, *arguments, lanes=lanes, **settings)

    monkeypatch.setattr(sources, "refill", refill)
    return found


@pytest.fixture(scope="module")
def params():
    params = models.init_params(CONFIG, jax.random.key(1))
    return params | {"embedding": params["embedding"] * 25, "head": params["head"] * 15}


@pytest.mark.parametrize("temperature", [0.9, np.array([0.0, 0.7, 1.3, 0.9, 2.0])], ids=["one", "each"])
def test_rollouts_are_those_without_lanes(params, calls, temperature):
    draw = lambda lanes: sources.rollout(CONFIG, params, PROMPTS, range(5), jax.random.key(2), lanes=lanes,
                                         temperature=temperature, **SETTINGS)
    expected, found = draw(0), draw(2)
    assert calls == [(2, 3), (2, 3)]  # two batches of 3 prompts, one of them a repeat, and not 4 with three repeats
    assert len({len(tokens) for row in expected.tokens for tokens in row}) > 3
    np.testing.assert_array_equal(found.reason, expected.reason)
    np.testing.assert_allclose(found.logps, expected.logps, atol=1e-5)
    for name in ("tokens", "token_logps", "behaviour_logps", "kept_mass"):
        for a, b in zip(sum(getattr(found, name), []), sum(getattr(expected, name), []), strict=True):
            np.testing.assert_allclose(a, b, atol=0 if name == "tokens" else 1e-5, err_msg=name)


MESH = """
import jax, numpy as np
import refill_stage_test as t
from alignax import sharding, sources
from alignax.types import ConfigError
from jax.sharding import NamedSharding, PartitionSpec

params = t.models.init_params(t.CONFIG, jax.random.key(1))
mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=2))
placed = jax.device_put({"model": params}, sharding.param_shardings({"model": params}, mesh))["model"]
draw = lambda params, **more: sources.rollout(t.CONFIG, params, t.PROMPTS, range(5), jax.random.key(2), lanes=2,
                                              **t.SETTINGS, **more)
one, many = draw(params), draw(placed)
np.testing.assert_array_equal(one.reason, many.reason)
for a, b in zip(sum(one.tokens, []), sum(many.tokens, []), strict=True):
    np.testing.assert_array_equal(a, b)
np.testing.assert_allclose(one.logps, many.logps, atol=1e-5)
try:
    draw(placed, rows=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
except ConfigError as error:
    print(error)
"""


def test_parameters_may_be_cut_over_devices_and_rows_may_not():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
                                "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", MESH], env=environment, capture_output=True, text=True, timeout=600,
                          cwd=pathlib.Path(__file__).resolve().parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("rollout(lanes=): found 2 beside rows cut over devices, allowed: 0")


def staged(lanes: int):
    """A run that trains two steps, draws pairs, and evaluates."""
    config = tiny_base(("sft", "sample", "evaluate"))
    config.model.max_positions = 128
    config.sft = configs.train_stage("sft", data=dict(max_records=16, eval_records=4), steps=2, batch_size=4)
    config.sample = configs.sample_stage(num_prompts=10, num_samples=3, max_new_tokens=64, batch_size=5, lanes=lanes)
    config.evaluate = configs.evaluate_stage(policies=("sft",), baseline="model", num_prompts=6, max_new_tokens=64,
                                             batch_size=6, examples=0, lanes=lanes)
    return config


def test_stages_with_lanes_write_what_stages_without_do(tmp_path, calls):
    plain = train.run(staged(0), tmp_path / "plain", console=quiet())
    assert not calls
    filled = train.run(staged(4), tmp_path / "filled", console=quiet())
    assert calls == [(4, 5), (4, 5), (4, 6), (4, 6)]  # two batches of the sample stage; baseline and policy
    text = lambda run, name: (tmp_path / run / name).read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text("plain", "stages/sample/pairs.jsonl").splitlines()]
    assert len({len(row[key]) for row in pairs for key in ("chosen_ids", "rejected_ids")}) > 3
    for name in ("stages/sample/pairs.jsonl", "samples.jsonl"):
        assert text("filled", name) == text("plain", name)
    counts = [{k: v for k, v in out["stages"]["sample"].items() if k != "seconds"} for out in (plain, filled)]
    assert counts[0] == counts[1]
    for one, two in zip(*(out["stages"]["evaluate"]["points"] for out in (plain, filled)), strict=True):
        assert two.pop("sampler_trainer_gap") < 1e-3 > one.pop("sampler_trainer_gap")
        assert one == pytest.approx(two)

    # A stage that was killed before it noted its end is drawn again, to the bit.
    (tmp_path / "filled" / "result.json").unlink()
    (tmp_path / "filled" / "stages" / "sample" / "done.json").unlink()
    drawn, _ = text("filled", "stages/sample/pairs.jsonl"), calls.clear()
    train.run(staged(4), tmp_path / "filled", console=quiet())
    assert calls == [(4, 5), (4, 5)] and text("filled", "stages/sample/pairs.jsonl") == drawn
    with pytest.raises(ConfigError, match=r"config.evaluate.lanes: stored 4, given 0; config.sample.lanes: stored 4"):
        train.run(staged(0), tmp_path / "filled", console=quiet())


@pytest.mark.parametrize(("key", "value"), [("lanes", -1), ("lanes", True), ("batch_size", 0), ("num_prompts", 2.5),
                                            ("max_new_tokens", 0)])
@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_counts_are_checked_before_anything_runs(stage, key, value, tmp_path):
    config = staged(0)
    with config.ignore_type():
        config[stage][key] = value
    with pytest.raises(ConfigError, match=f"config.{stage}.{key}={value}; allowed: an integer, [01] or more"):
        train.run(config, tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_generate_and_evaluate_take_lanes(folder, tmp_path, capsys, calls):  # noqa: F811
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"id": n, "prompt": n}) + "\n" for n in ("hello", "a b", "c")))
    common = ["--prompts", str(source), "--samples", "2", "--batch-size", "3", "--top-p", "0.9"]
    for name, more in (("plain", []), ("filled", ["--lanes", "2"])):
        assert generate(folder, *common, *more, "--out", str(tmp_path / name)) == 0
    assert calls == [(2, 3)]
    plain, filled = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                     for name in ("plain", "filled"))
    for one, two in zip(plain, filled, strict=True):
        assert one == {k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in two.items()}
    scored = ["evaluate", str(source), "--model", str(folder)]
    assert cli.main([*scored, "--generate", "--lanes", "2", "--batch-size", "3", "--max-new-tokens", "6"]) == 0
    assert calls == [(2, 3)] * 2
    capsys.readouterr()
    for arguments, message in ((["generate", "--model", str(folder), "--prompt", "a", "--lanes", "-2"], "--lanes=-2"),
                               ([*scored, "--generate", "--lanes", "-2"], "--lanes=-2; allowed: 0 or more"),
                               ([*scored, "--lanes", "2"], "--lanes: goes with --generate")):
        assert cli.main(arguments) == 2 and message in capsys.readouterr().err
