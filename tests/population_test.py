"""Populations: a member is what the same run is alone, whatever the others do, also when stopped, cut or diverged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_test import StopAt, quiet, story_pairs, tiny_base

from alignax import configs, context, metrics, optim, population, train
from alignax.population import fit, training
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

LONG = 20
_TIMES = ("steps_per_second", "tokens_per_second")


# Arrays


def walk(state, ref, batch, hyper, key, frozen):
    """A member that walks to its batch with noise; it diverges where its rate is not finite."""
    del ref, frozen
    new = state - hyper["rate"] * (state - batch.mean() + 0.1 * jax.random.normal(key))
    return new, {"distance": (jnp.abs(new - batch.mean()), jnp.float32(1))}


RATES = jnp.asarray([0.1, 0.2, jnp.nan, 0.3])
BATCHES = jnp.arange(10.0).reshape(5, 2)


def keys_of(count: int):
    return jax.vmap(lambda n: jax.random.split(n, 4)[:count])(jax.random.split(jax.random.key(0), 5))


def test_members_walk_apart_and_a_diverged_one_stays_where_it_was():
    run = population.make_steps(walk)
    after, out = run(population.start(jnp.zeros(4)), None, BATCHES, {"rate": RATES}, keys_of(4))
    assert out["distance"][0].shape == (5, 4)
    for i, rate in enumerate(RATES):
        state = jnp.zeros(())
        for batch, keys in zip(BATCHES, keys_of(4), strict=True):
            state = walk(state, None, batch, {"rate": rate}, keys[i], None)[0] if i != 2 else state
        assert float(after.state[i]) == pytest.approx(float(state), rel=1e-6), i
    assert after.active.tolist() == [True, True, False, True] and after.diverged.tolist() == [0, 0, 1, 0]
    assert after.updates.tolist() == [5, 5, 0, 5]


def test_inactive_members_stay_and_the_rest_can_be_taken_out():
    run = population.make_steps(walk, own=("batch",))
    own = jnp.broadcast_to(BATCHES[:, None], (5, 4, 2))
    begun = population.deactivate(population.start(jnp.zeros(4)), [0])
    after, _ = run(begun, None, own, {"rate": RATES}, keys_of(4))
    shared, _ = population.make_steps(walk)(population.start(jnp.zeros(4)), None, BATCHES, {"rate": RATES}, keys_of(4))
    assert float(after.state[0]) == 0 and int(after.updates[0]) == 0 and int(after.diverged[0]) == 0
    assert after.state[1:].tolist() == shared.state[1:].tolist()
    assert population.take(after, [3, 1]).state.tolist() == [float(after.state[3]), float(after.state[1])]
    with pytest.raises(ConfigError, match="allowed: ref, batch, frozen"):
        population.make_update(walk, own=("key",))


def test_a_fixed_batch_folds_the_number_of_the_update_into_the_keys():
    keys, rates = jax.random.split(jax.random.key(1), 3), {"rate": jnp.asarray([0.1, 0.2, 0.3])}
    whole, _ = population.make_steps(walk, length=4)(population.start(jnp.zeros(3)), None, BATCHES[0], rates, keys)
    half = population.make_steps(walk, length=2)
    parts = population.start(jnp.zeros(3))
    for _ in range(2):
        parts, _ = half(parts, None, BATCHES[0], rates, keys)
    assert parts.state.tolist() == whole.state.tolist() and parts.updates.tolist() == [4, 4, 4]
    state = jnp.zeros(())
    for n in range(4):
        state = walk(state, None, BATCHES[0], {"rate": 0.2}, jax.random.fold_in(keys[1], n), None)[0]
    assert float(whole.state[1]) == pytest.approx(float(state), rel=1e-6)


def stumble(state, ref, batch, hyper, key, frozen):
    """A walk that is not finite at the update of its number `at`."""
    new, metrics = walk(state["place"], ref, batch, hyper, key, frozen)
    failed = state["number"] + 1 == hyper["at"]
    return {"place": new, "number": state["number"] + 1}, metrics | {"finite": ~failed, "number": state["number"]}


@pytest.mark.parametrize("length", [None, 7])
@pytest.mark.parametrize("check_every", [2, 3, 7, 9])
def test_members_that_are_checked_now_and_then_end_where_those_checked_always_do(length, check_every):
    """One falls in the middle of a stretch, one at its first update, one is not trained, two are well."""
    hyper = {"rate": jnp.asarray([0.1, 0.2, 0.3, 0.4, 0.5]), "at": jnp.asarray([0, 4, 1, 0, 0])}
    keys = jax.random.split(jax.random.key(2), (7, 5) if length is None else 5)
    batches = jnp.arange(14.0).reshape(7, 2) if length is None else jnp.arange(2.0)

    def ends(every):
        begun = population.start({"place": jnp.zeros(5), "number": jnp.zeros(5, jnp.int32)})
        run = population.make_steps(stumble, length=length, check_every=every)
        return run(population.deactivate(begun, [3]), None, batches, hyper, keys)

    (always, seen), (stretches, found) = ends(1), ends(check_every)
    assert always.active.tolist() == [True, False, False, False, True] and always.diverged.tolist() == [0, 4, 1, 0, 0]
    assert always.updates.tolist() == [7, 3, 0, 0, 7]
    plain = lambda one: jax.tree.map(np.ndarray.tolist, jax.device_get(one))
    assert plain(stretches) == plain(always)
    assert all(np.array_equal(a[:, [0, 4]], b[:, [0, 4]])
               for a, b in ((seen["distance"][0], found["distance"][0]), (seen["number"], found["number"])))
    with pytest.raises(ConfigError, match="check_every=0; allowed: 1 or more"):
        population.make_steps(stumble, check_every=0)


MESHED = """
import jax, jax.numpy as jnp
from alignax import population
assert population.device_per_core() >= 1
jax.config.update("jax_num_cpu_devices", 2)
from population_test import BATCHES, RATES, keys_of, walk
mesh = population.make_mesh()
out = []
for where, every in ((None, 1), (mesh, 1), (mesh, 2)):
    run = population.make_steps(walk, mesh=where, check_every=every)
    begun = population.start(jnp.zeros(4), mesh=where)
    after, found = run(begun, None, BATCHES, {"rate": RATES}, keys_of(4))
    out.append([after.state.tolist(), after.diverged.tolist(), found["distance"][0].tolist()])
