"""The run loop: what a run leaves behind, and that stopping, killing, caching or cutting batches changes no number."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alignax import checkpoint, configs, context, data, train
from alignax import metrics as metrics_lib
from alignax.types import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


def quiet() -> Console:
    """A console that keeps what is printed to itself."""
    return Console(file=io.StringIO(), width=160)


def story_pairs(path: Path, count: int, split: str) -> Path:
    """A file of pairs: the first ten words of a story as chosen, of the next story as rejected."""
    stories = data.story_records(seed=0, split=split, n=count + 1)
    short = [" ".join(s.completions[0].split()[:10]) for s in stories]
    data.write_jsonl(path, [data.Record(id=f"{split}-{i}", prompt=stories[i].prompt,
                                        completions=(" " + short[i], " " + short[i + 1])) for i in range(count)])
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    """(48 training pairs, 8 evaluation pairs)."""
    folder = tmp_path_factory.mktemp("pairs")
    return story_pairs(folder / "train.jsonl", 48, "train"), story_pairs(folder / "eval.jsonl", 8, "eval")


def tiny_base(stages: tuple[str, ...]):
    """A run of a decoder of width 16 on the stories' vocabulary."""
    config = configs.base(tokenizer="builtin:stories", stages=stages)
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=64, unroll=2)
    return config


def pair_config(pairs, loss: str = "dpo", *, optim=None, **over):
    """One stage of `loss` on the pairs, every step logged."""
    config = tiny_base(("method",))
    settings = dict(steps=STEPS, batch_size=8, log_every=1, checkpoint_every=2, eval_every=3)
    config.method = configs.train_stage(
        loss, data=dict(path=str(pairs[0]), eval_path=str(pairs[1]), eval_records=8, max_records=48),
        optim=dict(name="adamw", learning_rate=3e-3) | dict(optim or {}), **settings | over)
    return config


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    """finished(loss, **over) -> (workdir, result) of an uninterrupted run; equal arguments share one run."""
    known = {}

    def get(loss: str = "dpo", **over):
        mark = json.dumps([loss, over], sort_keys=True)
        if mark not in known:
            workdir = tmp_path_factory.mktemp("run") / "w"
            known[mark] = workdir, train.run(pair_config(pairs, loss, **over), workdir, console=quiet())
        return known[mark]

    return get


def fingerprint(result: dict, stage: str = "method") -> str:
    return result["stages"][stage]["fingerprint"]


def final_params(workdir: Path) -> dict[str, np.ndarray]:
    """The stored parameters of the stage, flat, in the tree that the model makes."""
    config = json.loads((workdir / "config.json").read_text())
    tokenizer = context.load_tokenizer(config["tokenizer"], "")
    _, initial = context.load_model(config["model"], vocab_size=tokenizer.vocab_size, seed=config["seed"])
    import jax

    tree = checkpoint.load_tree(workdir / "stages" / "method" / "params", initial)
    return {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


def rows(workdir: Path, split: str = "train") -> list[dict]:
    """The rows of the stage without the timings, which differ from run to run."""
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")}
            for row in metrics_lib.read_metrics(workdir, stage="method", split=split)]


