"""The command line: every bad input is refused with a message that names the place, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import pytest
from rich.console import Console

from alignax import cli, configs, examine, losses, models

CONFIG = """
from alignax import configs

def get_config(arg=""):
    config = configs.base(tokenizer="builtin:stories", stages=("method",))
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=64, unroll=2)
    config.method = configs.train_stage({loss!r}, data=dict(path={path!r}, max_records=48), steps=2, batch_size=2,
                                        log_every=1, eval_every=2)
    return config
"""
PAIR = '{"prompt": "tom was at the park .", "chosen": "he smiled .", "rejected": "he cried ."}'


@pytest.fixture
def place(tmp_path):
    """place(lines) writes data and a DPO config on it; returns the config file. `place.workdir` is where runs go."""

    class Place:
        data, config, workdir = tmp_path / "data.jsonl", tmp_path / "config.py", tmp_path / "run"

        def __call__(self, *lines: str, loss: str = "dpo") -> list[str]:
            self.data.write_text("".join(line + "\n" for line in lines))
            self.config.write_text(CONFIG.format(loss=loss, path=str(self.data)))
            return ["train", "--config", str(self.config), "--workdir", str(self.workdir)]

    return Place()


def refused(capsys, argv: list[str], *words: str, code: int = cli.EXIT_ERROR) -> str:
    """Runs the command, which has to fail with all of `words` in what it prints and no traceback."""
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err, captured.err
    assert "Traceback" not in captured.err
    return captured.out + captured.err


# Config


def test_missing_config_file(capsys, tmp_path):
    refused(capsys, ["train", "--config", "nowhere/config.py", "--workdir", str(tmp_path / "run")],
            "nowhere/config.py", "no file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, words", [
    ("x = 1\n", "defines no get_config"),
    ("def get_config(:\n", "line 1"),
    ("import no_such_module_of_mine\n", "no_such_module_of_mine"),
], ids=["no-function", "syntax", "import"])
def test_broken_config_file(capsys, tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    refused(capsys, ["train", "--config", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "run")], "c.py", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override, words", [
    ("method.beta=1", ("config.method.beta: unknown key", "batch_size", "checkpoint_every")),
    ("method.batch_sise=4", ("did you mean 'batch_size'",)),
    ("nowhere.steps=4", ("config.nowhere: unknown key", "method", "tokenizer")),
    ("method.loss.gamma=4", ("config.method.loss.gamma: unknown key", "beta", "label_smoothing")),
    ("method.loss.name=dpoo", ("config.method.loss", "'dpoo'", "did you mean", "ipo")),
    ("method.steps=many", ("config.method.steps=many", "type int")),
    ("method.steps", ("expected --config.key=value",)),
    ("method.data=file", ("config.method.data is a section", "eval_path")),
    ("method.truncation=up", ("config.method.truncation='up'", "error, drop, left, right")),
    ("method.reference=live", ("config.method.reference='live'", "precomputed")),
    ("stages=method,other", ("'other'", "config.other")),
    ("method.accumulation=3", ("config.method.accumulation=3", "config.method.batch_size=2")),
])
def test_bad_override(capsys, place, override, words):
    refused(capsys, place(PAIR, PAIR) + [f"--config.{override}"], *words)
    assert not place.workdir.exists()


def test_unknown_hyper_parameter_in_the_file(capsys, place):
    argv = place(PAIR, PAIR)
    text = place.config.read_text().replace("steps=2", "hyper=dict(betta=0.1), steps=2")
    place.config.write_text(text)
    refused(capsys, argv, "unknown hyper-parameter betta", "did you mean", "label_smoothing")
    assert not place.workdir.exists()


def test_unknown_loss_in_the_file(capsys, place):
    refused(capsys, place(PAIR, PAIR, loss="nodpo"), "'nodpo'", "allowed", "kto")
    assert not place.workdir.exists()


def test_overrides_belong_to_train(capsys):
    refused(capsys, ["methods", "--config.steps=1"], "takes no config")


# Data


@pytest.mark.parametrize("second, words", [
    ('{"prompt": "a", "chosen": ', ("data.jsonl:2", "broken JSON")),
    ('{"prompt": "a", "chosen": "b"}', ("data.jsonl:2", "missing field 'rejected'", "legal layouts")),
    ('{"prompt": "a", "chosen": "", "rejected": "b"}', ("data.jsonl:2", "'chosen'", "empty")),
    ('{"prompt": "a", "chosen": 3, "rejected": "b"}', ("data.jsonl:2", "'chosen'", "expected a string")),
    ("[1, 2]", ("data.jsonl:2", "expected a JSON object")),
    ('{"prompt": "' + "the " * 80 + '", "chosen": "b", "rejected": "c"}', ("data.jsonl:2", "64", "truncation")),
], ids=["json", "missing", "empty", "type", "list", "long"])
def test_bad_line(capsys, place, second, words):
    refused(capsys, place(PAIR, second, PAIR), *words)
    assert not place.workdir.exists()


def test_missing_data_file(capsys, place):
    argv = place(PAIR)
    place.data.unlink()
    refused(capsys, argv, "data.jsonl", "no such file")
    assert not place.workdir.exists()


SAME = '{"prompt": "tom was at the park .", "chosen": "he smiled .", "rejected": "he smiled ."}'


def test_identical_completions_are_an_error_where_asked(capsys, place):
    refused(capsys, place(PAIR, SAME) + ["--config.method.data.on_identical=error"], "data.jsonl:2", "identical")
    assert not place.workdir.exists()


def test_identical_completions_are_dropped_and_counted(capsys, place):
    out = refused(capsys, place(PAIR, SAME), "1 records are fewer than config.method.batch_size=2")
    row = next(line for line in out.splitlines() if "identical completions" in line)
    assert "dropped" in row and "1" in row
    assert not place.workdir.exists()


def test_tokenizer_that_does_not_fit_the_model(capsys, place, tmp_path):
    config = models.DecoderConfig(vocab_size=10, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
                                  num_kv_heads=1, head_dim=8, max_positions=64)
    models.save(tmp_path / "small", config, models.init_params(config, jax.random.key(0)), bos_token_id=1,
                eos_token_id=2)
    refused(capsys, place(PAIR, PAIR) + [f"--config.model.path={tmp_path / 'small'}"], "vocab_size is 10",
            "the tokenizer has")
    assert not place.workdir.exists()


@pytest.mark.parametrize("override, words", [
    ("model.path=nowhere/model", "config.model.path='nowhere/model'"),
    ("tokenizer=nowhere/tokenizer", "nowhere/tokenizer"),
])
def test_missing_model_or_tokenizer(capsys, place, override, words):
    refused(capsys, place(PAIR, PAIR) + [f"--config.{override}"], words)
    assert not place.workdir.exists()


# Work folders


def test_foreign_workdir_is_left_alone(capsys, place):
    argv = place(PAIR, PAIR)
    place.workdir.mkdir()
    (place.workdir / "thesis.txt").write_text("mine")
    refused(capsys, argv, str(place.workdir), "not empty")
    assert [p.name for p in place.workdir.iterdir()] == ["thesis.txt"]


def test_workdir_that_is_a_file(capsys, place):
    argv = place(PAIR, PAIR)
    place.workdir.write_text("mine")
    refused(capsys, argv, str(place.workdir), "is a file")
    assert place.workdir.read_text() == "mine"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[str], Path]:
    """(command, workdir) of a finished run of two supervised steps on the built-in stories."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.py").write_text(CONFIG.format(loss="sft", path="builtin:stories"))
    argv = ["train", "--config", str(folder / "config.py"), "--workdir", str(folder / "w")]
    assert cli.main(argv) == 0
    return argv, folder / "w"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_again_ends_at_once(capsys, run):
    argv, workdir = run
    before = contents(workdir)
    assert cli.main(argv) == 0
    assert "finished already" in capsys.readouterr().out
    assert contents(workdir) == before