assert str(out[0]) == str(out[1]) and str(out[0][:2]) == str(out[2][:2]), out
assert population.filled(5, mesh).tolist() == [0, 1, 2, 3, 4, 4] and len(after.state.sharding.device_set) == 2
"""


def test_devices_share_the_members():
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", MESHED], capture_output=True, text=True, timeout=120, cwd=tests.parent,
                          env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"})
    assert done.returncode == 0, done.stderr[-2000:]


# The optimiser's numbers


@pytest.mark.parametrize("name, schedule, options", [
    ("adamw", "cosine", [dict(b1=0.8, b2=0.99, weight_decay=0.1), dict(b1=0.9, b2=0.9995, weight_decay=0.0)]),
    ("lion", "linear", [dict(b1=0.8, weight_decay=0.1), dict(b1=0.95, weight_decay=0.0)]),
    ("rmsprop", "constant", [dict(decay=0.9), dict(decay=0.99)]),
    ("sgd", "linear", [dict(momentum=0.9), dict(momentum=0.5)])])
def test_traced_numbers_give_the_same_optimiser(name, schedule, options):
    sections = [configs.optim_section(name=name, schedule=schedule, learning_rate=rate, warmup_steps=warm,
                                      clip_norm=clip, options=own).to_dict()
                for rate, warm, clip, own in zip((1e-2, 3e-3), (0, 4), (0.0, 0.5), options, strict=True)]
    steps, first = 10, 0.01 * jax.random.normal(jax.random.key(0), (4, 3))
    grads = jax.random.normal(jax.random.key(1), (steps, 4, 3))

    def path(optimizer):
        def one(carry, grad):
            moves, state = optimizer.update(grad, carry[1], carry[0])
            params = optax.apply_updates(carry[0], moves)
            return (params, state), params

        return jax.lax.scan(one, (first, optimizer.init(first)), grads)[1]

    values = [optim.numbers(section) for section in sections]
    traced = optim.traced({key: [v[key] for v in values] for key in values[0]})
    many = jax.jit(jax.vmap(lambda own: path(optim.from_section(sections[0], steps, own))))(traced)
    for got, section in zip(many, sections, strict=True):
        alone = path(optim.from_section(section, steps))
        moved = float(jnp.abs(alone - first[None]).max())
        assert moved > 1e-3 and float(jnp.abs(got - alone).max()) < 1e-6 * moved


# Structure


def member(name: str, config, folder: Path = Path("nowhere")):
    return population.Member(name, config, folder / name)


def two_stages(beta=0.1, rate=1e-3, seed=0, rank=0, sft=3e-3):
    config = configs.embedded_run("dpo", tiny=True, hyper=dict(beta=beta), optim=dict(learning_rate=rate),
                                  lora=dict(rank=rank))
    config.seed, config.sft.optim.learning_rate = seed, sft
    return config


def test_numbers_share_a_program_and_structure_does_not():
    found = population.groups([member("a", two_stages()), member("b", two_stages(beta=0.5)),
                               member("c", two_stages(rate=1e-2, seed=3)), member("d", two_stages(rank=2)),
                               member("e", two_stages(sft=1e-3))])
    assert found == [["a", "b", "c", "e"], ["d"]]


@pytest.mark.parametrize("changes, seeds, expected", [
    ((dict(beta=0.1), dict(beta=0.5)), "shared", [("sft sample", "01", 0)]),
    ((dict(seed=4), dict(seed=3)), "shared", [("sft sample", "01", 3)]),
    ((dict(seed=4), dict(seed=3)), "own", []),
    ((dict(seed=1), dict(seed=1, beta=0.5), dict(seed=2), dict(seed=2, beta=0.5)), "shared",
     [("sft sample", "0123", 1)]),
    ((dict(seed=1), dict(seed=1, beta=0.5), dict(seed=2), dict(seed=2, beta=0.5)), "own",
     [("sft sample", "01", 1), ("sft sample", "23", 2)]),
    ((dict(sft=1e-3), dict(sft=2e-3), dict(sft=2e-3, beta=0.3)), "shared", [("sft sample", "12", 0)]),
    ((dict(),), "shared", [])])
def test_what_members_share_runs_once(changes, seeds, expected):
    found = population.bases([member(str(i), two_stages(**c)) for i, c in enumerate(changes)], seeds=seeds)
    assert [(" ".join(b.stages), "".join(b.members), b.config.seed) for b in found] == expected


def test_an_unknown_rule_for_seeds_is_refused():
    with pytest.raises(ConfigError, match="seeds='none'; allowed: shared, own"):
        population.bases([member("a", two_stages())], seeds="none")


def test_members_are_cut_into_rounds_that_fit():
    asked = []

    def compiled(size):
        asked.append(size)
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=40 * size, output_size_in_bytes=30 * size, temp_size_in_bytes=100 + 60 * size,
            alias_size_in_bytes=30 * size))

    assert fit.largest(10, compiled, limit=1100)[0] == 10 and asked == [10]
    assert fit.largest(10, compiled, limit=600)[0] == 5
    assert fit.largest(10, compiled, limit=600, ways=4)[0] == 4
    with pytest.raises(ConfigError, match="one member on each device takes 200 bytes; the limit is 199"):
        fit.largest(10, compiled, limit=199)
    assert fit.available() > 1e6


# The law: a member of a population is the same run alone


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return story_pairs(folder / "train.jsonl", 48, "train"), story_pairs(folder / "eval.jsonl", 8, "eval")


def one_stage(pairs, loss: str, *, seed: int = 0, hyper=None, optim=None, steps: int = LONG, **over):
    config = tiny_base(("method",))
    config.model.num_layers, config.seed = 1, seed
    config.method = configs.train_stage(
        loss, hyper=hyper, data=dict(path=str(pairs[0]), eval_path=str(pairs[1]), eval_records=8, max_records=48),
        optim=dict(learning_rate=3e-3) | dict(optim or {}),
        **dict(steps=steps, batch_size=8, log_every=1, checkpoint_every=10, eval_every=5) | over)
    return config


def settings(name: str, pairs) -> list:
    """The members' configs of a case; the first is run alone too."""
    if name == "dpo":
        return [one_stage(pairs, "dpo", seed=1, hyper=dict(beta=0.5), optim=dict(schedule="linear", warmup_steps=3)),
                one_stage(pairs, "dpo", hyper=dict(beta=0.1), optim=dict(learning_rate=1e-3, schedule="linear")),
                one_stage(pairs, "dpo", optim=dict(learning_rate=1e38, schedule="linear"))]
    if name == "beta_dpo with adapters":  # a running state, and draws from the keys
        return [one_stage(pairs, "beta_dpo", seed=seed, hyper=dict(beta=beta), lora=dict(rank=2),
                          reference="adapter_off", optim=dict(options=dict(b2=b2)))
                for beta, b2, seed in ((0.3, 0.999, 1), (0.1, 0.99, 0))]
    return [one_stage(pairs, "bt_rm", seed=2)]  # a population of one, with a head beside the model


