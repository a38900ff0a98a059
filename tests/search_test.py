"""A sweep whose members optuna chooses: batches, resuming, what it is told, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
from sweep_test import CONFIG, PAIR

from alignax import cli, population, sweep
from alignax.commands import sweep_rules, sweep_search
from alignax.sweep import search
from alignax.types import ConfigError

SPACE = '''
def search(trial):
    return {"method.loss.beta": trial.suggest_float("beta", 0.01, 1.0, log=True),
            "method.optim.learning_rate": trial.suggest_categorical("rate", [1e-3, 1e-2])}
'''


@pytest.fixture
def place(tmp_path):
    """place(text) writes data and a config with that text; returns the command line of a search of six trials."""

    def write(text: str = SPACE) -> list[str]:
        (tmp_path / "data.jsonl").write_text(PAIR * 4)
        (tmp_path / "config.py").write_text(CONFIG.format(sweep=text, path=str(tmp_path / "data.jsonl")))
        return ["sweep", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "out"), "--backend",
                "process", "--trials", "6", "--at-once", "2", "--metric", "score:max"]

    return write


@pytest.fixture
def engine(monkeypatch):
    """In place of the processes: writes each result at once; engine.batches: names of each call; engine.broken: names
    that fail; engine.ends: after so many calls, KeyboardInterrupt."""

    class Engine:
        def __init__(self):
            self.batches, self.broken, self.ends = [], set(), None

        def __call__(self, members, folder, file, *, jobs, ended):
            if self.ends is not None and len(self.batches) >= self.ends:
                raise KeyboardInterrupt
            self.batches.append([m.name for m in members])
            for member in members:
                if member.name in self.broken:
                    ended(member.name, "it broke", True)
                    continue
                member.folder.mkdir(parents=True, exist_ok=True)
                method = member.config.method
                score = -abs(method.loss.beta - 0.3) + method.optim.learning_rate + 0.001 * member.config.seed
                (member.folder / "result.json").write_text(json.dumps({"score": score, "stages": {}}))
                ended(member.name, "", False)

    one = Engine()
    monkeypatch.setattr(sweep, "run_processes", one)
    return one


def plan_in(folder) -> dict:
    return json.loads((folder / "out" / "sweep.json").read_text())


def settings_in(folder) -> list[dict]:
    return [trial["settings"] for trial in plan_in(folder)["trials"]]


@pytest.mark.slow
def test_trials_are_numbered_run_in_batches_and_stand_in_the_table(place, tmp_path, engine, capsys):
    pytest.importorskip("optuna")
    argv = place()
    engine.broken = {"0003"}
    assert cli.main(argv) == 1  # one failed
    assert engine.batches == [["0000", "0001"], ["0002", "0003"], ["0004", "0005"]]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["member"] for row in rows] == [f"000{i}" for i in range(6)] and rows[3]["state"] == "failed"
    assert rows[0]["factors"] == settings_in(tmp_path)[0] == plan_in(tmp_path)["members"][0]["factors"]
    assert all(0.01 <= row["factors"]["method.loss.beta"] <= 1 for row in rows)
    # The same command goes on with what failed; a larger number asks for more.
    engine.broken, engine.batches = set(), []
    before = settings_in(tmp_path)
    assert cli.main(argv) == 0 and engine.batches == [["0003"]]
    argv[argv.index("--trials") + 1] = "8"
    assert cli.main(argv) == 0 and engine.batches[1:] == [["0006", "0007"]]
    assert settings_in(tmp_path)[:6] == before and len(plan_in(tmp_path)["members"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("ends", [0, 1, 2])
def test_an_interrupted_search_asks_for_what_it_would_have_asked_for(place, tmp_path, engine, ends):
    pytest.importorskip("optuna")
    argv = place()
    assert cli.main(argv) == 0
    whole = settings_in(tmp_path)
    (tmp_path / "out").rename(tmp_path / "first")
    engine.batches, engine.ends = [], ends
    with pytest.raises(KeyboardInterrupt):
        cli.main(argv)
    engine.ends = None
    assert cli.main(argv) == 0 and settings_in(tmp_path) == whole


@pytest.mark.slow
def test_every_trial_runs_with_all_seeds(place, tmp_path, engine):
    pytest.importorskip("optuna")
    assert cli.main([*place(), "--seeds", "2"]) == 0
    assert engine.batches[0] == ["0000-s0", "0000-s1", "0001-s0", "0001-s1"] and len(settings_in(tmp_path)) == 6


@pytest.mark.slow
def test_later_trials_follow_what_earlier_ones_came_to():
    """The same space, searched for its middle and away from it."""
    pytest.importorskip("optuna")
    space, mean = lambda trial: {"a": trial.suggest_float("x", 0.0, 1.0)}, {}
    for mode in ("min", "max"):
        trials, values = [], []
        while len(trials) < 40:
            fresh = search.ask(space, search.Search("gap", mode, 5), trials, values, 5)
            trials, values = trials + fresh, values + [abs(trial.settings["a"] - 0.3) for trial in fresh]
        mean[mode] = sum(values[20:]) / 20
    assert mean["min"] + 0.1 < mean["max"]


@pytest.mark.slow
def test_a_changed_space_or_config_is_refused(place, tmp_path, engine, capsys):
    pytest.importorskip("optuna")
    argv = place()
    assert cli.main(argv) == 0
    stored = (tmp_path / "out" / "sweep.json").read_bytes()
    for old, new, words in (("0.01, 1.0", "0.02, 1.0", "Stored distributions"),
                            ('"method.loss.beta"', '"method.optim.eps"', "Stored settings"),
                            ('"beta"', '"b"', "search(trial) of the config file has changed since trial 0000")):
        place(SPACE.replace(old, new))
        assert cli.main(argv) == 2 and words in capsys.readouterr().err
    place()
    for extra, words in ((["--config.method.steps=3"], "config.method.steps: stored 2, given 3"),
                         (["--metric", "score:min"], "search.mode: stored 'max', given 'min'"),
                         (["--seeds", "2"], "member 0000: stored, not given")):
        assert cli.main([*argv, *extra]) == 2 and words in capsys.readouterr().err
    assert (tmp_path / "out" / "sweep.json").read_bytes() == stored


@pytest.mark.slow
def test_a_small_space_ends_and_a_dry_run_writes_nothing(place, tmp_path, engine, capsys):
    pytest.importorskip("optuna")
    argv = place('def search(trial):\n'
                 '    return {"method.loss.beta": trial.suggest_categorical("b", [0.1, 0.2, 0.3])}\n')
    assert cli.main([*argv, "--dry-run", "--no-estimate"]) == 0
    assert "2 members" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert cli.main(argv) == 0 and "no more than 3 settings" in capsys.readouterr().out
    assert sorted(one["method.loss.beta"] for one in settings_in(tmp_path)) == [0.1, 0.2, 0.3]
    argv[-1] = "scor:max"
    (tmp_path / "out").rename(tmp_path / "first")
    assert cli.main(argv) == 2 and "allowed: score" in capsys.readouterr().err


@pytest.mark.slow
def test_what_optuna_is_told(monkeypatch):
    optuna = pytest.importorskip("optuna")
    told = []
    make = optuna.create_study

    def study(**settings):
        made = make(**settings)
        add = made.add_trial
        made.add_trial = lambda trial: (told.append((trial.state.name, trial.value)), add(trial))
        return made

    monkeypatch.setattr(optuna, "create_study", study)
    space = lambda trial: {"a": trial.suggest_float("x", 0, 1)}
    wanted = search.Search("m", "min", 4)
    first = search.ask(space, wanted, [], [], 4)
    fresh = search.ask(space, wanted, first, [0.5, "dropped", None, float("nan")], 1)
    assert told == [("COMPLETE", 0.5), ("PRUNED", None), ("FAIL", None), ("FAIL", None)] and len(fresh) == 1
    with pytest.raises(ConfigError, match="it returned None"):
        search.ask(lambda trial: None, wanted, [], [], 1)


# Without optuna


def test_the_extra_is_named_where_optuna_is_absent(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(place()) == 2
    assert "alignax[search]" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, words", [
    ({"--metric": "score"}, "--metric=score; expected NAME:max or NAME:min"), ({"--at-once": "0"}, "--at-once=0"),
    ({"--sweep": "method.steps=1,2"}, "a search chooses the values"), ({"--trials": "-1"}, "--trials=-1")])
def test_command_lines_that_do_not_fit(place, tmp_path, capsys, change, words):
    assert cli.main([*place(), *(word for pair in change.items() for word in pair)]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_without_a_space(place, capsys):
    assert cli.main(place("")) == 2 and "defines no search(trial)" in capsys.readouterr().err


def test_a_trial_comes_to_the_mean_of_its_seeds_or_to_nothing():
    found = [type("Member", (), {"name": name})() for name in ("0000-s0", "0000-s1", "0001-s0", "0001-s1", "0002")]
    row = lambda name, state, value: {"member": name, "state": state, "metrics": {"m": value} if value else {}}
    rows = [row("0000-s0", "finished", 1.0), row("0000-s1", "finished", 2.0), row("0001-s0", "finished", 1.0),
            row("0001-s1", "failed", 0), row("0002", "dropped", 5.0)]
    wanted = search.Search("m", "max", 8)
    assert sweep_search.values_of(wanted, 4, found, rows) == [1.5, None, "dropped", None]
    with pytest.raises(ConfigError, match="allowed: m"):
        sweep_search.values_of(search.Search("n", "max", 8), 1, found, rows)


# Rules that drop or stop members, on the command line and in the file


def test_rules_are_read_from_the_command_line_and_from_the_file():
    module = type("Module", (), {"sweep": lambda add: None})
    module.sweep.halving = dict(metric="loss", mode="min", rungs=(5, 10), keep=0.5)
    given = type("Arguments", (), dict(halving="", early_stop="metric=loss,mode=min,patience=3,stage=a",
                                       backend="population"))
    found = sweep_rules.rules_of(given, module, alone=("process",))
    assert found == {"halving": population.Halving("loss", "min", (5, 10), 0.5),
                     "early_stop": population.EarlyStop("loss", "min", 3, "a")}
    given.halving = "metric=accuracy,mode=max,rungs=20:40,keep=0.25"
    assert sweep_rules.rules_of(given, module, alone=())["halving"].rungs == (20, 40)
    for text, words in (("metric=a,metric=b", "each key once"), ("rungs", "expected KEY=VALUE"),
                        ("metric=loss,mode=min,rungs=x,keep=0.5", "rungs='x'")):
        given.halving = text
        with pytest.raises(ConfigError, match=words):
            sweep_rules.rules_of(given, module, alone=())
    given.halving, given.backend = "metric=loss,mode=min,rungs=5,keep=0.5", "process"
    with pytest.raises(ConfigError, match="--halving --backend=process"):
        sweep_rules.rules_of(given, module, alone=("process",))


@pytest.mark.slow
def test_dropped_members_are_told_left_alone_and_left_out_of_the_report(place, tmp_path, capsys):
    """A real population of three strengths, of which one is left after update 2 of 4."""
    argv = place("")[:5] + ["--sweep", "method.optim.learning_rate=0.0001,0.001,0.01", "--config.method.steps=4"]
    rule = ["--halving", "metric=loss,mode=min,rungs=2,keep=0.3"]
    assert cli.main([*argv, *rule]) == 0
    out = capsys.readouterr().out
    assert out.count("dropped: update 2 of method: by loss its settings were number") == 2
    assert "1 of 3 members finished, 2 were dropped at rungs" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == ["dropped", "dropped", "finished"]
    assert rows[0]["metrics"]["method.steps"] == 2 and "update 2 of method" in rows[0]["reason"]
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "members").rglob("*.json*")}
    assert cli.main([*argv, *rule]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "members").rglob("*.json*")} == stored
    assert cli.main(argv) == 2 and "halving.keep: stored 0.3, given 'absent'" in capsys.readouterr().err
    assert cli.main([*argv, "--halving", "metric=loss,mode=min,rungs=3,keep=0.3"]) == 2
    assert "multiples of config.method.eval_every=2" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "out"), "--metric", "method.eval.loss"]) == 0
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "1 finished, 2 dropped" in text and "1 have a finite method.eval.loss" in text
