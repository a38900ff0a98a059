"""Every config of experiments/methods runs to its end at toy size: two real steps of its loss, then the evaluation.

The stages that all of them begin with run once, and each run finds them done. Strengths travel as arguments, so that
methods of one structure share a compilation through the cache.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import jax
import pytest
from rich.console import Console

from alignax import configs, launch, train
from alignax import metrics as metrics_lib
from alignax.diagnostics import figures

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.py"))
START = ("sft", "sample")


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Programs that run twice need no optimising, and curves of two points no drawing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("training_curves", "displacement"):
            patch.setattr(figures, name, lambda *_, **__: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def load(method: str):
    return launch.load_config(f"{FOLDER / method}.py:tiny")


def run(config, workdir: Path) -> dict:
    return train.run(config, workdir, console=Console(file=io.StringIO(), width=160))


def plain(config) -> dict:
    """The config as a run stores it."""
    return json.loads(json.dumps(config.to_dict(), default=list))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[dict, Path]:
    """(stored config, folder) of a run of the stages that come before the method."""
    config = load("dpo")
    config.stages = START
    workdir = tmp_path_factory.mktemp("start") / "w"
    run(config, workdir)
    return plain(config), workdir


def share(config, start: tuple[dict, Path], workdir: Path) -> None:
    """Makes `workdir` a run of `config` whose first stages are done, where they are those of `start`."""
    mine, (theirs, done) = plain(config), start
    alike = all(mine.get(key) == theirs.get(key) for key in (*START, "seed", "tokenizer", "model", "mesh", "text"))
    if tuple(mine["stages"][:len(START)]) != START or not alike:
        return
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(mine))
    for stage in START:
        shutil.copytree(done / "stages" / stage, workdir / "stages" / stage)


@pytest.mark.parametrize("method", METHODS)
def test_config_runs_to_its_end(method, start, tmp_path):
    config, workdir = load(method), tmp_path / "w"
    share(config, start, workdir)
    result = run(config, workdir)
    stage = result["stages"]["method"]
    assert stage["steps"] == config.method.steps >= 2 and stage["compilations"] == 1
    assert math.isfinite(stage["train"]["loss"]) and math.isfinite(stage["eval"]["loss"])
    if "evaluate" in config.stages:
        assert 0 <= result["win_rate"] <= 1 and math.isfinite(result["kl_on_policy"])
    shutil.rmtree(workdir)


def test_a_weighted_sum_runs_with_state_and_micro_batches(start, tmp_path):
    config, workdir = configs.embedded_run("dpo+0.2*sft+0.5*beta_dpo", tiny=True, accumulation=2), tmp_path / "w"
    config.method.loss.dpo.beta = 0.3
    share(config, start, workdir)
    assert math.isfinite(run(config, workdir)["stages"]["method"]["train"]["loss"])
    first = metrics_lib.read_metrics(workdir, stage="method", split="train")[0]
    assert first["loss_dpo.loss"] == pytest.approx(math.log(2), abs=1e-5)
    # beta-DPO starts at log 2 too, and its part is scaled by 0.5.
    assert first["loss"] == pytest.approx(1.5 * math.log(2) + 0.2 * first["loss_sft.nll"], abs=1e-4)
    assert 0 < first["loss_sft.nll"] < -first["logp_chosen"] and "beta_dpo.kept" in first
