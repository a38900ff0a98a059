"""Sweeps: the algebra, what is refused before any run, resuming and retrying, results, statistics, and the report."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alignax import cli, context, presence, sweep
from alignax.diagnostics import pages, report_sweep
from alignax.diagnostics import sweep_statistics as statistics
from alignax.sweep import processes, results
from alignax.types import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = '''
from alignax import configs
from alignax.sweep import chain, product, values

def get_config(arg=""):
    given, _ = configs.arguments(arg, loss="dpo")
    config = configs.base(tokenizer="builtin:stories", stages=("method",))
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=64, unroll=2)
    config.method = configs.train_stage(given["loss"], data=dict(path={path!r}), steps=2, batch_size=2, log_every=1,
                                        eval_every=2)
    return config

{sweep}
'''
GRID = '''
def sweep(add):
    for settings in product(chain(product(values("loss", ("dpo",)), values("method.loss.beta", (0.1, 0.3))),
                                  product(values("loss", ("ipo",)), values("method.loss.tau", (0.2,)))),
                            values("method.optim.learning_rate", (1e-3, 1e-2))):
        add(**settings)
'''
PAIR = '{"prompt": "tom was at the park .", "chosen": "he smiled .", "rejected": "he cried ."}\n'


@pytest.fixture
def place(tmp_path):
    """place(sweep) writes data and a config with that sweep; returns the command line of `alignax sweep`."""

    def write(text: str = GRID) -> list[str]:
        (tmp_path / "data.jsonl").write_text(PAIR * 4)
        (tmp_path / "config.py").write_text(CONFIG.format(sweep=text, path=str(tmp_path / "data.jsonl")))
        return ["sweep", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "out")]

    return write


def members(argv: list[str], tmp_path, **options):
    """The members that the command would run."""
    from alignax.commands.sweep import members_of

    return members_of(argv[2], tmp_path / "out", **options)


# The algebra


def test_product_zip_and_chain():
    a, b = sweep.values("a", (1, 2)), sweep.values("b", ("x", "y"))
    assert sweep.product(a, b) == [{"a": i, "b": j} for i, j in itertools.product((1, 2), "xy")]
    assert sweep.zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert sweep.chain(a, b) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    assert sweep.product() == [{}]
    for wrong in (lambda: sweep.product(a, a), lambda: sweep.zipped(a, sweep.values("b", (1,))),
                  lambda: sweep.values("a", ())):
        with pytest.raises(ConfigError, match="sweep"):
            wrong()


def test_draws_repeat_with_their_seed_and_stay_in_range():
    drawn = sweep.log_uniform(1e-5, 1e-1, 4000, seed=3)
    assert drawn == sweep.log_uniform(1e-5, 1e-1, 4000, seed=3) != sweep.log_uniform(1e-5, 1e-1, 4000, seed=4)
    assert min(drawn) >= 1e-5 and max(drawn) <= 1e-1
    shares = np.histogram(np.log10(drawn), bins=4, range=(-5, -1))[0] / len(drawn)
    np.testing.assert_allclose(shares, 0.25, atol=0.03)  # as many draws in every decade
    assert set(sweep.choice(("a", "b"), 50, seed=0)) == {"a", "b"}
    for wrong in (lambda: sweep.log_uniform(0, 1, 2, 0), lambda: sweep.uniform(1, 1, 2, 0),
                  lambda: sweep.choice((), 2, 0)):
        with pytest.raises(ConfigError, match="sweep"):
            wrong()


@pytest.mark.parametrize("text, found", [
    ("a.b=1,2.5,1e-4", [1, 2.5, 1e-4]), ("a.b=dpo,ipo", ["dpo", "ipo"]), ("a.b=(0.9, 0.95),(0.8,0.9)",
                                                                          [(0.9, 0.95), (0.8, 0.9)]),
    ("a.b=true,False", [True, False]), ("a.b='x,y',z", ["x,y", "z"])])
def test_values_of_the_command_line(text, found):
    assert [one["a.b"] for one in sweep.parse(text)] == found


@pytest.mark.parametrize("text", ["a.b", "=1", "a.b=", "a.b=1,,2"])
def test_values_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="--sweep="):
        sweep.parse(text)


# Members


def test_members_have_settings_structure_and_seeds(place, tmp_path):
    found = members(place(), tmp_path, seeds=3)
    assert len(found) == 6 * 3
    assert [m.name for m in found[:4]] == ["0-s0", "0-s1", "0-s2", "1-s0"]
    assert [m.config.seed for m in found[:4]] == [0, 1, 2, 0]
    first, last = found[0], found[-1]
    assert first.config.method.loss.beta == 0.1 and first.config.method.optim.learning_rate == 1e-3
    assert last.config.method.loss.name == "ipo" and last.config.method.loss.tau == 0.2
    assert last.argument == "loss=ipo" and last.factors["loss"] == "ipo" and last.factors["seed"] == 2
    assert "method.loss.beta" not in last.factors


def test_the_command_line_of_a_member_gives_its_config(place, tmp_path):
    from alignax import launch

    argv = place()
    for member in members(argv, tmp_path, axes=["method.optim.name=adamw,sgd", "method.loss.name=dpo"][:1],
                          overrides=["method.steps=4"]):
        line = processes.command(member, argv[2])
        overrides = [text.removeprefix("--config.") for text in line if text.startswith("--config.")]
        assert launch.load_config(line[2], overrides).to_dict() == member.config.to_dict()
        assert member.config.method.steps == 4


@pytest.mark.parametrize("text, words", [
    ("add(**{'method.los.beta': 0.1})", ("did you mean 'loss'", "allowed in config.method")),
    ("add(**{'method.loss.tau': 0.1})", ("config.method.loss.tau", "beta")),
    ("add(**{'method.loss.beta': 'x'})", ("expected a value of type float",)),
    ("add(**{'method.steps': 2.5})", ("expected a value of type int",)),
    ("add(**{'method.optim.master': 1})", ("type bool",)),
    ("add(**{'tokenizer': 3})", ("type str",)),
    ("add(**{'method.loss.beta': float('nan')})", ("finite",)),
    ("add(**{'method.loss.beta': None})", ("NoneType", "allowed")),
    ("add(loss='dpoo')", ("dpoo", "dpo")),
    ("add(width=3)", ("unknown key",)),
    ("add(**{':width': 3})", ("config argument 'width=3'", "loss=dpo")),
    ("add(**{'method.batch_size': 3, 'method.accumulation': 2})", ("multiple",)),
    ("add(name='a'); add(name='b')", ("same config", "a and b")),
    ("add(name='a', **{'seed': 1}); add(name='a', **{'seed': 2})", ("two members", "'a'")),
    ("add(factors={'k': 1}, **{'seed': 1}); add(factors={'k': 1}, **{'seed': 2})", ("same factors",)),
    ("add(name='../a')", ("allowed in names",)),
    ("pass", ("never called add",)),
])
def test_bad_sweeps_are_refused_before_anything_runs(place, tmp_path, capsys, text, words):
    assert cli.main(place(f"def sweep(add):\n    {text}\n")) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra, words", [
    (["--config.method.optim.learning_rate=1"], ("learning_rate", "and so does")),
    (["--sweep", "method.optim.learning_rate=1,2"], ("two axes set",)),
    (["--sweep", "seed=1,2", "--seeds", "2"], ("sets the seed",)),
    (["--backend", "cloud"], ("--backend=cloud", "population, process, slurm, pod")),
    (["--backend", "pod"], ("alignax launch --members", "xpk|jobset|skypilot")),
    (["--backend", "process", "--base", "shared"], ("share no stages",)),
    (["--seeds", "-1"], ("--seeds=-1",)), (["--jobs", "0"], ("--jobs=0",)),
])
def test_bad_command_lines(place, tmp_path, capsys, extra, words):
    assert cli.main([*place(), *extra]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_sweep_needs_axes_or_seeds(place, tmp_path, capsys):
    argv = place("")
    assert cli.main(argv) == 2 and "defines no sweep(add)" in capsys.readouterr().err
    assert len(members(argv, tmp_path, axes=["method.loss.beta=0.1,0.3", "method.steps=1,2"])) == 4
    assert [m.config.seed for m in members(argv, tmp_path, seeds=2, overrides=["seed=7"])] == [7, 8]


def test_single_stage_configs_are_swept_by_their_own_keys(tmp_path):
    (tmp_path / "c.py").write_text("from alignax import configs\n\ndef get_config(arg=''):\n"
                                   "    given, _ = configs.arguments(arg, loss='dpo')\n"
                                   "    return configs.single(given['loss'], steps=2)\n")
    found = members(["", "", str(tmp_path / "c.py")], tmp_path, axes=["loss.beta=0.1,0.3", ":loss=dpo,simpo"])
    assert [(m.config.train.loss.name, m.config.train.loss.beta) for m in found] == [
        ("dpo", 0.1), ("simpo", 0.1), ("dpo", 0.3), ("simpo", 0.3)]
    with pytest.raises(ConfigError, match=r"config\.truncation='x'"):
        members(["", "", str(tmp_path / "c.py")], tmp_path, axes=["truncation=x"])


# Running: the backend is replaced by one that writes results at once


@pytest.fixture
def engine(monkeypatch):
    """engine.fails: name -> (how often it still fails, whether for good); engine.tried: names in order."""

    class Engine:
        fails: dict[str, tuple[int, bool]] = {}
        tried: list[str] = []

        def __call__(self, members, folder, file, *, jobs, ended):
            for member in members:
                self.tried.append(member.name)
                left, final = self.fails.get(member.name, (0, False))
                if left:
                    self.fails[member.name] = left - 1, final
                    ended(member.name, "it broke", final)
                    continue
                member.folder.mkdir(parents=True, exist_ok=True)
                lr = member.config.method.optim.learning_rate
                (member.folder / "result.json").write_text(json.dumps({
                    "win_rate": 0.5 + lr, "stages": {"method": {"eval": {"loss": lr}, "seconds": 3.0}}}))
                ended(member.name, "", False)

    one = Engine()
    one.fails, one.tried = {}, []
    monkeypatch.setattr(sweep, "run_processes", one)
    return one


def rows_of(tmp_path) -> dict[str, dict]:
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    return {row["member"]: row for row in map(json.loads, lines)}


@pytest.mark.slow
def test_failed_members_are_tried_again_and_told(place, tmp_path, engine, capsys):
    argv = [*place(), "--backend", "process"]
    engine.fails = {"1": (1, False), "2": (5, False), "3": (5, True)}
    assert cli.main([*argv, "--retries", "2"]) == 1
    assert engine.tried == ["0", "1", "2", "3", "4", "5", "1", "2", "2"]  # 3 would fail again: once is enough
    rows = rows_of(tmp_path)
    assert [rows[name]["state"] for name in "012345"] == ["finished", "finished", "failed", "failed", "finished",
                                                          "finished"]
    assert rows["2"]["reason"] == "it broke" and rows["0"]["metrics"] == {"win_rate": 0.501, "method.eval.loss": 0.001}
    assert "2: failed: it broke" in capsys.readouterr().out
    # The same command goes on with what is not finished, and with nothing else.
    engine.tried.clear()
    engine.fails = {}
    assert cli.main(argv) == 0 and engine.tried == ["2", "3"]
    assert {row["state"] for row in rows_of(tmp_path).values()} == {"finished"}
    assert json.loads((tmp_path / "out" / "status.json").read_text()) == {}


def test_a_changed_sweep_is_refused_with_its_differences(place, tmp_path, engine, capsys):
    argv = [*place(), "--backend", "process"]
    assert cli.main(argv) == 0
    stored = (tmp_path / "out" / "sweep.json").read_bytes()
    for extra, words in ((["--seeds", "2"], ("member 0: stored, not given", "member 0-s0: given, not stored")),
                         (["--config.method.steps=3"],
                          ("members 0, 1, 2 and 3 more: config.method.steps: stored 2, given 3",)),
                         (["--backend", "population"], ("--base", "stored own, given shared"))):
        assert cli.main([*argv, *extra]) == 2
        error = capsys.readouterr().err
        assert "holds another sweep" in error and all(word in error for word in words), error
    assert (tmp_path / "out" / "sweep.json").read_bytes() == stored


def test_a_folder_of_something_else_is_refused(place, tmp_path, engine, capsys):
    argv = [*place(), "--backend", "process"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    assert cli.main(argv) == 2 and "holds no sweep" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.slow
def test_one_sweep_at_a_time_in_a_folder_and_the_dead_hold_none(place, tmp_path, engine, capsys):
    argv = [*place(), "--backend", "process"]
    assert cli.main(argv) == 0
    with presence.locked(tmp_path / "out"):
        assert cli.main(argv) == 2 and "in use by" in capsys.readouterr().err
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    (tmp_path / "out" / presence.LOCK).write_text(json.dumps(presence.whoami() | {"pid": dead.pid, "born": 1}))
    assert cli.main(argv) == 0 and "which is gone" in capsys.readouterr().out


@pytest.mark.slow
def test_dry_run_prints_the_members_and_writes_nothing(place, tmp_path, capsys):
    assert cli.main([*place(), "--seeds", "2", "--dry-run", "--no-estimate"]) == 0
    out = capsys.readouterr().out
    assert "12 members, 2 groups" in out and "5-s1" in out and "to run" in out and "method.loss.tau" in out
    assert not (tmp_path / "out").exists()


# Processes


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Members as short Python scripts in place of `alignax train`; scripted(name=code, ...) returns the members."""

    def start(member, file, logs, paths):
        with (logs / f"{member.name}.txt").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", member.argument], stdout=log, stderr=subprocess.STDOUT)

    monkeypatch.setattr(processes, "_start", start)
    return lambda **codes: [sweep.Member(n, None, tmp_path / n, code, (), {}) for n, code in codes.items()]


