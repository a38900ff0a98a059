"""R7: stopped or killed at any step, a run resumes to the same bytes; on other devices to the same order and state."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from alignax import checkpoint, configs, context, data, metrics, train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def pairs(path: Path, count: int = 32) -> Path:
    """A file of pairs: the first six words of a story against those of the next."""
    stories = data.story_records(seed=0, split="train", n=count + 1)
    short = [" " + " ".join(s.completions[0].split()[:6]) for s in stories]
    data.write_jsonl(path, [data.Record(id=f"p{i}", prompt=stories[i].prompt, completions=(short[i], short[i + 1]))
                            for i in range(count)])
    return path


def config_of(path: Path, **over):
    """beta_dpo, which keeps a running state, on micro-batches, with a window of the log over several checkpoints."""
    config = configs.base(tokenizer="builtin:stories", stages=("method",))
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=64)
    settings = dict(steps=STEPS, batch_size=8, accumulation=2, log_every=4, checkpoint_every=2, eval_every=3,
                    data=dict(path=str(path), eval_fraction=0.3, eval_records=8))
    config.method = configs.train_stage("beta_dpo", **settings | over)
    return config


def run(config, workdir: Path) -> dict:
    """The stage's result, without timings."""
    result = train.run(config, workdir, console=Console(file=io.StringIO(), width=160))["stages"]["method"]
    return {k: v for k, v in result.items() if k not in ("seconds", "compilations")}


def rows(workdir: Path) -> list[dict]:
    """All rows without the timings."""
    return [{k: v for k, v in r.items() if not k.endswith("_per_second")} for r in metrics.read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, workdir, result) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = config_of(pairs(folder / "pairs.jsonl"))
    return config, folder / "w", run(config, folder / "w")


class Death(Exception):
    """Stands for the end of the process at a chosen line."""


@pytest.mark.parametrize("split, step", [("train", 4), pytest.param("eval", 3, marks=pytest.mark.slow),
                                         pytest.param("eval", 6, marks=pytest.mark.slow)])
def test_death_while_a_number_is_written_changes_nothing(whole, tmp_path, monkeypatch, split, step):
    """In the middle of a window, of an evaluation, and at the end before the last checkpoint is down."""
    config, workdir, result = whole
    write, opened, made = metrics.MetricWriter.write, checkpoint.Checkpoints.__init__, []

    def opens(self, *rest, **more):
        opened(self, *rest, **more)
        made.append(self)

    def dies(self, number, values, **rest):
        write(self, number, values, **rest)
        if number == step and rest.get("split", "train") == split:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricWriter, "write", dies)
        patch.setattr(checkpoint.Checkpoints, "__init__", opens)
        with pytest.raises(Death):
            run(config, tmp_path / "w")
    for saved in made:  # a dead process saves no more; this one's threads go on, and have to be done first
        saved.wait()
    assert run(config, tmp_path / "w") == result
    assert rows(tmp_path / "w") == rows(workdir)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stop_at_any_step_changes_nothing(whole, tmp_path, monkeypatch, step):
    config, workdir, result = whole

    class Stop(context.Stop):
        def __init__(self):
            self.seen = 0

        @property
        def requested(self):
            self.seen += 1
            return self.seen >= step

    with monkeypatch.context() as patch:
        patch.setattr(context, "Stop", Stop)
        with pytest.raises(context.Preempted, match=f"step {step} of {STEPS}"):
            run(config, tmp_path / "w")
    assert run(config, tmp_path / "w") == result
    assert rows(tmp_path / "w") == rows(workdir)


DEVICES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import jax, numpy as np
import orbax.checkpoint as ocp
import test_r7_resume as r7
from alignax import checkpoint, context, sharding, train
from alignax.launch import compilation_cache
compilation_cache()
base = Path(sys.argv[1])
config = r7.config_of(r7.pairs(base / "pairs.jsonl"), accumulation=1, batch_size=8,
                      optim=dict(name="sgd", learning_rate=0.1, clip_norm=0.0))
make_mesh = sharding.make_mesh

class Stop(context.Stop):
    def __init__(self):
        self.seen = 0
    @property
    def requested(self):
        self.seen += 1
        return self.seen >= 3

def on(count, workdir, stop=False):
    sharding.make_mesh = lambda sizes=None, devices=None: make_mesh(sizes, jax.devices()[:count])
    whole, context.Stop = context.Stop, Stop if stop else context.Stop
    try:
        r7.run(config, workdir)
    except context.Preempted:
        assert stop
    finally:
        context.Stop = whole

def state(workdir, step):
    saved = checkpoint.Checkpoints(workdir / "stages/method/checkpoints")
    found = saved._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(),
                                                                 plan=ocp.args.JsonRestore()))
    saved.close()
    flat = {jax.tree_util.keystr(p): np.asarray(v).tolist()
            for p, v in jax.tree_util.tree_flatten_with_path(found["state"])[0]}
    return flat, {k: found["plan"][k] for k in ("plan", "total")}

out = {}
on(1, base / "whole")
out["whole"] = state(base / "whole", r7.STEPS), r7.rows(base / "whole")
for before, after in ((1, 8), (2, 1), (4, 2), (8, 4)):
    workdir = base / f"{before}-{after}"
    on(before, workdir, stop=True)
    middle = state(workdir, 3)
    on(after, workdir)
    out[f"{before}-{after}"] = state(workdir, r7.STEPS), r7.rows(workdir), middle
(base / "out.json").write_text(json.dumps(out))
"""


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """What runs left that were stopped on 1, 2, 4 or 8 simulated devices and resumed on another number."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "moved.py").write_text(textwrap.dedent(DEVICES))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, str(folder / "moved.py"), str(folder), str(Path(__file__).parent)],
                          env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def assert_equal(left, right, where: str) -> None:
    """Whole numbers and words are the same, others to rounding."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b, where)
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5), where
    else:
        assert left == right, where


@pytest.mark.slow
@pytest.mark.parametrize("way", ["1-8", "2-1", "4-2", "8-4"])
def test_another_number_of_devices_gives_the_same_order_and_state(moved, way):
    (state, plan), lines, (middle, position) = moved[way]
    (expected, expected_plan), expected_lines = moved["whole"]
    assert plan == expected_plan and position["plan"]["position"] == 3
    assert_equal(state, expected, way)
    assert_equal(lines, expected_lines, way)
    assert middle != state
