"""Prepared datasets: what is read is what was written, bytes are a function of the sources, kills cost nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from alignax.data import prefetch, store
from alignax.data.ledger import Ledger
from alignax.data.messages import Message
from alignax.data.plan import Plan
from alignax.data.records import Record, read_jsonl, write_jsonl
from alignax.types import ConfigError, DataError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("grain")

pytestmark = pytest.mark.slow  # TFDS is an extra

SHARD = 10


def every_kind(n: int = 50) -> list[Record]:
    """n pairs over 7 prompts, and one record of every other kind, with characters that are not ASCII."""
    turns = (Message("user", "grüß dich 🐈"),)
    tool = Message("assistant", "b", {"thinking": "t", "tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5]}}]})
    others = [
        Record("list", "p", ("a", "b", "c"), scores=(3.0, 2.5, -1e-9), labels=(1.0, 0.0, 1.0)),
        Record("label", "p", ("a",), labels=(0.0,)),
        Record("prompt", "only a prompt"),
        Record("text", "", ("plain\u2028text\x00\r\n",)),
        Record("dialogue", turns, ((Message("assistant", "a"),), (tool, *turns, Message("assistant", "c"))),
               margin=0.1 + 0.2, tools=({"name": "f"},), extra={"answer": "18", "k": [1, {"z": None}]}),
    ]
    return [Record(f"r{i}", f"prompt {i % 7}", (f"good {i}", f"bad {i}"), margin=0.25 if i % 2 else None)
            for i in range(n)] + others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `all.jsonl` and its prepared form `out`, in several shards."""
    root = tmp_path_factory.mktemp("store")
    write_jsonl(root / "all.jsonl", every_kind())
    store.prepare(root / "all.jsonl", root / "out", eval_fraction=0.3, shard_records=SHARD)
    return root