@pytest.mark.slow
def test_how_a_process_ended_is_told(scripted, tmp_path):
    ends = {}
    found = scripted(good="pass", bad="print('error: step 3 is not finite'); print('bye'); raise SystemExit(3)",
                     killed="import os; os.kill(os.getpid(), 9)", odd="raise ValueError('no')")
    sweep.run_processes(found, tmp_path, "f.py", jobs=3, ended=lambda name, *end: ends.setdefault(name, end))
    assert ends["good"] == ("", False)
    assert ends["bad"] == ("step 3 is not finite (exit code 3; logs/bad.txt)", True)
    assert ends["killed"] == ("it printed nothing (ended by signal 9; logs/killed.txt)", False)
    assert ends["odd"][0].startswith("ValueError: no (exit code 1") and not ends["odd"][1]


@pytest.mark.slow
def test_sigterm_reaches_the_processes_and_nothing_counts_as_failed(scripted, tmp_path):
    code = ("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); open(r'{0}', 'w').close(); "
            "time.sleep(60)")
    ready, ends = tmp_path / "ready", []

    def stop():
        while not ready.exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(context.Preempted):
        sweep.run_processes(scripted(a=code.format(ready), b="pass"), tmp_path, "f.py", jobs=1,
                            ended=lambda *end: ends.append(end))
    # One that ends in order by the same signal, before this process has passed it on, has not failed either.
    with pytest.raises(context.Preempted):
        sweep.run_processes(scripted(a="import os, sys; os.kill(os.getppid(), 15); sys.exit(75)"), tmp_path, "f.py",
                            jobs=1, ended=lambda *end: ends.append(end))
    assert ends == []


