"""Successive halving, early stopping, and programs that run out of memory: who goes on, and that it changes nobody."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
from population_test import assert_alike, member, one_stage, rows
from rich.console import Console
from train_test import StopAt, quiet, story_pairs

from alignax import context, population, train
from alignax.population import fit, rounds
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

RULE = population.Halving("loss", "min", (5, 10), 0.5)


# The rules themselves


def test_the_best_share_goes_on_and_seeds_stand_together():
    rule = population.Halving("accuracy", "max", (5,), 0.5)
    values = [0.9, 0.1, 0.6, 0.5, 0.4, 0.4]
    assert [kept for kept, *_ in rule.choose(values, range(6))] == [True, False, True, True, False, False]
    # Means 0.5, 0.55, 0.4: the member with the best value of all is not saved by it.
    chosen = rule.choose(values, ["a", "a", "b", "b", "c", "c"])
    assert chosen == [(True, 2, 3, 2)] * 2 + [(True, 1, 3, 2)] * 2 + [(False, 3, 3, 2)] * 2
    lower = population.Halving("loss", "min", (5,), 0.3)
    assert [kept for kept, *_ in lower.choose(values, range(6))] == [False, True, False, False, True, False]
    assert [kept for kept, *_ in lower.choose([1.0] * 10, range(10))].count(True) == 3  # 0.3 * 10, not 4


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_who_diverged_comes_last(bad):
    for mode in ("min", "max"):
        rule = population.Halving("loss", mode, (5,), 0.5)
        assert [place for _, place, *_ in rule.choose([bad, 5.0, 7.0], range(3))][0] == 3
        assert not rule.choose([bad, 5.0, 7.0, 8.0], ["a", "a", "b", "c"])[1][0]  # nor does its other seed go on


def test_patience_counts_evaluations_that_are_no_better():
    rule, seen, since = population.EarlyStop("loss", "min", 2), None, []
    for value in (3.0, 2.0, 2.0, 2.5, 1.0, math.nan, 4.0):
        seen = rule.watch(seen, value)
        since.append(seen[1])
    assert since == [0, 0, 1, 2, 0, 1, 2] and seen[0] == 1.0
    assert population.EarlyStop("loss", "max", 2).watch((1.0, 3), 2.0) == (2.0, 0)


@pytest.mark.parametrize("change, words", [
    (dict(mode="up"), "mode='up'; allowed: min, max"), (dict(keep=1.0), "keep=1.0"), (dict(keep=True), "keep=True"),
    (dict(rungs=(10, 5)), r"rungs=\(10, 5\)"), (dict(rungs=(0,)), "rungs"), (dict(rungs=()), "rungs"),
    (dict(rung=3), "expected metric, mode, rungs, keep"), (dict(metric=""), "metric=''")])
def test_rules_that_make_no_sense(change, words):
    with pytest.raises(ConfigError, match=words):
        population.halving(dict(metric="loss", mode="min", rungs=(5, 10), keep=0.5) | change)
    with pytest.raises(ConfigError, match="patience=0"):
        population.early_stop(dict(metric="loss", mode="min", patience=0))
    assert population.halving(dict(metric="loss", mode="min", rungs=5, keep=0.5)).rungs == (5,)


# In a population


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return story_pairs(folder / "train.jsonl", 48, "train"), story_pairs(folder / "eval.jsonl", 8, "eval")


def members_in(folder: Path, pairs) -> list:
    """Three settings with two seeds each, and one that diverges."""
    found = [member(f"{rate:g}-s{seed}", one_stage(pairs, "dpo", seed=seed, optim=dict(learning_rate=rate)), folder)
             for rate in (1e-4, 3e-3, 1e-3) for seed in (0, 1)]
    return [*found, member("far", one_stage(pairs, "dpo", optim=dict(learning_rate=1e38)), folder)]


def fingerprints(results) -> dict[str, str]:
    return {n: r.summary["stages"]["method"]["fingerprint"] for n, r in results.items() if r.summary}


@pytest.fixture(scope="module")
def halved(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halved")
    said = Console(file=io.StringIO(), width=200)
    return folder, population.run(members_in(folder, pairs), folder, console=said, halving=RULE), said.file.getvalue()


def loss_at(folder: Path, setting: str, step: int) -> float:
    """The mean over both seeds of the loss in the evaluation after `step` updates."""
    held = [r["loss"] for s in (0, 1) for r in rows(folder / f"{setting}-s{s}") if (r["split"], r["step"]) == (
        "eval", step)]
    assert len(held) == 2
    return sum(held) / 2


def test_the_worse_half_is_dropped_and_the_others_are_what_they_are_alone(halved, pairs, tmp_path):
    folder, results, said = halved
    *two, worst = sorted(("0.0001", "0.001", "0.003"), key=lambda name: loss_at(folder, name, 5))
    best, middle = sorted(two, key=lambda name: loss_at(folder, name, 10))
    assert sorted(fingerprints(results)) == [f"{best}-s0", f"{best}-s1"]
    first, second = results[f"{worst}-s0"].dropped, results[f"{middle}-s1"].dropped
    # Four settings with the one that diverged: two go on, then one.
    assert (first["step"], first["place"], first["settings"], first["kept"]) == (5, 3, 4, 2)
    assert (second["step"], second["place"], second["settings"], second["kept"]) == (10, 2, 2, 1)
    assert "update 5 of method: by loss its settings were number 3 of 4, of which 2 went on" in first["reason"]
    assert "is not finite" in results["far"].error and "rung 5: 4 of 7 members go on" in said
    for name, last in ((worst, 5), (middle, 10), (best, 20)):
        assert max(row["step"] for row in rows(folder / f"{name}-s0")) == last
    stored = json.loads((folder / f"{middle}-s1" / population.DROPPED).read_text())
    evaluated = [r for r in rows(folder / f"{middle}-s1") if r["split"] == "eval"][-1]
    assert stored == second and stored["value"] == evaluated["loss"]
    assert stored["evaluated"].items() <= evaluated.items()
    config = next(m.config for m in members_in(tmp_path, pairs) if m.name == f"{best}-s1")
    alone = train.run(config, tmp_path / "alone", console=quiet())
    assert_alike(rows(folder / f"{best}-s1"), rows(tmp_path / "alone"))
    assert results[f"{best}-s1"].summary["stages"]["method"]["eval"] == pytest.approx(
        alone["stages"]["method"]["eval"], rel=1e-4, abs=1e-4)
    again = population.run(members_in(folder, pairs), folder, console=quiet(), halving=RULE)
    assert again[f"{middle}-s1"].dropped == second and fingerprints(again) == fingerprints(results)


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_stop_between_and_behind_rungs_changes_no_choice_and_no_bit(halved, pairs, tmp_path, monkeypatch, looks):
    folder, results, _ = halved
    with monkeypatch.context() as patch:
        patch.setattr(context, "Stop", type("StopNow", (StopAt,), {"looks": looks}))
        with pytest.raises(context.Preempted, match=f"stopped at step {5 * looks} of 20"):
            population.run(members_in(tmp_path, pairs), tmp_path, console=quiet(), halving=RULE)
    resumed = population.run(members_in(tmp_path, pairs), tmp_path, console=quiet(), halving=RULE)
    assert fingerprints(resumed) == fingerprints(results)
    for name, result in results.items():
        assert resumed[name].dropped == result.dropped and resumed[name].error == result.error
        assert rows(tmp_path / name) == rows(folder / name)


def test_who_is_left_after_a_kill_is_not_ranked_again(halved, pairs, tmp_path, monkeypatch):
    """The end comes after the group's choice is written down and before the members' folders know."""
    module = sys.modules["alignax.population.run"]  # `population.run` is the function
    monkeypatch.setattr(module._Engine, "_drop", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        population.run(members_in(tmp_path, pairs), tmp_path, console=quiet(), halving=RULE)
    monkeypatch.undo()
    resumed = population.run(members_in(tmp_path, pairs), tmp_path, console=quiet(), halving=RULE)
    for name, result in halved[1].items():
        assert resumed[name].dropped == result.dropped and bool(resumed[name].summary) == bool(result.summary)


def test_a_member_that_gets_no_better_is_stopped(pairs, tmp_path):
    """A learning rate of zero never gets better: it ends after two evaluations, and later rows are not written."""
    members = [member("still", one_stage(pairs, "dpo", optim=dict(learning_rate=0.0)), tmp_path),
               member("moves", one_stage(pairs, "dpo"), tmp_path)]
    rule = population.EarlyStop("loss", "min", 2)
    found = population.run(members, tmp_path, console=quiet(), early_stop=rule)
    plain = population.run([member("moves", members[1].config, tmp_path / "plain"),
                            member("still", members[0].config, tmp_path / "plain")], tmp_path / "plain",
                           console=quiet())
    still, moves = (found[name].summary["stages"]["method"] for name in ("still", "moves"))
    assert still["stopped_at"] == 10 and max(row["step"] for row in rows(tmp_path / "still")) == 10
    assert still["fingerprint"] == plain["still"].summary["stages"]["method"]["fingerprint"]
    seen, last = None, 20
    for row in rows(tmp_path / "plain" / "moves"):
        if row["split"] == "eval" and last == 20:
            seen = rule.watch(seen, row["loss"])
            last = row["step"] if seen[1] == 2 else 20
    assert moves.get("stopped_at", 20) == last
    assert_alike(rows(tmp_path / "moves"), [r for r in rows(tmp_path / "plain" / "moves") if r["step"] <= last])


def test_rules_that_a_config_cannot_follow(pairs, tmp_path):
    one = member("m", one_stage(pairs, "dpo"), tmp_path)
    for rule, words in ((dict(rungs=(7,)), "multiples of config.method.eval_every=5 below the stage's 20"),
                        (dict(rungs=(20,)), "below the stage's 20"), (dict(stage="sft"), "allowed, the train stages: "
                                                                                         "method")):
        made = population.halving(dict(metric="loss", mode="min", rungs=(5,), keep=0.5) | rule)
        with pytest.raises(ConfigError, match=words):
            population.run([one], tmp_path, console=quiet(), halving=made)
    assert not (tmp_path / "m").exists()
    made = population.halving(dict(metric="los", mode="min", rungs=(5,), keep=0.5))
    found = population.run([one], tmp_path, console=quiet(), halving=made)
    assert "metric='los' is no number of the evaluation; allowed: " in found["m"].error
    assert max((row["step"] for row in rows(tmp_path / "m")), default=0) == 0  # told before anything is trained


# Memory


def test_a_program_that_runs_out_of_memory_is_cut_in_halves(halved, pairs, tmp_path, monkeypatch):
    folder, results, _ = halved
    calls = rounds.Round._call

    def full(self, population, number, length):
        if self.size > 2 and number >= 5:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes")
        return calls(self, population, number, length)

    monkeypatch.setattr(rounds.Round, "_call", full)
    said = Console(file=io.StringIO(), width=200)
    best = next(iter(fingerprints(results)))
    some = [m for m in members_in(tmp_path, pairs) if m.name == best or m.name.endswith("-s0")]
    found = population.run([*some, member("more", one_stage(pairs, "dpo", seed=5), tmp_path)][-4:], tmp_path,
                           console=said)
    assert "out of memory with 4 members at a time; those that are not done begin again with 2" in said.file.getvalue()
    assert_alike(rows(tmp_path / best), rows(folder / best))
    assert all(result.summary for result in found.values())

    monkeypatch.setattr(rounds.Round, "_call", lambda *_: (_ for _ in ()).throw(RuntimeError("RESOURCE_EXHAUSTED")))
    found = population.run(members_in(tmp_path / "b", pairs)[:2], tmp_path / "b", console=quiet())
    assert all("out of memory" in result.error and "what helps" in result.error for result in found.values())


def test_a_compiler_without_memory_is_asked_for_less():
    asked = []

    def compiled(size):
        asked.append(size)
        if size > 3:
            raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        return type("Program", (), {"memory_analysis": lambda self: type("Sizes", (), dict(
            argument_size_in_bytes=size, output_size_in_bytes=0, temp_size_in_bytes=0, alias_size_in_bytes=0))})()

    assert fit.largest(10, compiled, limit=1000)[0] == 2 and asked == [10, 5, 2]
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        fit.largest(10, lambda size: compiled(size + 3), limit=1000)


def test_rounds_stay_as_they_were_cut_when_less_memory_is_free_later(pairs, tmp_path, monkeypatch):
    some = members_in(tmp_path, pairs)[:3]
    monkeypatch.setattr(fit, "largest", lambda count, compile_for, **_: (2, None))
    with monkeypatch.context() as patch:
        patch.setattr(context, "Stop", type("StopNow", (StopAt,), {"looks": 2}))
        with pytest.raises(context.Preempted):
            population.run(some, tmp_path, console=quiet())
    monkeypatch.setattr(fit, "largest", lambda *_, **__: pytest.fail("the cut is known"))
    said = Console(file=io.StringIO(), width=200)
    found = population.run(some, tmp_path, console=said)
    assert "resuming method at step 10 of 20 (2 members)" in said.file.getvalue()
    assert all(result.summary for result in found.values())
