"""Many processes are one run: the same order, keys, states and numbers as in one process, and the same end for all."""

from __future__ import annotations

import json
import textwrap
import threading
import types
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest

from alignax import data, distributed, sharding
from alignax.types import ConfigError

# Finding each other


@pytest.mark.parametrize("given, words", [
    ({"coordinator": "h:1"}, "found only coordinator"),
    ({"coordinator": "h", "process_count": 2, "process_id": 0}, "coordinator='h'; expected HOST:PORT"),
    ({"coordinator": "h:1", "process_count": 2, "process_id": 2}, "process_id=2 of process_count=2"),
    ({"coordinator": "h:1", "process_count": "two", "process_id": 0}, "'two'"),
])
def test_settings_that_do_not_fit_are_refused(monkeypatch, given, words):
    for variable in distributed.ENV.values():
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=words):
        distributed.settings(types.SimpleNamespace(**given))


def test_flags_come_before_the_environment(monkeypatch):
    for name, value in (("COORDINATOR", "a:1"), ("PROCESS_COUNT", "4"), ("PROCESS_ID", "3")):
        monkeypatch.setenv(f"ALIGNAX_{name}", value)
    flags = types.SimpleNamespace(coordinator=None, process_count=None, process_id=1, distributed=False)
    assert distributed.settings(flags) == {"coordinator": "a:1", "process_count": 4, "process_id": 1}
    for variable in distributed.ENV.values():
        monkeypatch.delenv(variable)
    assert distributed.settings(types.SimpleNamespace(distributed=False)) is None
    assert distributed.settings(types.SimpleNamespace(distributed=True)) == {}


# Agreeing, with a table in place of the coordination service


class Table:
    """What the coordination service's client does, for threads that stand for processes."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 10)
            return self.values[key]


@pytest.fixture
def two(monkeypatch):
    """two(function) -> the results (or errors) of function(index) on two "processes", which are threads."""
    here, table = threading.local(), Table()
    counts = [distributed.Counter(), distributed.Counter()]
    stops = [{}, {}]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    monkeypatch.setattr(distributed, "_client", lambda: table)

    class PerThread:
        def __init__(self, parts):
            self.parts = parts

        def __getattr__(self, name):
            return getattr(self.parts[here.index], name)

        def __getitem__(self, key):
            return self.parts[here.index][key]

        def __setitem__(self, key, value):
            self.parts[here.index][key] = value

        def __contains__(self, key):
            return key in self.parts[here.index]

    monkeypatch.setattr(distributed, "_calls", PerThread(counts))
    monkeypatch.setattr(distributed, "_stops", PerThread(stops))

    def run(function):
        out = [None, None]

        def one(index):
            here.index = index
            try:
                out[index] = function(index)
            except ConfigError as error:
                out[index] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return out

    return run


def test_a_value_of_the_first_process_is_everybodys(two):
    given = two(lambda i: [distributed.from_main("x", i + 5), distributed.from_main("x", {"a": i})])
    assert given == [[5, {"a": 0}]] * 2


def test_processes_that_differ_are_named_on_all(two):
    assert two(lambda i: distributed.agree("the config", {"seed": 0})) == [None, None]
    for error in two(lambda i: distributed.agree("the config", {"seed": i})):
        assert isinstance(error, ConfigError) and 'process 1 has {"seed": 1}, process 0 has {"seed": 0}' in str(error)


@pytest.mark.parametrize("asking", [(0,), (1,), (0, 1)])
def test_all_stop_at_the_same_step(two, asking):
    """Two loops that are at most one step apart, as collectives keep them; the signal comes in step 4 of some."""
    steps = [threading.Semaphore(1), threading.Semaphore(1)]

    def loop(index):
        for step in range(1, 50):
            assert steps[index].acquire(timeout=10)
            steps[1 - index].release()  # the other may start its next step
            if distributed.stop_at("sft", step, step >= 4 and index in asking):
                for other in steps:
                    other.release(50)
                return step
        return None

    stopped = two(loop)
    assert stopped[0] == stopped[1] and stopped[0] in (5, 6, 7), stopped


# One run


RECORDS = """
import json, os, sys
from pathlib import Path
import numpy as np
import jax, jax.numpy as jnp
from rich.console import Console
from alignax import configs, distributed, stage_data, step, train
folder, pairs = Path(sys.argv[1]), sys.argv[2]
index, count = int(os.environ["ALIGNAX_PROCESS_ID"]), int(os.environ.get("ALIGNAX_PROCESS_COUNT", "1"))
if count > 1:
    distributed.start({"coordinator": os.environ["ALIGNAX_COORDINATOR"], "process_count": count, "process_id": index},
                      folder / "w", timeout=120)
from alignax import launch
launch.compilation_cache()
ids, make, update_of = [], stage_data.Batches.make, step.make_update

def recorded(self, *rest):
    batch = make(self, *rest)
    ids.append({str(s.index[0].start or 0): np.asarray(s.data).tolist() for s in batch.ids.addressable_shards})
    return batch

def with_key(*rest, **more):
    update = update_of(*rest, **more)
    def inner(state, ref, batch, hyper, key, frozen=None):
        new, metrics = update(state, ref, batch, hyper, key, frozen)
        words = jax.random.key_data(key)
        halves = jnp.concatenate([words >> 16, words & 0xffff]).astype(jnp.float32)
        return new, metrics | {f"key{i}": (halves[i], jnp.float32(1)) for i in range(4)}
    return inner

