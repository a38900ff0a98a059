"""`alignax data`: what users see, and the exit codes."""

from __future__ import annotations

import json

import pytest

from alignax import cli, data
from alignax.data.messages import Message
from alignax.data.records import Record

PAIRS = [Record(f"r{i}", f"prompt {i % 20}", (f"good {i}", f"evil {i}"), margin=0.5) for i in range(40)]
TURNS = [Record(f"d{i}", (Message("user", f"q {i}"),), ((Message("assistant", f"yes {i}"),),
                                                        (Message("assistant", f"nope {i}"),))) for i in range(3)]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pairs.jsonl, turns.jsonl, leaky.jsonl, and three tokenizer folders: full, without template, without config."""
    root = tmp_path_factory.mktemp("command")
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    data.write_jsonl(root / "turns.jsonl", TURNS)
    data.write_jsonl(root / "leaky.jsonl", [Record("x", "Prompt 3!", ("other", "texts"))])
    tokenizer = data.train_tokenizer(["prompt good evil"], 300)
    names = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    for name, config in [("full", names | {"chat_template": TEMPLATE}), ("bare", names), ("none", None)]:
        (root / name).mkdir()
        tokenizer.save(root / name / "tokenizer.json")
        if config:
            (root / name / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "bare" / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
    return root


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs the command in the folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["data", *arguments])
        out = capsys.readouterr()
        assert all(len(line) <= 120 for line in out.out.splitlines() if line[:1] in "│┃┏└")
        return code, out.out, out.err

    return run


@pytest.mark.parametrize("action", ["prepare", "show", "check"])
def test_help_names_every_argument_and_the_exit_codes(action, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", action, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "exit codes: 0" in " ".join(out.split()) and "--format" in out
    assert ("--tokenizer" in out) == (action != "prepare")


@pytest.mark.slow
def test_prepare_show_and_check_of_a_prepared_folder(run, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    out = str(tmp_path / "out")
    code, text, _ = run("prepare", "pairs.jsonl", "--out", out, "--eval-fraction", "0.3")
    assert code == 0 and "prepared: " in text and "train" in text and "eval" in text
    code, text, _ = run("prepare", "pairs.jsonl", "--out", out, "--eval-fraction", "0.3", "--json")
    made = json.loads(text)
    assert code == 0 and not made["fresh"] and sum(made["records"].values()) == made["ledger"]["kept"] == 40
    code, text, _ = run("check", out, "--json")
    parts = json.loads(text)["parts"]
    assert code == 0 and list(parts) == ["out:train", "out:eval"]
    assert {name.partition(":")[2]: part["records"] for name, part in parts.items()} == made["records"]
    code, text, _ = run("show", out, "--split", "eval", "--n", "1")
    assert code == 0 and f"record 0 of {made['records']['eval']}" in text and "--- chosen" in text
    code, _, error = run("prepare", "pairs.jsonl", "--out", out)
    assert code == 2 and "what differs: eval_fraction" in error
    code, _, error = run("show", out, "--split", "test")
    assert code == 2 and "['eval', 'train']" in error


@pytest.mark.slow
def test_the_ledger_of_reading_is_counted_once(run, folder, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    gaps = tmp_path / "gaps.jsonl"
    gaps.write_text("\n" + (folder / "pairs.jsonl").read_text())
    assert run("prepare", str(gaps), "--out", str(tmp_path / "out"), "--eval-fraction", "0.3")[0] == 0
    code, text, _ = run("check", str(tmp_path / "out"), "--json")
    assert code == 0 and json.loads(text)["reading"]["noted"] == {"blank line": 1}


@pytest.mark.slow
def test_split_by_id_leaks_prompts_and_check_says_so(run, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    out = str(tmp_path / "out")
    assert run("prepare", "pairs.jsonl", "--out", out, "--eval-fraction", "0.4", "--split-by", "id")[0] == 0
    code, text, _ = run("check", out)
    assert code == 1 and "leak" in text and "1 error" in text


def test_check_of_files(run, folder):
    code, text, _ = run("check", "pairs.jsonl", "--tokenizer", "full", "--max-length", "10", "--png", "l.png")
    assert code == 0 and "0 errors, " in text and "over max_length" in text and "histogram of lengths in tokens" in text
    assert (folder / "l.png").read_bytes().startswith(b"\x89PNG")
    code, text, _ = run("check", "pairs.jsonl", "leaky.jsonl")
    assert code == 1 and "leaky.jsonl:1 has the prompt of pairs.jsonl:4" in text
    code, text, _ = run("check", "pairs.jsonl", "leaky.jsonl", "--json")
    report = json.loads(text)
    assert code == 1 and report["errors"] == 1 and report["reading"]["kept"] == 0
    code, text, _ = run("check", "pairs.jsonl", "--tokenizer", "full", "--max-length", "5", "--truncation", "error",
                        "--json")
    assert code == 1 and json.loads(text)["limits"]["dropped"] == {"max_length": 40}


def test_show_and_check_of_a_mixture(run):
    spec = "a=pairs.jsonl@3; b=leaky.jsonl@1"
    code, text, _ = run("show", spec, "--json", "--n", "50")
    assert code == 0
    sources = [json.loads(row)["record"]["id"].partition("/")[0] for row in text.splitlines()]
    assert len(sources) > 40 and abs(sources.count("a") - 3 * sources.count("b")) <= 3
    code, text, _ = run("check", spec, "--tokenizer", "full")
    assert code in (0, 1) and "histogram" in text
    code, _, error = run("show", spec, "--format", "alignax")
    assert code == 2 and "not for a mixture" in error


def test_show_marks_what_is_scored(run):
    code, text, _ = run("show", "pairs.jsonl", "--tokenizer", "full", "--n", "1", "--start", "2")
    assert code == 0 and "record 2 of 40  id r2  pairs.jsonl:3  margin 0.5" in text
    assert "{BOS <bos>}prompt 2" in text and "[[good 2{EOS <eos>}]]" in text and "[[evil 2{EOS <eos>}]]" in text
    code, text, _ = run("show", "turns.jsonl", "--tokenizer", "full", "--id", "d1")
    assert code == 0 and "{BOS <bos>}user: q 1{EOS <eos>}assistant: \n" in text and "[[yes 1{EOS <eos>}]]" in text
    code, text, _ = run("show", "turns.jsonl", "--tokenizer", "full", "--id", "d1", "--json", "--max-length", "12",
                        "--truncation", "left")
    row = json.loads(text)
    assert row["record"]["id"] == "d1" and len(row["tokens"]["completions"]) == 2 and row["ledger"]["cut"]
    assert len(row["tokens"]["prompt"]) + max(len(c["ids"]) for c in row["tokens"]["completions"]) == 12
    code, text, _ = run("show", "pairs.jsonl", "--tokenizer", "full", "--n", "1", "--max-length", "5")
    assert code == 0 and "dropped: max_length" in text and "[[" not in text
    code, text, _ = run("show", "turns.jsonl")
    assert code == 0 and "user: q 0" in text and "assistant: nope 1" in text


def test_policy_and_template_of_the_tokenizer_folder(run):
    code, text, _ = run("show", "pairs.jsonl", "--tokenizer", "bare", "--n", "1", "--eos-id", "0", "--no-bos")
    assert code == 0 and "[[good 0{EOS <pad>}]]" in text and "BOS" not in text
    code, text, _ = run("show", "turns.jsonl", "--tokenizer", "bare", "--n", "1", "--template", "plain")
    assert code == 0 and "User: q 0" in text and "yes 0{EOS <eos>}" in text
    code, _, error = run("show", "turns.jsonl", "--tokenizer", "bare")
    assert code == 2 and "brings no chat template" in error and "--template: chatml" in error
    code, text, _ = run("show", "pairs.jsonl", "--tokenizer", "builtin:stories", "--n", "1")
    assert code == 0 and "{EOS <eos>}]]" in text


@pytest.mark.parametrize("arguments, message", [
    (["check", "absent.jsonl"], "absent.jsonl:0: no such file"),
    (["check", "pairs.jsonl", "--format", "nope"], "format is 'nope', allowed are 'auto' and ['alignax'"),
    (["check", "pairs.jsonl", "--max-length", "9"], "--max-length needs --tokenizer"),
    (["check", "pairs.jsonl", "--template", "chatml"], "--template needs --tokenizer"),
    (["check", "pairs.jsonl", "--tokenizer", "absent"], "--tokenizer='absent': no such folder, and not to be had"),
    (["check", "pairs.jsonl", "--tokenizer", "builtin:x"], "the only built-in one is builtin:stories"),
    (["check", "pairs.jsonl", "--tokenizer", "none"], "names the end token"),
    (["check", "pairs.jsonl", "--tokenizer", "full", "--eos-id", "7"], "--eos-id=7: the end token of"),
    (["check", "turns.jsonl", "--tokenizer", "full", "--template", "absent"], "no chat template in 'absent'"),
    (["show", "pairs.jsonl", "--n", "0"], "--n=0"),
    (["show", "pairs.jsonl", "--start", "40"], "--start=40: pairs.jsonl has 40 records"),
    (["show", "pairs.jsonl", "--id", "zzz"], "--id=zzz: none of the 40 records"),
    (["prepare", "pairs.jsonl", "--out", "new", "--eval-fraction", "2"], "eval_fraction is 2.0"),
    (["prepare", "absent.jsonl", "--out", "new"], "absent.jsonl:0: no such file"),
    (["prepare", "pairs.jsonl", "--out", "full"], "holds something else"),
])
def test_bad_input_is_exit_code_2(run, folder, arguments, message):
    before = sorted(folder.iterdir())
    code, out, error = run(*arguments)
    assert code == 2 and out == "" and message in " ".join(error.split())
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name, parts", [
    ("hh_rlhf/harmless-base/test.jsonl.gz", 2303), ("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319),
    ("gsm8k/example_model_solutions.jsonl", 1319), ("alpaca_eval/preferences.jsonl.gz", 4014),
])
def test_real_files_pass_without_errors(run, shared, name, parts):
    code, text, _ = run("check", str(shared / "data" / name), "--json")
    report = json.loads(text)
    assert code == 0 and [part["records"] for part in report["parts"].values()] == [parts]
    assert {f["code"] for f in report["findings"]} <= {"alike completions", "duplicates", "near duplicates",
                                                       "length bias"}
    if "alpaca" in name:  # longer answers win there, by far: published as AlpacaEval's length bias
        assert report["length_bias"]["low"] > 0.8