# Results


@pytest.mark.slow
def test_numbers_of_a_result_by_name(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"factors": ["k", "a"], "members": [
        {"name": "a", "factors": {"a": 2, "k": 1}}, {"name": "b", "factors": {"k": "x"}}]}))
    folder = tmp_path / "members" / "a"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({
        "win_rate": 0.75, "policy": "m", "win_rate_interval": [0.6, 0.9], "targets_met": True,
        "stages": {"m": {"steps": 3, "eval": {"loss": 0.5}, "fingerprint": "f", "seconds": 1.0},
                   "evaluate": {"headline": {"win_rate": 0.75}, "points": [{"policy": "m", "win_rate": 0.75}]}}}))
    rows, missing = results.write(tmp_path)
    assert list(rows[0]["factors"]) == ["k", "a"]  # as the sweep has them
    assert missing == "" and [row["state"] for row in rows] == ["finished", "pending"]
    assert rows[0]["metrics"] == {"win_rate": 0.75, "targets_met": 1.0, "m.steps": 3.0, "m.eval.loss": 0.5,
                                  "evaluate.m.win_rate": 0.75}
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert table[0]["m.eval.loss"] == 0.5 and table[1]["win_rate"] is None
    assert [row["factor.k"] for row in table] == ["1", '"x"']  # of two kinds: as texts