def contents(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_records_come_back_equal_and_in_order(folder):
    records = read_jsonl(folder / "all.jsonl")
    held_out = {r.id for r in store.open_store(folder / "out", "eval")}
    train = store.open_store(folder / "out")
    assert len(train) + len(held_out) == len(records) and len(train) > 2 * SHARD and held_out
    assert list(train) == [r for r in records if r.id not in held_out]
    assert list(store.open_store(folder / "out", "eval")) == [r for r in records if r.id in held_out]


def test_random_access(folder):
    train = store.open_store(folder / "out")
    records = list(train)
    places = np.random.default_rng(0).permutation(len(records))
    assert [train[int(i)] for i in places[:9]] == [records[i] for i in places[:9]]
    assert train.__getitems__(places) == [records[i] for i in places]
    assert train[-1] == records[-1] and train[3:40:7] == records[3:40:7] and train[5:5] == []
    with pytest.raises(IndexError, match=f"of {len(records)}"):
        train[len(records)]


def test_tfds_reads_the_columns_without_tensorflow(folder):
    code = (
        "import sys, json, math, tensorflow_datasets as tfds\n"
        f"s = tfds.builder_from_directory({str(folder / 'out')!r}).as_data_source()\n"
        "rows = {r['id'].decode(): r for split in s.values() for r in split}\n"
        "assert 'tensorflow' not in sys.modules and 'alignax' not in sys.modules\n"
        "r = rows['list']; assert [c.decode() for c in r['completions']] == ['a', 'b', 'c']\n"
        "assert [round(float(x), 12) for x in r['scores']] == [3.0, 2.5, -1e-9] and list(r['labels']) == [1, 0, 1]\n"
        "assert math.isnan(r['margin'])\n"
        "r = rows['r1']; assert r['margin'] == 0.25 and r['line'] == 2 and not r['dialogue'] and not len(r['scores'])\n"
        "assert r['prompt'] == b'prompt 1' and r['file'].endswith(b'all.jsonl')\n"
        "r = rows['dialogue']; assert r['dialogue'] and json.loads(r['prompt'])[0]['role'] == 'user'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_equal_calls_give_equal_bytes(folder, tmp_path):
    store.prepare(folder / "all.jsonl", tmp_path / "again", eval_fraction=0.3, shard_records=SHARD)
    assert contents(tmp_path / "again") == contents(folder / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]  # no working folder stays behind


def test_a_prepared_folder_is_not_made_twice_and_other_content_is_refused(folder, tmp_path):
    before = contents(folder / "out")
    same = store.prepare(folder / "all.jsonl", folder / "out", eval_fraction=0.3, shard_records=SHARD)
    assert not same.fresh and sum(same.counts.values()) == 55 and same.ledger.kept == 55
    with pytest.raises(ConfigError, match="what differs: eval_fraction, shard_records"):
        store.prepare(folder / "all.jsonl", folder / "out", eval_fraction=0.4, shard_records=SHARD + 1)
    write_jsonl(tmp_path / "all.jsonl", every_kind(51))
    with pytest.raises(ConfigError, match="what differs: sources"):
        store.prepare(tmp_path / "all.jsonl", folder / "out", eval_fraction=0.3, shard_records=SHARD)
    assert contents(folder / "out") == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    for name in ("thesis", "all.jsonl"):
        with pytest.raises(ConfigError, match="holds something else"):
            store.prepare(tmp_path / "all.jsonl", tmp_path / name)
    assert (tmp_path / "thesis" / "chapter").read_text() == "x"


def test_the_manifest_names_sources_and_shards(folder):
    manifest = store.read_manifest(folder / "out")
    source = manifest["request"]["sources"]["train"][0]
    import hashlib
    assert source["sha256"] == hashlib.sha256((folder / "all.jsonl").read_bytes()).hexdigest()
    assert source["path"] == str(folder / "all.jsonl") and manifest["ledger"]["kept"] == 55
    for name, stored in manifest["files"].items():
        assert stored["sha256"] == hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest()


KILLED = """
import os, signal
from alignax.data import store, tfds_builder
columns, rows = tfds_builder.columns, []
def fatal(record):
    rows.append(record)
    if len(rows) == 275:
        os.kill(os.getpid(), signal.SIGKILL)
    return columns(record)
tfds_builder.columns = fatal
store.prepare({source!r}, {out!r}, eval_fraction=0.1, shard_records=50)
"""


def test_a_kill_in_the_middle_costs_no_finished_shard_and_no_byte(tmp_path):
    """kill -9 inside the sixth shard; the same call goes on behind the five finished ones and gives the same bytes."""
    source, out = tmp_path / "big.jsonl", tmp_path / "out"
    write_jsonl(source, [Record(f"r{i}", f"p{i}", ("a" * 200, f"b{i}")) for i in range(1000)])
    killed = subprocess.run([sys.executable, "-c", KILLED.format(source=str(source), out=str(out))], timeout=120)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    done = tmp_path / ".out.partial" / "shards"
    finished = {p.name: p.stat().st_ino for p in done.iterdir() if not p.name.endswith(".tmp")}
    assert len(finished) == 5 and len(list(done.iterdir())) == 6
    made = store.prepare(source, out, eval_fraction=0.1, shard_records=50)
    assert made.fresh and sum(made.counts.values()) == 1000
    assert {name: (out / name).stat().st_ino for name in finished} == finished  # taken, not written again
    store.prepare(source, tmp_path / "whole", eval_fraction=0.1, shard_records=50)
    assert contents(out) == contents(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"big.jsonl", "out", "whole"}


def test_shards_of_another_request_are_not_taken(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", every_kind())
    done = tmp_path / ".out.partial" / "shards"
    done.mkdir(parents=True)
    (tmp_path / ".out.partial" / "request.json").write_text("{}")
    (done / "preferences-train.array_record-00000-of-00001").write_bytes(b"of another dataset")
    store.prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert list(store.open_store(tmp_path / "out")) == read_jsonl(tmp_path / "a.jsonl")


def test_two_processes_do_not_prepare_one_folder_at_once(tmp_path):
    import fcntl
    write_jsonl(tmp_path / "a.jsonl", every_kind())
    (tmp_path / ".out.partial").mkdir()
    with open(tmp_path / ".out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another process"):
            store.prepare(tmp_path / "a.jsonl", tmp_path / "out")


# Splits

def test_the_split_is_a_function_of_the_prompt_or_the_id():
    records = every_kind(400)[:400]
    by_prompt = {r.id: store.eval_share(r, "prompt") for r in records}
    assert len(set(by_prompt.values())) == 7  # one place per prompt
    shares = [store.eval_share(r, "id") for r in records]
    assert len(set(shares)) == 400 and abs(np.mean(np.less(shares, 0.25)) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert shares == [store.eval_share(Record(r.id, "other", file="elsewhere"), "id") for r in records]
    empty = [Record(f"t{i}", "", ("x",)) for i in range(5)]
    assert len({store.eval_share(r, "prompt") for r in empty}) == 5  # texts without a prompt do not fall together
    with pytest.raises(ConfigError, match="allowed are"):
        store.eval_share(records[0], "file")


def test_given_splits(tmp_path):
    records = every_kind()
    write_jsonl(tmp_path / "a.jsonl", records[:30])
    write_jsonl(tmp_path / "b.jsonl", records[30:40])
    write_jsonl(tmp_path / "c.jsonl", records[40:])
    made = store.prepare({"train": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "eval": tmp_path / "c.jsonl"},
                         tmp_path / "out")
    assert made.counts == {"train": 40, "eval": 15}
    assert [r.id for r in store.load_records(tmp_path / "out")] == [r.id for r in records[:40]]
    assert [r.id for r in store.load_records(tmp_path / "out", split="eval")] == [r.id for r in records[40:]]


def test_one_entrance_for_files_and_folders(folder):
    from_file, from_folder = Ledger(), Ledger()
    records = store.load_records(folder / "all.jsonl", ledger=from_file)
    assert records == read_jsonl(folder / "all.jsonl")
    assert store.load_records(folder / "out", ledger=from_folder) == list(store.open_store(folder / "out"))


@pytest.mark.parametrize("change, error, message", [
    (dict(eval_fraction=1.0), ConfigError, "eval_fraction is 1.0"),
    (dict(eval_fraction=-0.1), ConfigError, "eval_fraction is -0.1"),
    (dict(eval_fraction=float("nan")), ConfigError, "eval_fraction is nan"),
    (dict(shard_records=0), ConfigError, "shard_records is 0"),
    (dict(split_by="file"), ConfigError, r"split_by is 'file', allowed are \['prompt', 'id'\]"),
    (dict(eval_fraction=1e-9), DataError, "split 'eval' is empty"),
    (dict(sources=[]), ConfigError, "no source files"),
    (dict(sources="absent.jsonl"), DataError, "absent.jsonl:0: no such file"),
    (dict(sources={"a b": "all.jsonl"}), ConfigError, "split name 'a b'"),
    (dict(sources={"train": "all.jsonl", "eval": "all.jsonl"}, eval_fraction=0.1), ConfigError, "has files of its own"),
    (dict(sources={"train": "all.jsonl", "eval": "all.jsonl"}), DataError, "already used at all.jsonl:1"),
    (dict(sources="prepared"), ConfigError, "is a prepared folder already"),
    (dict(out="no/such/out"), ConfigError, "no folder 'no/such'"),
])
def test_bad_requests_are_refused_and_leave_nothing(folder, tmp_path, monkeypatch, change, error, message):
    shutil.copy(folder / "all.jsonl", tmp_path / "all.jsonl")
    shutil.copytree(folder / "out", tmp_path / "prepared")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        store.prepare(**{"sources": "all.jsonl", "out": "out"} | change)
    assert {p.name for p in tmp_path.iterdir()} == {"all.jsonl", "prepared"}


def test_damaged_and_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="not a prepared folder"):
        store.open_store(tmp_path)
    with pytest.raises(ConfigError, match=r"no split 'test'; it has \['eval', 'train'\]"):
        store.open_store(folder / "out", "test")
    shutil.copytree(folder / "out", tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*train*"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(DataError, match=f"{shard.name}:0: .* bytes.*damaged"):
        store.open_store(tmp_path / "cut")
    shard.unlink()
    with pytest.raises(DataError, match="no such file.*damaged"):
        store.open_store(tmp_path / "cut")
    (tmp_path / "cut" / store.MANIFEST).write_text(json.dumps({"records": {}}))
    with pytest.raises(ConfigError, match="not the alignax.json"):
        store.open_store(tmp_path / "cut")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python.array_record_module"])
def test_a_missing_package_is_named_with_its_extra(folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"alignax\[data\]"):
        store.prepare(folder / "all.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"alignax\[data\]"):
        store.open_store(folder / "out")[0]
    assert not list(tmp_path.iterdir())


# Reading ahead

def ids(records: list[Record]) -> list[str]:
    """What the workers make of a batch; at module level, so that it can be pickled."""
    return [record.id for record in records]


def test_batches_follow_the_plan_from_any_position(folder):
    train = store.open_store(folder / "out")
    everything = list(train)
    plan = Plan(len(train), 6, seed=3)
    for position in (0, 5, 40):  # beyond one epoch too
        stream = prefetch.batches(train, plan, position, threads=2, ahead=3)
        for step in range(position, position + 9):
            found, records = next(stream)
            assert found == step and records == [everything[i] for i in plan.batch_indices(step)]
    shares = [prefetch.batches(everything, plan, 2, process=p, processes=3, transform=ids) for p in range(3)]
    assert [name for share in shares for name in next(share)[1]] == [everything[i].id for i in plan.batch_indices(2)]


def test_bad_batches_are_refused(folder):
    train = store.open_store(folder / "out")
    plan = Plan(len(train), 6)
    with pytest.raises(ConfigError, match=f"{len(train)} records, the plan orders 9"):
        prefetch.batches(train, Plan(9, 3))
    with pytest.raises(ConfigError, match="ahead is 0"):
        prefetch.batches(train, plan, ahead=0)
    with pytest.raises(ConfigError, match="processes to divide"):
        prefetch.batches(train, plan, processes=4)


def test_reading_ahead_without_grain_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ConfigError, match=r"alignax\[data\]"):
        prefetch.batches(["a", "b"], Plan(2, 1))


def test_a_store_opens_again_where_it_is_unpickled(folder):
    train = store.open_store(folder / "out")
    first = train[0]
    assert pickle.loads(pickle.dumps(train))[0] == first


def test_worker_processes_give_the_same_batches(folder):
    train = store.open_store(folder / "out")
    plan = Plan(len(train), 6, seed=3)
    stream = prefetch.batches(train, plan, 4, transform=ids, workers=2)
    for step in range(4, 12):
        found, names = next(stream)
        assert found == step and names == [train[int(i)].id for i in plan.batch_indices(step)]
    stream.close()
