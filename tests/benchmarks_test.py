"""The side-by-side benchmarks: our side at toy size, the parity gate, and the page that is written from their files."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from alignax.types import DataError

pytestmark = pytest.mark.slow


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_pairs_come_back_as_they_were(scripts, tmp_path):
    wire = scripts("wire")
    pairs = [([1], [4, 5, 2], [6, 2]), ([7, 8, 9], [2], [3, 4, 5, 2])]
    wire.write_pairs(tmp_path / "pairs.npz", pairs)
    assert [tuple(map(list, pair)) for pair in wire.read_pairs(tmp_path / "pairs.npz")] == pairs


def test_the_gate_refuses_what_differs(scripts):
    gate = scripts("common").gate
    assert gate({"a": [-10.0, -2000.0], "b": [-10.00005, -2000.0004]}, 1e-4, "log-probs")["b"] < 5e-4
    with pytest.raises(DataError, match="log-probs of b differ from those of a by 2.00e-04"):
        gate({"a": [-10.0], "b": [-10.0002]}, 1e-4, "log-probs")
    with pytest.raises(DataError):
        gate({"a": [-10.0], "b": [float("nan")]}, 1e-4, "log-probs")


def test_an_update_is_measured_and_absent_peers_are_named(scripts, tmp_path):
    arguments = ["--quick", "--json", str(tmp_path / "dpo_step.json"), "--only",
                 "alignax, frozen reference;alignax, shared prefix, precomputed;TRL, fp32"]
    result = scripts("dpo_step").main(arguments, quiet())
    assert json.loads((tmp_path / "dpo_step.json").read_text())["tables"] == result["tables"]
    assert [row[0] for row in result["tables"][0]["rows"]] == ["alignax, frozen reference",
                                                               "alignax, shared prefix, precomputed"]
    assert result["could_not_run"] == {"TRL, fp32": "no python executable was given for it"}
    parity = result["data"]["parity"]
    assert set(parity) == {"log_probs", "first_loss", "later_losses"}
    assert max(parity["log_probs"].values()) < 1e-3
    measured = result["data"]["measured"]["alignax, frozen reference"]
    assert len(measured["rounds"]) == 2 and min(measured["rounds"]) > 0 and measured["peak"] > 1e7
    page = scripts("page").page(tmp_path)
    assert "TRL, fp32 (no python executable was given for it)" in page
    assert "| alignax, frozen reference |" in page and "Toy sizes" in page
    assert "## Not measured yet" in page and "`generate.py`" in page and "`dpo_step.py`." not in page


def test_samples_are_checked_against_the_model(scripts, tmp_path):
    import jax
    import jax.numpy as jnp

    from alignax import models, rollout

    generate, common = scripts("generate"), scripts("common")
    result = generate.main(["--quick", "--json", str(tmp_path / "generate.json")], quiet())
    assert [row[:2] for row in result["tables"][0]["rows"]] == [["2 equal", "alignax"], ["4 skewed", "alignax"]]
    assert result["data"]["measured"]["2 equal"]["alignax"]["tokens"] == [32, 32]
    common.make_model(tmp_path / "model", common.TOY)
    config, params = models.load(tmp_path / "model")
    prompts = np.random.default_rng(0).integers(3, 96, (8, 4)).astype(np.int32)
    sampled = rollout.generate(config, params, prompts, np.ones((8, 4), bool), jnp.arange(8, dtype=jnp.uint32),
                               jax.random.key(0), max_new_tokens=64, temperature=0.2)
    mean, error = generate.law(tmp_path / "model", prompts.tolist(), np.asarray(sampled.tokens)[:, 0].tolist())
    assert mean < -5 * error, "a wrong temperature has to be seen"


def test_every_table_of_memory_and_losses_is_there(scripts, tmp_path):
    memory = scripts("memory").main(["--quick", "--json", str(tmp_path / "memory.json")], quiet())
    assert [row[0] for row in memory["tables"][1]["rows"]] == ["simpo"]
    by_vocabulary = memory["data"]["by_vocabulary"]["none"]
    assert by_vocabulary[512]["ours"]["states"] > by_vocabulary[64]["ours"]["states"]
    losses = scripts("losses").main(["--quick", "--json", str(tmp_path / "losses.json")], quiet())
    tables = {row[0]: (table["title"], row) for table in losses["tables"] for row in table["rows"]}
    assert tables.keys() == {"simpo", "orpo", "kto"} and losses["data"]["flops"].keys() == {"dpo", *tables}
    assert all("without a reference" in tables[name][0] for name in ("simpo", "orpo"))
    # KTO runs policy and reference forward once more, on the mismatched completions: 6 passes instead of 4.
    assert "declare" in tables["kto"][0] and tables["kto"][1][4] == "1.50"
    assert losses["data"]["flops"]["kto"] > losses["data"]["flops"]["dpo"] > losses["data"]["flops"]["simpo"]