@pytest.fixture(scope="module")
def together(pairs, tmp_path_factory):
    """together(case, **how) -> (folder, results); equal arguments share one run."""
    known = {}

    def get(case: str, **how):
        mark = case, *sorted(how.items())
        if mark not in known:
            folder = tmp_path_factory.mktemp("population")
            members = [member(f"m{i}", config, folder) for i, config in enumerate(settings(case, pairs))]
            known[mark] = folder, population.run(members, folder, console=quiet(), **how)
        return known[mark]

    return get


def rows(workdir: Path, stage: str = "method") -> list[dict]:
    return [{k: v for k, v in row.items() if k not in _TIMES} for row in metrics.read_metrics(workdir, stage=stage)]


def assert_alike(left: list[dict], right: list[dict]) -> None:
    """Same rows; losses to 1e-5, other numbers, which grow with the parameters, to 1e-4."""
    place = lambda r: (r["split"], r["step"])
    assert sorted(map(place, left)) == sorted(map(place, right))
    for a, b in zip(sorted(left, key=place), sorted(right, key=place), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"stage", "split", "step"}:
            within = 1e-5 if key == "loss" else 1e-4
            assert a[key] == pytest.approx(b[key], rel=within, abs=within), (place(a), key)


@pytest.mark.parametrize("case", ["dpo", "beta_dpo with adapters", "bt_rm"])
def test_a_member_is_the_same_run_alone(case, pairs, together, tmp_path):
    folder, results = together(case)
    config = settings(case, pairs)[0]
    alone = train.run(config, tmp_path / "alone", console=quiet())
    assert not results["m0"].error
    assert_alike(rows(folder / "m0"), rows(tmp_path / "alone"))
    mine, other = results["m0"].summary["stages"]["method"], alone["stages"]["method"]
    assert mine.keys() == other.keys() | {"population"} and mine["steps"] == other["steps"] == LONG
    for file in ("config.json", "result.json"):
        one, two = (json.loads((place / file).read_text()) for place in (folder / "m0", tmp_path / "alone"))
        assert one.keys() == two.keys() and (file == "result.json" or one == two)
    left = [{p.name for p in (place / "stages" / "method").iterdir()} for place in (folder / "m0", tmp_path / "alone")]
    assert left[0] == left[1] - {"checkpoints", "checkpoints.seals"}