def contents(workdir: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time of change and bytes."""
    return {str(p.relative_to(workdir)): (p.stat().st_mtime_ns, p.read_bytes())
            for p in sorted(workdir.rglob("*")) if p.is_file()}


def assert_close_rows(left: list[dict], right: list[dict], tolerance: float) -> None:
    """Same steps, same keys, values within a relative and absolute tolerance."""
    assert [r["step"] for r in left] == [r["step"] for r in right]
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"stage", "split", "step"}:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)


class StopAt(context.Stop):
    """A Stop whose flag goes up at the n-th time that the loop looks, as if SIGTERM had come in step n."""

    looks = 0

    def __init__(self):
        self.seen = 0

    @property
    def requested(self):
        self.seen += 1
        return self.seen >= self.looks


def stop_at(monkeypatch, step: int) -> None:
    """The next runs are stopped in step `step`."""
    monkeypatch.setattr(context, "Stop", type("StopNow", (StopAt,), {"looks": step}))


# What a run leaves behind


def test_run_leaves_records_of_itself(finished):
    workdir, result = finished()
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["method"]["loss"]["name"] == "dpo" and stored["method"]["steps"] == STEPS
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["devices"]
    assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["stages"]["method"]["steps"] == STEPS and result["stages"]["method"]["compilations"] == 1
    assert (workdir / "stages" / "method" / "params").is_dir()
    assert list((workdir / "tensorboard" / "method").glob("events*"))
    assert list((workdir / "figures").glob("*.png"))
    assert len(fingerprint(result)) == 64
    assert not list(workdir.rglob("*.part*"))


def test_metrics_hold_every_step_once(finished):
    workdir, result = finished()
    assert [r["step"] for r in rows(workdir)] == list(range(1, STEPS + 1))
    assert [r["step"] for r in rows(workdir, "eval")] == [0, 3, 6]
    assert result["stages"]["method"]["eval"]["loss"] == pytest.approx(rows(workdir, "eval")[-1]["loss"])
    assert all(math.isfinite(v) for r in rows(workdir) for v in r.values() if isinstance(v, float))


def test_stored_params_are_those_of_the_fingerprint(finished):
    workdir, result = finished()
    config = json.loads((workdir / "config.json").read_text())
    vocab = context.load_tokenizer(config["tokenizer"], "").vocab_size
    _, initial = context.load_model(config["model"], vocab_size=vocab, seed=config["seed"])
    stored = checkpoint.load_tree(workdir / "stages" / "method" / "params", initial)
    assert context.fingerprint(stored["model"]) == fingerprint(result)
    assert context.fingerprint(initial["model"]) != fingerprint(result)


def test_finished_run_ends_at_once(finished, pairs):
    workdir, result = finished()
    before = contents(workdir)
    began = time.monotonic()
    again = train.run(pair_config(pairs), workdir, console=quiet())
    assert time.monotonic() - began < 2
    assert again == json.loads(json.dumps(result))
    assert contents(workdir) == before


def test_same_config_gives_the_same_bytes(finished, pairs, tmp_path):
    workdir, result = finished()
    again = train.run(pair_config(pairs), tmp_path / "w", console=quiet())
    assert fingerprint(again) == fingerprint(result)
    assert rows(tmp_path / "w") == rows(workdir)


def test_workdir_of_another_config_is_refused(finished, pairs):
    workdir, _ = finished()
    before = contents(workdir)
    other = pair_config(pairs)
    other.method.optim.learning_rate = 1e-5
    with pytest.raises(ConfigError, match=r"config\.method\.optim\.learning_rate: stored 0.003, given 1e-05"):
        train.run(other, workdir, console=quiet())
    assert contents(workdir) == before


# Stopping and dying


@pytest.mark.parametrize("step", [3, 4])
def test_stopped_run_resumes_to_the_same_bytes(finished, pairs, tmp_path, monkeypatch, step):
    workdir, result = finished()
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(context.Preempted, match=f"step {step} of {STEPS} in method"):
            train.run(pair_config(pairs), tmp_path / "w", console=quiet())
    assert not (tmp_path / "w" / "result.json").exists()
    again = train.run(pair_config(pairs), tmp_path / "w", console=quiet())
    assert fingerprint(again) == fingerprint(result)
    assert rows(tmp_path / "w") == rows(workdir)
    assert rows(tmp_path / "w", "eval") == rows(workdir, "eval")


class Crash(Exception):
    """Stands for the end of the process at a chosen line."""


def test_death_before_the_first_checkpoint(finished, pairs, tmp_path, monkeypatch):
    workdir, result = finished()
    write = metrics_lib.MetricWriter.write

    def dies_at_one(self, step, values, **rest):
        write(self, step, values, **rest)
        if step == 1:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(metrics_lib.MetricWriter, "write", dies_at_one)
        with pytest.raises(Crash):
            train.run(pair_config(pairs), tmp_path / "w", console=quiet())
    again = train.run(pair_config(pairs), tmp_path / "w", console=quiet())
    assert fingerprint(again) == fingerprint(result)
    assert rows(tmp_path / "w") == rows(workdir)
    assert rows(tmp_path / "w", "eval") == rows(workdir, "eval")


def test_death_between_last_checkpoint_and_parameters(finished, pairs, tmp_path, monkeypatch):
    _, result = finished()

    def dies(folder, tree):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tree", dies)
        with pytest.raises(Crash):
            train.run(pair_config(pairs), tmp_path / "w", console=quiet())
    again = train.run(pair_config(pairs), tmp_path / "w", console=quiet())

    def timeless(r):
        return {k: v for k, v in r["stages"]["method"].items() if k not in ("seconds", "compilations")}

    assert timeless(again) == timeless(result)


def test_torn_metrics_line_and_claim_are_survived(finished, pairs, tmp_path, monkeypatch):
    workdir, result = finished()
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "config.json.part").write_text('{"half')  # killed while the run claimed its folder
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(context.Preempted):
            train.run(pair_config(pairs), folder, console=quiet())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "method", "split": "tr')
    again = train.run(pair_config(pairs), folder, console=quiet())
    assert fingerprint(again) == fingerprint(result)
    assert rows(folder) == rows(workdir)


# Reference rules, layouts, accumulation


def test_first_step_of_dpo_is_log_two(finished):
    workdir, _ = finished()
    first = rows(workdir)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0 and first["accuracy"] == 0.5
    assert rows(workdir)[-1]["loss"] != first["loss"]


def test_precomputed_reference_equals_frozen(finished):
    frozen, _ = finished()
    cached, _ = finished(reference="precomputed")
    assert_close_rows(rows(cached), rows(frozen), 1e-4)
    # Before the first update every margin is 0 but for rounding, and accuracy counts the signs of that.
    kept = lambda folder: [{k: v for k, v in r.items() if k != "kl_at_data_prefixes" and (k, r["step"]) != (
        "accuracy", 0)} for r in rows(folder, "eval")]
    assert_close_rows(kept(cached), kept(frozen), 1e-4)


def test_stale_precomputed_reference_is_refused(pairs, tmp_path, monkeypatch):
    config = pair_config(pairs, reference="precomputed")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(context.Preempted):
            train.run(config, tmp_path / "w", console=quiet())
    path = tmp_path / "w" / "stages" / "method" / "reference.npz"
    with np.load(path) as stored:
        logps = stored["logps"]
    np.savez(path, logps=logps, mark="of another model")
    with pytest.raises(ConfigError, match=r"reference\.npz: .* another model or other data"):
        train.run(config, tmp_path / "w", console=quiet())


def test_shared_prefix_layout_equals_padded(finished):
    padded, _ = finished()
    shared_prefix, _ = finished(layout="shared_prefix")
    assert_close_rows(rows(shared_prefix)[:1], rows(padded)[:1], 1e-5)
    losses = [[r["loss"] for r in rows(w)] for w in (padded, shared_prefix)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_accumulation_changes_no_parameter(finished, loss):
    settings = dict(optim=dict(name="sgd", learning_rate=0.1), checkpoint_every=100, eval_every=100)
    whole, _ = finished(loss, **settings)
    parts, _ = finished(loss, accumulation=4, **settings)
    left, right = final_params(whole), final_params(parts)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(right[name], left[name], rtol=0, atol=1e-5, err_msg=name)
    assert rows(whole)[-1]["loss"] != rows(whole)[0]["loss"]
    assert_close_rows(rows(parts)[:1], rows(whole)[:1], 1e-5)


def test_evaluation_leaves_the_loss_state_alone(finished):
    often, left = finished("beta_dpo", eval_every=1, checkpoint_every=100)
    never, right = finished("beta_dpo", eval_every=100, checkpoint_every=100)
    assert len(rows(often, "eval")) == STEPS + 1 and len(rows(never, "eval")) == 2
    assert fingerprint(left) == fingerprint(right)
    assert rows(often) == rows(never)


# Refusals


def test_non_finite_step_names_step_records_and_checkpoint(pairs, tmp_path):
    config = pair_config(pairs, optim=dict(name="sgd", learning_rate=1e30, clip_norm=0.0), checkpoint_every=1)
    with pytest.raises(FloatingPointError) as caught:
        train.run(config, tmp_path / "w", console=quiet())
    message = str(caught.value)
    assert message.startswith("method: step 2 is not finite")
    order = data.Plan(48, 8, 0).batch_indices(1)[:4]
    assert str([f"train-{i}" for i in order]) in message
    assert "last good checkpoint: step 1 in" in message and (tmp_path / "w/stages/method/checkpoints/1").is_dir()
    assert not (tmp_path / "w" / "result.json").exists()


@pytest.mark.parametrize("change, error, words", [
    (lambda c: c.method.update(reference="none"), ConfigError, r"config\.method\.reference='none'.*ref_logps"),
    (lambda c: c.method.data.update(path="builtin:stories"), DataError, "compares completions"),
    (lambda c: c.method.data.update(path="builtin:songs"), ConfigError, "allowed: builtin:stories"),
    (lambda c: c.method.data.update(path="stage:nowhere"), ConfigError, r"stage:nowhere.*earlier sample stage"),
    (lambda c: c.method.update(batch_size=64), DataError, r"48 records are fewer than config\.method\.batch_size=64"),
    (lambda c: c.method.optim.update(name="adan"), ConfigError, r"optim\.name='adan'; allowed: adamw"),
    (lambda c: c.method.optim.options.update(beta1=0.9), ConfigError, r"optim\.beta1 is not an option of adamw"),
    (lambda c: c.method.optim.update(warmup_steps=50), ConfigError, r"optim\.warmup_steps=50"),
    (lambda c: (c.method.update(reference="precomputed"), setattr(c.method, "loss", configs.loss_section("tdpo"))),
     ConfigError, r"cannot supply"),
], ids=["no-reference", "no-pairs", "builtin", "no-stage", "batch", "optimizer", "option", "warmup", "precomputed"])
def test_what_cannot_work_is_refused_before_anything_is_written(pairs, tmp_path, change, error, words):
    config = pair_config(pairs)
    change(config)
    with pytest.raises(error, match=words):
        train.run(config, tmp_path / "w", console=quiet())
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("change, words", [
    (lambda c: c.sample.update(reward="words"), r"reward='words'; allowed: lexicon"),
    (lambda c: c.sample.update(unseen=3), r"config\.sample\.unseen=3"),
    (lambda c: c.sample.update(prompts="builtin:songs"), r"prompts='builtin:songs'"),
    (lambda c: c.sample.update(max_new_tokens=200), r"max_new_tokens=200 exceed the model's 128 positions"),
    (lambda c: c.evaluate.update(prompts="nowhere.jsonl"), r"nowhere\.jsonl"),
    (lambda c: c.evaluate.update(reward="words"), r"reward='words'; allowed: lexicon"),
], ids=["reward", "unseen", "prompts", "positions", "evaluate-prompts", "evaluate-reward"])
def test_later_stages_are_checked_before_the_first_begins(tmp_path, change, words):
    config = configs.embedded_run("dpo", tiny=True)
    change(config)
    with pytest.raises((ConfigError, DataError), match=words):
        train.run(config, tmp_path / "w", console=quiet())
    assert not (tmp_path / "w").exists()


# Real processes (second tier)

PROCESS_CONFIG = """
from alignax import configs

def get_config():
    config = configs.embedded_run("dpo", tiny=True, log_every=1, steps=12, checkpoint_every=2, eval_every=4)
    config.sft.update(steps=24, checkpoint_every=3, log_every=1, eval_every=12)
    return config
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(config file, workdir) of a run of all kinds of stages in one process."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.py").write_text(PROCESS_CONFIG)
    process = start(folder / "config.py", folder / "w")
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return folder / "config.py", folder / "w"