stage_data.Batches.make, step.make_update = recorded, with_key
config = configs.base(tokenizer="builtin:stories", stages=("one", "many"))
config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
                                     head_dim=8, max_positions=64)
shared = dict(batch_size=16, log_every=1, checkpoint_every=100, eval_every=100, init="model")
records = dict(path=pairs, eval_fraction=0.3, eval_records=8)
config.one = configs.train_stage("kto", steps=1, accumulation=2, data=records,
                                 optim=dict(name="sgd", learning_rate=1.0, clip_norm=0.0), **shared)
config.many = configs.train_stage("beta_dpo", steps=20, layout="shared_prefix_packed", data=records,
                                  optim=dict(name="sgd", learning_rate=0.1, clip_norm=0.0), **shared)
train.run(config, folder / "w", console=Console(quiet=True))
(folder / f"ids{index}.json").write_text(json.dumps(ids))
"""


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """name -> folder of the same run: one process, eight simulated devices, two and four processes."""
    base = tmp_path_factory.mktemp("ways")
    (base / "worker.py").write_text(textwrap.dedent(RECORDS))
    stories = data.story_records(seed=0, split="train", n=65)
    words = [" ".join(s.completions[0].split()[:8]) for s in stories]
    data.write_jsonl(base / "pairs.jsonl", [data.Record(id=f"r{i}", prompt=stories[i].prompt, completions=(
        " " + words[i], " " + words[i + 1])) for i in range(64)])
    out = {}
    for name, count, devices in (("one", 1, 1), ("devices", 1, 8), ("two", 2, 1), ("four", 4, 2)):
        folder = base / name
        folder.mkdir()
        processes = hosts.start(lambda i, f=folder: [str(base / "worker.py"), str(f), str(base / "pairs.jsonl")], count,
                                folder, devices=devices)
        for code, text in hosts.finish(processes, folder):
            assert code == 0, text[-4000:]
        out[name] = folder
    return out


def params(folder: Path, stage: str) -> dict[str, np.ndarray]:
    """The parameters that a stage left, flat; of `model`, the starting ones."""
    from alignax import context

    config = json.loads((folder / "w" / "config.json").read_text())
    vocab = context.load_tokenizer(config["tokenizer"], "").vocab_size
    _, initial = context.load_model(config["model"], vocab_size=vocab, seed=config["seed"])
    tree = context.stage_params(folder / "w", stage, initial)
    return {sharding.path_name(p): np.asarray(v) for p, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


def rows(folder: Path, stage: str) -> list[dict]:
    """The stage's training rows without timings."""
    lines = [json.loads(line) for line in (folder / "w" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.endswith("_per_second")} for r in lines
            if r["stage"] == stage and r["split"] == "train"]


OTHERS = ("devices", "two", "four")


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_gradients_of_one_step_are_equal(ways, way):
    start, after, same = params(ways["one"], "model"), params(ways["one"], "one"), params(ways[way], "one")
    assert max(np.abs(start[n] - after[n]).max() for n in start) > 1e-3
    for name in start:  # plain SGD at rate 1: the change is the gradient
        np.testing.assert_allclose(start[name] - same[name], start[name] - after[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_twenty_steps_are_equal(ways, way):
    start, after, same = params(ways["one"], "model"), params(ways["one"], "many"), params(ways[way], "many")
    assert max(np.abs(start[n] - after[n]).max() for n in start) > 1e-3
    for name in start:
        np.testing.assert_allclose(same[name], after[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_order_keys_and_logged_numbers_are_equal(ways, way):
    def order(folder: Path) -> list[list[int]]:
        per_process = [json.loads(p.read_text()) for p in sorted(folder.glob("ids*.json"))]
        batches = []
        for parts in zip(*per_process, strict=True):
            joined = {int(k): v for part in parts for k, v in part.items()}
            batches.append([i for start in sorted(joined) for i in joined[start]])
        return batches

    assert order(ways[way]) == order(ways["one"]) and len(order(ways["one"])) >= 21
    for stage in ("one", "many"):
        left, right = rows(ways[way], stage), rows(ways["one"], stage)
        assert [r["step"] for r in left] == [r["step"] for r in right]
        for a, b in zip(left, right, strict=True):
            assert [a[f"key{i}"] for i in range(4)] == [b[f"key{i}"] for i in range(4)]
            for name in b.keys() - {"stage", "split"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (name, a["step"])
    assert len({tuple(r[f"key{i}"] for i in range(4)) for r in rows(ways["one"], "many")}) == 20


@pytest.mark.slow
def test_each_process_lays_out_only_its_own_records(ways):
    """Two processes: each saw half of every batch, and the halves are disjoint."""
    both = [json.loads(p.read_text()) for p in sorted(ways["two"].glob("ids*.json"))]
    for left, right in zip(*both, strict=True):
        assert len(left) == len(right) == 1 and left.keys().isdisjoint(right.keys())


@pytest.mark.slow
def test_only_one_process_writes(ways):
    lines = (ways["two"] / "w" / "metrics.jsonl").read_text().splitlines()
    seen = [(r["stage"], r["split"], r["step"]) for r in map(json.loads, lines)]
    assert len(seen) == len(set(seen))
    assert not list((ways["two"] / "w").glob("run.lock*"))