def test_a_diverged_member_is_reported_and_ends_nobody_else(together):
    folder, results = together("dpo")
    assert "is not finite" in results["m2"].error and "its state is that of step" in results["m2"].error
    assert results["m2"].summary is None and not (folder / "m2" / "result.json").exists()
    step = int(results["m2"].error.split("step ")[1].split()[0])
    assert max(row["step"] for row in rows(folder / "m2")) < step < LONG
    assert all(np.isfinite(row["loss"]) for row in rows(folder / "m0"))


def test_a_finished_population_is_read_and_a_failure_is_not_tried_again(pairs, together, monkeypatch):
    folder, results = together("dpo")
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("nothing is left to train"))
    members = [member(f"m{i}", config, folder) for i, config in enumerate(settings("dpo", pairs))]
    again = population.run(members, folder, console=quiet())
    assert again["m0"].summary == json.loads((folder / "m0" / "result.json").read_text())
    assert again["m2"].error == results["m2"].error


def test_rounds_and_a_stop_change_no_number(pairs, together, tmp_path, monkeypatch):
    """Two at a time instead of three; and stopped in the second of the calls, then resumed: the same bits."""
    monkeypatch.setattr(fit, "largest", lambda count, compile_for, **_: (2, compile_for(2)))
    folder, results = together("dpo", steps_per_call=5)
    configs_of = settings("dpo", pairs)
    members = [member(f"m{i}", config, tmp_path) for i, config in enumerate(configs_of)]
    with monkeypatch.context() as patch:
        patch.setattr(context, "Stop", type("StopNow", (StopAt,), {"looks": 2}))
        with pytest.raises(context.Preempted, match="stopped at step 10 of 20"):
            population.run(members, tmp_path, console=quiet(), steps_per_call=5)
    resumed = population.run(members, tmp_path, console=quiet(), steps_per_call=5)
    for name in ("m0", "m1"):
        one, two = (r[name].summary["stages"]["method"] for r in (resumed, results))
        assert one["fingerprint"] == two["fingerprint"] and one["train"] == two["train"]
        assert rows(tmp_path / name) == rows(folder / name)
    assert resumed["m2"].error == results["m2"].error
    monkeypatch.undo()
    assert_alike(rows(folder / "m1"), rows(together("dpo")[0] / "m1"))