def test_workdir_of_another_config(capsys, run):
    argv, workdir = run
    before = contents(workdir)
    refused(capsys, [*argv, "--config.seed=5"], "another config", "config.seed: stored 0, given 5")
    assert contents(workdir) == before


def test_runs_of_earlier_releases_are_read_and_go_on(capsys, run, tmp_path):
    """A config that lacks keys which came later stands for their defaults, and only for those."""
    argv, workdir = run
    old = tmp_path / "old"
    shutil.copytree(workdir, old)
    stored = json.loads((old / "config.json").read_text())
    for section, key in ((stored["mesh"], "rules"), (stored["mesh"], "sequence"), (stored["model"], "attention"),
                         (stored["method"], "diagnostics"), (stored["method"], "lora"), (stored, "profile_steps")):
        section.pop(key)
    (old / "config.json").write_text(json.dumps(stored))
    assert configs.of_run(old) == configs.of_run(workdir)
    argv = [str(old) if word == str(workdir) else word for word in argv]
    assert cli.main(argv) == 0 and "finished already" in capsys.readouterr().out
    refused(capsys, [*argv, "--config.mesh.sequence=2"], "another config", "mesh.sequence: stored 1, given 2")
    examine.open_run(old, Console(quiet=True))


# The other commands


def test_dry_run_prints_and_writes_nothing(capsys, place):
    assert cli.main([*place(PAIR), "--dry-run", "--config.method.loss.beta=0.25"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["method"]["loss"]["beta"] == 0.25 and shown["stages"] == ["method"]
    assert not place.workdir.exists()


def test_methods_is_a_list_of_ids(capsys):
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in rows] == list(losses.names())
    assert {"kind", "arxiv", "fidelity", "signature", "file"} <= rows[0].keys()
    root = Path(__file__).resolve().parents[1]
    assert all((root / r["file"]).is_file() for r in rows)
    assert cli.main(["methods"]) == 0
    assert "dpo" in capsys.readouterr().out


def test_generate_from_a_run(capsys, run):
    _, workdir = run
    argv = ["generate", "--run", str(workdir), "--prompt", "tom was at the park .", "--prompt", "[red] dog",
            "--samples", "2", "--max-new-tokens", "6"]
    assert cli.main([*argv, "--json"]) == 0
    first = capsys.readouterr().out
    rows = [json.loads(line) for line in first.splitlines()]
    assert [r["prompt"] for r in rows] == ["tom was at the park ."] * 2 + ["[red] dog"] * 2
    assert all(1 <= r["tokens"] <= 6 and r["logp"] < 0 for r in rows)
    assert cli.main([*argv, "--json"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(argv) == 0
    plain = capsys.readouterr().out
    assert "tom was at the park ." in plain and "[red] dog" in plain and "nats" in plain


@pytest.mark.parametrize("extra, words", [
    (["--stage", "other"], ("--stage=other", "method")),
    (["--max-new-tokens", "100"], ("--max-new-tokens=100", "64 positions")),
    (["--samples", "0"], ("--samples=0",)),
    (["--max-new-tokens", "0"], ("--max-new-tokens=0",)),
    (["--temperature", "-1"], ("temperature",)),
    (["--top-p", "0"], ("top_p",)),
])
def test_generate_refuses(capsys, run, extra, words):
    refused(capsys, ["generate", "--run", str(run[1]), "--prompt", "tom", "--max-new-tokens", "4", *extra], *words)


def test_generate_from_what_is_no_run_or_model(capsys, tmp_path):
    refused(capsys, ["generate", "--run", str(tmp_path), "--prompt", "a"], str(tmp_path), "no config.json")
    refused(capsys, ["generate", "--model", str(tmp_path / "no"), "--prompt", "a"], str(tmp_path / "no"))


@pytest.mark.parametrize("argv", [[], ["train"], ["generate"], ["methods"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "usage: alignax" in out and all(a in out for a in argv)


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["train", "--config", "x.py"], ["generate", "--run", "x"]])
def test_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert "usage: alignax" in capsys.readouterr().err