def start(config: Path, workdir: Path) -> subprocess.Popen:
    """`alignax train` as a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "alignax.cli", "train", "--config", str(config), "--workdir",
                             str(workdir)], cwd=workdir.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def send_when(process: subprocess.Popen, ready, number: int) -> str:
    """Sends a signal as soon as ready() holds; returns what the process printed."""
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, f"the process ended before the signal: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "the moment for the signal never came"
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=240)[0]


def reached(workdir: Path, stage: str, step: int):
    """ready() for `send_when`: a train stage logged `step`, or a stage of another kind began (step 0)."""
    def ready() -> bool:
        if not step:
            return (workdir / "stages" / stage).is_dir()
        path = workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return f'"stage": "{stage}", "split": "train", "step": {step},' in text
    return ready


def assert_same_run(left: Path, right: Path) -> None:
    """Equal parameters, pairs, samples, headline and metrics; only timings may differ."""
    one, two = (json.loads((w / "result.json").read_text()) for w in (left, right))
    for result in (one, two):
        for stage in result["stages"].values():
            stage.pop("seconds")
            stage.pop("compilations", None)
    assert one == two
    for name in ("samples.jsonl", "stages/sample/pairs.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes()
    for stage in ("sft", "method"):
        both = [[(r["split"], r["step"], r.get("loss")) for r in metrics_lib.read_metrics(w, stage=stage)]
                for w in (left, right)]
        assert both[0] == both[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage, step", [("sft", 1), ("sft", 13), ("sample", 0), ("method", 5), ("evaluate", 0)])
def test_killed_run_resumes_to_the_same_bytes(uninterrupted, tmp_path, stage, step):
    config, whole = uninterrupted
    workdir = tmp_path / "w"
    process = start(config, workdir)
    send_when(process, reached(workdir, stage, step), signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "stages" / stage / "done.json").exists(), "killed too late to test anything"
    again = start(config, workdir)
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage, step", [("sft", 7), ("sample", 0)])
def test_sigterm_saves_and_exits_resumable(uninterrupted, tmp_path, stage, step):
    config, whole = uninterrupted
    workdir = tmp_path / "w"
    process = start(config, workdir)
    out = send_when(process, reached(workdir, stage, step), signal.SIGTERM)
    assert process.returncode == context.EXIT_RESUMABLE, out
    assert "run the same command again" in out and "Traceback" not in out
    again = start(config, workdir)
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_finished_process_run_is_left_alone(uninterrupted, tmp_path):
    config, whole = uninterrupted
    workdir = tmp_path / "w"
    shutil.copytree(whole, workdir)
    before = contents(workdir)
    process = start(config, workdir)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "finished already" in out
    assert contents(workdir) == before