def test_stages_before_the_difference_run_once_and_every_command_finds_them(tmp_path):
    """A staged run: sft and sample once, the losses together, evaluation of each; as alone."""
    members = [member(f"m{i}", two_stages(beta=beta), tmp_path / "p") for i, beta in enumerate((0.1, 0.5))]
    ended = []
    found = population.run(members, tmp_path / "p", console=quiet(), ended=lambda name, result: ended.append(name))
    alone = train.run(members[1].config, tmp_path / "alone", console=quiet())
    assert ended == ["m0", "m1"] and not found["m1"].error
    mine = found["m1"].summary
    assert mine["stages"]["sft"]["fingerprint"] == alone["stages"]["sft"]["fingerprint"]
    assert mine["stages"]["sample"]["label_agreement"] == alone["stages"]["sample"]["label_agreement"]
    assert_alike(rows(tmp_path / "p" / "m1"), rows(tmp_path / "alone"))
    assert mine.keys() == alone.keys() and mine["win_rate"] == pytest.approx(alone["win_rate"], abs=0.1)
    assert len(list((tmp_path / "p" / "population").glob("base-*"))) == 1
    for stage in ("sft", "sample"):
        assert (tmp_path / "p" / "m0" / "stages" / stage).resolve() == (
            tmp_path / "p" / "m1" / "stages" / stage).resolve()
    _, initial = context.load_model(members[0].config.model.to_dict(), vocab_size=context.load_tokenizer(
        "builtin:stories", "").vocab_size, seed=0)
    trees = [context.stage_params(tmp_path / "p" / name, "method", initial) for name in ("m0", "m1")]
    assert context.fingerprint(trees[1]["model"]) == mine["stages"]["method"]["fingerprint"]
    assert context.fingerprint(trees[0]["model"]) != mine["stages"]["method"]["fingerprint"]


def test_what_a_population_cannot_do_is_refused_member_by_member(pairs, tmp_path):
    bad = one_stage(pairs, "dpo", keep_best=2)
    watched = one_stage(pairs, "dpo", diagnostics=("noise",))
    unnamed = one_stage(pairs, "dpo")
    unnamed.stages = ("method", "another")
    cut = one_stage(pairs, "dpo")
    cut.mesh.fsdp = 2
    missing = one_stage(pairs, "dpo")
    missing.method.data.path = "no such file"
    found = population.run([member("best", bad, tmp_path), member("cut", cut, tmp_path),
                            member("missing", missing, tmp_path), member("watched", watched, tmp_path),
                            member("unnamed", unnamed, tmp_path)], tmp_path, console=quiet())
    assert "keep_best=2" in found["best"].error and "config.mesh.fsdp=2" in found["cut"].error
    assert "names 'another'" in found["unnamed"].error and "no such file" in found["missing"].error
    assert "diagnostics=('noise',)" in found["watched"].error
    with pytest.raises(ConfigError, match="each name once"):
        population.run([member("a", bad, tmp_path), member("a", cut, tmp_path)], tmp_path)