def test_without_pyarrow_the_lines_stand_and_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "sweep.json").write_text(json.dumps({"factors": [], "members": []}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "alignax[data]" in results.write(tmp_path)[1] and (tmp_path / "results.jsonl").exists()
    with pytest.raises(ConfigError, match="pyarrow"):
        results.write_parquet(tmp_path / "x.parquet", [])


# Statistics


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert statistics.interquartile_mean([0.0, 1.0, 2.0, 100.0]) == (1 + 2) / 2
    assert statistics.interquartile_mean(np.arange(8.0) ** 2) == (4 + 9 + 16 + 25) / 4
    assert statistics.interquartile_mean([1.0, 2.0, 9.0]) == 4.0  # a quarter of three is less than one


def test_the_interval_is_about_seeds_and_not_about_the_grid():
    calm = statistics.estimate([[0.0, 0.0], [1.0, 1.0]])
    assert (calm.value, calm.low, calm.high, calm.n) == (0.5, 0.5, 0.5, 4)
    grid = statistics.estimate([[0.0], [1.0], [0.0], [1.0]])  # one seed each: drawn from all alike
    assert grid.low < 0.5 < grid.high
    assert statistics.estimate([[3.0]]) == statistics.Estimate(3.0, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        statistics.estimate([[]])


@pytest.mark.slow
def test_the_interval_agrees_with_scipys_bootstrap():
    from scipy import stats

    values = np.random.default_rng(1).normal(size=40)
    ours = statistics.estimate([values])
    theirs = stats.bootstrap((values,), lambda v, axis: stats.trim_mean(v, 0.25, axis=axis), method="percentile",
                             n_resamples=4000, random_state=0).confidence_interval
    np.testing.assert_allclose((ours.low, ours.high), theirs, atol=0.05)


def design(noise: float = 0.0, drop: int = -1) -> list[dict]:
    """loss x rate x 4 seeds: 0.3 for ipo, and 0.1 per step of the rate, on top of each other."""
    rng = np.random.default_rng(0)
    rows = []
    for index, (loss, step, seed) in enumerate(itertools.product(("dpo", "ipo"), range(3), range(4))):
        value = 0.3 * (loss == "ipo") + 0.1 * step + 0.01 * seed + noise * rng.normal()
        failed = index == drop
        rows.append({"member": str(index), "state": "failed" if failed else "finished",
                     "reason": "step 7 is not finite" if failed else "",
                     "factors": {":loss"[1:]: loss, "method.optim.learning_rate": 10.0 ** (step - 4), "seed": seed},
                     "metrics": {} if failed else {"win_rate": value, "kl_on_policy": 1 - value}})
    return rows


def test_effects_are_those_of_the_design():
    loss, rate = statistics.effects(design(), "win_rate")
    assert (loss.factor, rate.factor) == ("loss", "method.optim.learning_rate")
    assert loss.spread == pytest.approx(0.3) and rate.spread == pytest.approx(0.2)
    behind = {level.label: level.behind for effect in (loss, rate) for level in effect.levels}
    assert behind["ipo"] is None and behind["0.01"] is None
    assert behind["dpo"].value == pytest.approx(-0.3) and behind["dpo"].n == 12
    assert behind["0.0001"].value == pytest.approx(-0.2) and behind["0.0001"].low == pytest.approx(-0.2)
    # A member that is missing biases a level's location, and no matched pair.
    holed = statistics.effects(design(drop=23), "win_rate")[0].levels
    assert holed[1].failed == 1 and holed[0].behind.value == pytest.approx(-0.3) and holed[0].behind.n == 11


def test_configurations_pool_seeds_and_order_by_what_is_better():
    best = statistics.configurations(design(), "win_rate")[0]
    assert best.factors == {"loss": "ipo", "method.optim.learning_rate": 0.01} and len(best.values) == 4
    assert best.estimate.value == pytest.approx(0.5 + 0.015) and best.estimate.low < best.estimate.high
    assert statistics.configurations(design(), "win_rate", lower=True)[0].factors["loss"] == "dpo"
    assert statistics.configurations(design(), "kl_on_policy", lower=True)[0].factors == best.factors


def test_many_numbers_are_ranged_and_names_shortened():
    rows = [{"member": str(i), "factors": {"x": float(i)}, "metrics": {"m": i}} for i in range(40)]
    labels, of = statistics.levels_of(rows, "x")
    assert len(labels) == 4 and sorted(map(list(of.values()).count, labels)) == [10, 10, 10, 10]
    assert statistics.short_names(["a.loss.beta", "b.loss.beta", "a.optim.rate"]) == {
        "a.loss.beta": "a.loss.beta", "b.loss.beta": "b.loss.beta", "a.optim.rate": "rate"}


# The report


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The report of a noisy design with one failed member; returns its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.json").write_text("{}")
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in design(0.02, drop=5)))
    report_sweep.write(folder, folder / "report", top=4, console=Console(quiet=True))
    return folder / "report"


class _Links(HTMLParser):
    """Every attribute of a page that could load something, and its images' kinds."""

    def __init__(self):
        super().__init__()
        self.loads, self.images = [], 0

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]


