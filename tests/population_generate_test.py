"""Sample and evaluate stages of a population as one program: files and numbers are those of the stages one after
another, whatever the prompts, rounds, stops and memory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from population_test import member, one_stage
from rich.console import Console
from train_test import quiet, story_pairs, tiny_base

from alignax import configs, context, evaluate, population, rollout
from alignax.commands import sweep_cost
from alignax.population import generation
from alignax.population.rules import EarlyStop, Halving
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

FILES = ("samples.jsonl", "stages/sample/pairs.jsonl")
MEMBERS = dict(weak=(0.1, 0, 12), strong=(5.0, 0, 12), seeded=(5.0, 1, 12), short=(5.0, 0, 10))


def config_of(pairs, beta: float, seed: int, new: int, **over):
    """Trained, sampled from and evaluated."""
    config = one_stage(pairs, "dpo", hyper=dict(beta=beta), steps=4, optim=dict(learning_rate=1e-2), seed=seed)
    settings = dict(max_new_tokens=new, batch_size=8) | over
    config.sample = configs.sample_stage(num_prompts=20, num_samples=3, **settings)
    config.evaluate = configs.evaluate_stage(policies=("method",), baseline="model", num_prompts=12, examples=0,
                                             **settings)
    config.stages = ("method", "sample", "evaluate")
    return config


def forget(folder: Path) -> None:
    """Leaves of a member what it was before it was sampled from."""
    for name in ("sample", "evaluate"):
        (folder / "stages" / name / "done.json").unlink()
    (folder / "result.json").unlink()
    for file in FILES:
        (folder / file).unlink()


def left_by(folder: Path) -> tuple[dict[str, list], dict]:
    """(the rows of the files, the results of the stages)."""
    texts = {file: [json.loads(line) for line in (folder / file).read_text().splitlines()] for file in FILES}
    return texts, json.loads((folder / "result.json").read_text())["stages"]


def assert_same(one: tuple, two: tuple) -> None:
    """Completions and labels to the bit, log-probs and what is computed from them to rounding."""
    assert one[0] == two[0]
    counts = [{k: v for k, v in found[1]["sample"].items() if k not in ("seconds", "population")}
              for found in (one, two)]
    assert counts[0] == counts[1]
    for a, b in zip(*(found[1]["evaluate"]["points"] for found in (one, two)), strict=True):
        assert a.keys() == b.keys() and a["policy"] == b["policy"]
        assert [a[k] for k in a if k != "policy"] == pytest.approx([b[k] for k in a if k != "policy"], abs=2e-5)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """(folder, members, what each came to one after another); `forget` is done."""
    folder = tmp_path_factory.mktemp("grown")
    pairs = (story_pairs(folder / "train.jsonl", 48, "train"), story_pairs(folder / "eval.jsonl", 8, "eval"))
    members = [member(name, config_of(pairs, *settings), folder / "members") for name, settings in MEMBERS.items()]
    found = population.run(members, folder, console=quiet(), seeds="own", generate="apart")
    assert not any(one.error for one in found.values())
    return folder, members, {one.name: left_by(one.folder) for one in members}


def again(grown, **settings) -> tuple[str, dict]:
    """Samples and evaluates again, together; (what is said, results)."""
    folder, members, _ = grown
    for one in members:
        forget(one.folder)
    said = Console(file=io.StringIO(), width=200)
    return said.file, population.run(members, folder, console=said, seeds="own", generate="together", **settings)


def test_members_that_draw_alike_are_one_program_and_come_to_what_they_do_apart(grown):
    """Own prompts (another seed) and shared ones; the member with fewer new tokens runs alone."""
    said, found = again(grown)
    lines = said.getvalue()
    for stage in ("sample", "evaluate"):
        assert f"{stage} (3 members in one program)" in lines and f"{stage} (1 members, one after another)" in lines
    for one in grown[1]:
        assert_same(left_by(one.folder), grown[2][one.name])
        stages = found[one.name].summary["stages"]
        shared = [stages[name].get("population", {}).get("members") for name in ("sample", "evaluate")]
        assert shared == ([None] * 2 if one.name == "short" else [3, 3])
    assert grown[2]["weak"][0] != grown[2]["strong"][0] != grown[2]["seeded"][0]


def test_a_stopped_population_redoes_what_was_not_done(grown, monkeypatch):
    """In rounds of two; stopped in the second one of the sample stage, whose first is kept."""
    monkeypatch.setattr(generation.fit, "largest", lambda count, compile_for, **_: (min(count, 2), None))
    whole, calls = generation._Work.round, []

    def round_(self, some, size):
        calls.append([stage.ctx.workdir.name for stage in some])
        if len(calls) == 2:
            raise context.Preempted("now")
        return whole(self, some, size)

    monkeypatch.setattr(generation._Work, "round", round_)
    with pytest.raises(context.Preempted):
        again(grown)
    folder, members, before = grown
    done = [one.folder / "stages" / "sample" / "done.json" for one in members]
    assert [file.exists() for file in done] == [True, True, False, False]
    kept = done[0].read_bytes()
    population.run(members, folder, console=quiet(), seeds="own", generate="together")
    # `seeded` is left to itself in the sample stage.
    assert calls == [["weak", "strong"], ["seeded"], ["weak", "strong"], ["seeded"]]
    assert done[0].read_bytes() == kept
    for one in members:
        assert_same(left_by(one.folder), before[one.name])


def test_a_round_that_runs_out_of_memory_begins_again_with_fewer(grown, monkeypatch):
    whole, sizes = generation._Work.round, []

    def round_(self, some, size):
        sizes.append((len(some), size))
        if size == 3:
            raise MemoryError("RESOURCE_EXHAUSTED: Out of memory")
        return whole(self, some, size)

    monkeypatch.setattr(generation._Work, "round", round_)
    answer, alone = evaluate.answer, []
    monkeypatch.setattr(evaluate, "answer", lambda ctx, job, *rest: alone.append(job.label) or answer(ctx, job, *rest))
    said, _ = again(grown)
    assert sizes == [(3, 3), (1, 1), (1, 1), (1, 1)] * 2 and "again with 1 members at a time" in said.getvalue()
    # The baseline of each seed once, and both policies of the member that runs alone.
    assert sorted(alone) == ["evaluate: method"] + ["evaluate: model"] * 3
    for one in grown[1]:
        assert_same(left_by(one.folder), grown[2][one.name])


def test_members_of_which_none_fits_run_one_after_another(grown):
    said, found = again(grown, memory_limit=1000)
    assert "the limit is 1,000" in said.getvalue() and "one after another instead" in said.getvalue()
    assert not any(one.error for one in found.values())
    assert left_by(grown[1][0].folder)[0] == grown[2]["weak"][0]


def test_what_cannot_be_together(grown):
    with pytest.raises(ConfigError, match="generation='both'; allowed: auto, together, apart"):
        population.run(grown[1], grown[0], console=quiet(), generate="both")
    assert [generation.is_together(mode, place) for mode in generation.MODES for place in ("cpu", "gpu")] == [
        False, True, True, True, False, False]


MESHED = """
import jax, sys
jax.config.update("jax_num_cpu_devices", 2)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from train_test import quiet
from alignax import population
from population_generate_test import MEMBERS, config_of, member
folder = Path(sys.argv[2])
pairs = folder / "train.jsonl", folder / "eval.jsonl"
members = [member(name, config_of(pairs, *settings), folder / "members") for name, settings in MEMBERS.items()]
found = population.run(members, folder, console=quiet(), seeds="own", generate="together")
assert [r.summary["stages"]["sample"].get("population", {}).get("members") for r in found.values()] == [3, 3, 3, None]
"""


def test_devices_share_the_members(grown):
    """Three members over two devices."""
    folder, members, before = grown
    for one in members:
        forget(one.folder)
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", MESHED, str(tests), str(folder)], capture_output=True, text=True,
                          timeout=600, cwd=tests.parent, env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"})
    assert done.returncode == 0, done.stderr[-2000:]
    for one in members:
        assert_same(left_by(one.folder), before[one.name])


def test_the_mapped_loop_does_not_choose_between_caches():
    """With a predicate for each member, every step would select between the old and the new of all of them."""
    config = context.load_model(tiny_base(("m",)).model.to_dict(), vocab_size=20, seed=0)[0].config
    params = jax.eval_shape(lambda: context.models.init_params(config, jax.random.key(0), "float32"))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), params)
    prompts = np.asarray([[0, 3, 4], [5, 6, 7]], np.int32)
    draw = lambda one, key: rollout.generate(config, one, prompts, prompts > 0, np.arange(2, dtype=np.uint32), key,
                                             max_new_tokens=6, eos_ids=(1,))
    found = jax.make_jaxpr(jax.vmap(draw))(params, jax.random.split(jax.random.key(0), 3))
    loops = [eqn for eqn in _equations(found.jaxpr) if eqn.primitive.name == "while" and len(eqn.outvars) > 10]
    assert len(loops) == 1
    assert any(var.aval.shape == (3, 2, config.num_kv_heads, 9, config.head_dim) for var in loops[0].outvars)
    assert [aval.shape for aval in loops[0].params["cond_jaxpr"].out_avals] == [()]


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


@pytest.mark.parametrize("units, after, expected", [
    ("abcd", False, 4 * 10 + 2 * 10 + 1 * 20), ("aabb", False, 4 * 10 + 2 * 10 + 2 * 20), ("aabb", True, 2 * 40),
    ("abc", False, 3 * 10 + 2 * 10 + 1 * 20)])
def test_the_updates_that_halving_leaves(units, after, expected):
    assert Halving("loss", "min", (10, 20), 0.5).updates(40, units, after=after) == expected


def test_the_estimate_counts_what_halving_leaves(tmp_path, monkeypatch):
    """Nothing is timed. A stage after the one with rungs sees only those that went on."""
    monkeypatch.setattr(sweep_cost, "_timed", lambda config, name, console: (0.01, 40, ""))
    pairs = (Path("train.jsonl"), Path("eval.jsonl"))

    def two(beta: float, seed: int):
        config = one_stage(pairs, "dpo", hyper=dict(beta=beta), seed=seed)
        config.later = configs.train_stage("ipo", data=dict(path="pairs.jsonl"))
        config.stages = ("method", "later")
        return config

    members = [member(f"m{i}", two(0.1 * (i // 2 + 1), i % 2), tmp_path) for i in range(8)]
    halved = sweep_cost.estimate(members, (), quiet(), halving=Halving("loss", "min", (10, 20), 0.5, "method"))
    assert halved[:2] == ["method (dpo), 8 runs: 40 updates of 10.0 ms; halving leaves 160 of 320",
                          "later (ipo), 8 runs: 40 updates of 10.0 ms; halving leaves 80 of 320"]
    stopped = sweep_cost.estimate(members, (), quiet(), early_stop=EarlyStop("accuracy", "max", 2, "method"))
    assert "about 6 seconds less what early stopping on accuracy saves;" in stopped[2]
    assert "about 2 seconds;" in halved[2] and "halving" not in " ".join(sweep_cost.estimate(members, (), quiet()))