@pytest.mark.slow
def test_the_page_is_one_file(reported):
    text = (reported / "report.html").read_text()
    links = _Links()
    links.feed(text)
    assert links.images == 6 and all(link.startswith("data:image/svg+xml;base64,") for link in links.loads)
    assert not re.search(r"https?://|url\(|@import|fetch\(", text)
    assert "Failed: 5: step 7 is not finite" in text and "24 members: 23 finished, 1 failed" in text
    assert len(list((reported / "figures").glob("*.png"))) == 6


@pytest.mark.slow
def test_the_tables_hold_the_same_numbers(reported):
    best = statistics.configurations(design(0.02, drop=5), "win_rate")[0].estimate
    cells = [f"{best.value:.4g}", f"[{best.low:.4g}, {best.high:.4g}]"]
    for name in ("report.html", "report.md", "tables.tex"):
        text = (reported / name).read_text()
        assert all(cell in text for cell in cells), name
    assert r"learning\_rate" in (reported / "tables.tex").read_text()


@pytest.mark.slow
def test_the_table_sorts_in_a_browser(reported, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("no Chromium to open the page with")
    # All members: the column win_rate is clicked once and once more.
    script = """<script>
      const table = [...document.querySelectorAll("table.sortable")].at(-1);
      const head = [...table.tHead.rows[0].cells].find((h) => h.textContent === "win_rate");
      const column = head.cellIndex, read = () => [...table.tBodies[0].rows].map((r) => r.cells[column].dataset.sort);
      const out = [];
      for (let i = 0; i < 2; i++) { head.click(); out.push(read(), head.getAttribute("aria-sort")); }
      document.title = JSON.stringify(out);
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text((reported / "report.html").read_text().replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    if not title:
        pytest.skip(f"Chromium does not start here: {done.stderr[-200:]}")
    up, rising, down, falling = json.loads(title.group(1).replace("&quot;", '"'))
    numbers = [float(x) for x in up if x is not None]
    assert rising == "ascending" and numbers == sorted(numbers) and len(numbers) == 23 and up[-1] is None
    assert falling == "descending" and [float(x) for x in down if x is not None] == sorted(numbers, reverse=True)
    assert down[-1] is None  # the failed member stands last either way


def test_what_cannot_be_reported(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2 and "nothing to report" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("{}")
    assert cli.main(["report", str(tmp_path)]) == 2 and "results.jsonl is missing" in capsys.readouterr().err
    rows = design()
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(tmp_path), "--metric", "win"]) == 2
    assert "allowed" in (error := capsys.readouterr().err) and "kl_on_policy, win_rate" in error
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        report_sweep.write(tmp_path, tmp_path / "r", console=Console(quiet=True))


def test_latex_and_markdown_escape():
    assert pages.latex("a_b & 50% {x}") == r"a\_b \& 50\% \{x\}"
    assert pages.markdown_table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"
    assert "&lt;b&gt;" in pages.html_table(["<b>"], [["<i>"]])
    # A sentence may run over several lines; a name may not.
    assert pages.html_table(["a", "b"], [["a word " * 10, "a word"]]).count('class="long"') == 1


# Real runs


@pytest.mark.slow
def test_the_quickstart_grid_shares_its_pairs_and_needs_three_programs(tmp_path):
    from alignax import population

    file = str(ROOT / "experiments" / "sweeps" / "quickstart_grid.py")
    found = members(["", "", file + ":tiny"], tmp_path, seeds=2)
    assert len(found) == 3 * 4 * 3 * 2 and found[-1].name == "simpo-4-0.003-s1"
    assert found[-1].argument == "tiny,loss=simpo" and found[-1].config.method.loss.beta == 10.0
    assert [len(group) for group in population.groups(found)] == [24, 24, 24]
    assert [base.stages for base in population.bases(found)] == [("sft", "sample")]


@pytest.mark.slow
def test_a_population_is_swept_and_reported(place, tmp_path, capsys):
    argv = [*place(""), "--sweep", "method.optim.learning_rate=0.001,0.01", "--seeds", "2"]
    assert cli.main(argv) == 0
    rows = rows_of(tmp_path)
    assert list(rows) == ["0-s0", "0-s1", "1-s0", "1-s1"]
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert all(np.isfinite(row["metrics"]["method.train.loss"]) for row in rows.values())
    assert (tmp_path / "out" / "members" / "1-s1" / "config.json").exists()
    capsys.readouterr()
    assert cli.main(argv) == 0 and "4 of 4 members are finished already" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report" / "report.html").exists()


@pytest.mark.slow
def test_processes_run_and_a_diverged_member_is_told(place, tmp_path):
    argv = place("def sweep(add):\n    add(name='fine')\n    add(name='far', **{'method.optim.learning_rate': 1e30})\n")
    assert cli.main([*argv, "--backend", "process", "--jobs", "2", "--history"]) == 1
    rows = rows_of(tmp_path)
    assert rows["fine"]["state"] == "finished" and rows["far"]["state"] == "failed"
    assert "is not finite" in rows["far"]["reason"] and "exit code 3" in rows["far"]["reason"]
    lines = [json.loads(x) for x in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert {row["member"] for row in lines} >= {"fine"} and all("loss" in row for row in lines
                                                                if row["split"] == "train")
