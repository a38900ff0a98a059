"""Published layouts, one by one; the real files, record by record; file kinds."""

import csv
import gzip
import importlib
import io
import json
import re
from pathlib import Path

import pytest

from alignax.data import Ledger, Message, read_jsonl, to_json, write_jsonl
from alignax.data.formats import FORMATS, Fields, Place, detect, get, read
from alignax.data.formats.maths import boxed
from alignax.types import ConfigError, DataError


def J(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def U(text):
    return Message("user", text)


def A(*texts):
    return tuple(Message("assistant", text) for text in texts)


UF = {"helpfulness": {"Rating": "4", "Rationale": "r"}, "honesty": {"Rating": "5"}, "truthfulness": {"Rating": "N/A"}}
HS = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
PAIR = {"chosen": J(("user", "q"), ("assistant", "good")), "rejected": J(("user", "q"), ("assistant", "bad"))}


def uf(text, rating, model):
    return {"response": text, "model": model, "critique": "c", "overall_score": 9,
            "annotations": {name: {"Rating": rating} for name in ("instruction_following", "honesty", "truthfulness",
                                                                  "helpfulness")}}


def prm(*steps, finish="solution"):
    return {"labeler": "x", "timestamp": "t", "question": {"problem": "1+1?", "ground_truth_answer": "2"},
            "label": {"steps": list(steps), "finish_reason": finish, "total_time": 1}}


def step(*completions, chosen=0, human=None):
    return {"completions": [{"text": text, "rating": rating, "flagged": None} for text, rating in completions],
            "chosen_completion": chosen, "human_completion": human}


SAFE = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False,
        "better_response_id": 1, "safer_response_id": 0}
TREE = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": {
    "message_id": "1", "text": "q", "role": "prompter", "lang": "en", "replies": [
        {"text": "worse", "role": "assistant", "rank": 1, "replies": []},
        {"text": "best", "role": "assistant", "rank": 0, "replies": [
            {"text": "more", "role": "prompter", "rank": None, "replies": [
                {"text": "x", "role": "assistant", "rank": 0}, {"text": "y", "role": "assistant", "rank": 1}]}]},
        {"text": "unranked", "role": "assistant", "rank": None, "replies": []}]}}
SHEPHERD = {"input": "1+1? Step 1: 1+1 is 2. ки\nStep 2: The answer is: 2 ки",
            "label": "1+1? Step 1: 1+1 is 2. +\nStep 2: The answer is: 2 -", "task": "GSM8K"}

# name -> (a row, what each of its records says)
ROWS = {
    "alignax": ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1}, [("p", ("c", "r"), {"margin": 1.0})]),
    "sharegpt": ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                 [((Message("system", "s"), U("q")), (A("a"),), {})]),
    "tofu": ({"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c", "d"]},
             [("q", ("a",), {"extra": {"paraphrased_answer": "b", "perturbed_answers": ("c", "d")}})]),
    "hh": ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: good ",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:bad"},
           [("\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", (" good ", "bad"), {})]),
    "hh_messages": ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: good ",
                     "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:bad"},
                    [((U("q"), *A("a"), U("r")), (A("good"), A("bad")), {})]),
    "summarize_feedback": ({"info": {"id": "i", "post": "long", "title": "t", "subreddit": "r", "article": None},
                            "summaries": [{"text": " a", "policy": "x", "note": "n"}, {"text": " b", "policy": "y"}],
                            "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 8}},
                           [("SUBREDDIT: r/r\nTITLE: t\nPOST: long\nTL;DR:", (" b", " a"),
                             {"extra": {"models": ("y", "x")}})]),
    "shp": ({"post_id": "p", "domain": "d", "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0,
             "score_A": 3, "score_B": 9, "score_ratio": 3.0},
            [("q", ("b", "a"), {"extra": {"aspects": ({"upvotes": 9.0}, {"upvotes": 3.0})}})]),
    "pku_better": (SAFE, [("q", ("b", "a"), {"extra": {"aspects": ({"safe": 0.0}, {"safe": 1.0})}})]),
    "pku_safer": (SAFE, [("q", ("a", "b"), {"extra": {"aspects": ({"safe": 1.0}, {"safe": 0.0})}})]),
    "oasst_trees": (TREE, [((U("q"),), (A("best"), A("worse")), {"scores": (0.0, -1.0)}),
                           ((U("q"), *A("best"), U("more")), (A("x"), A("y")), {"scores": (0.0, -1.0)})]),
    "ultrafeedback": ({"instruction": "q", "source": "s", "models": ["m"], "completions": [
        uf("low", "2", "m"), {"response": "mid", "model": "n", "annotations": UF}, uf("high", "5", "o")]},
        [("q", ("high", "mid", "low"), {"scores": (5.0, 4.5, 2.0)})]),
    "ultrafeedback_binarized": ({**PAIR, "prompt": "q", "prompt_id": "i", "messages": PAIR["chosen"],
                                 "score_chosen": 8.5, "score_rejected": 8.0},
                                [((U("q"),), (A("good"), A("bad")), {"margin": 0.5})]),
    "tulu": ({**PAIR, "id": "i", "source": "s", "prompt": "q", "chosen_model": "m", "rejected_model": "n",
              "chosen_rating": 5.0, "rejected_rating": 2.0},
             [((U("q"),), (A("good"), A("bad")), {"margin": 3.0, "extra": {"models": ("m", "n"), "source": "s"}})]),
    "helpsteer": ({"prompt": "q", "response": "a", "helpfulness": 3, **HS},
                  [("q", ("a",), {"scores": (3.0,), "extra": {"aspects": ({"helpfulness": 3.0, **HS},)}})]),
    "helpsteer3": ({"domain": "d", "language": "l", "context": J(("user", "q")), "response1": "a", "response2": "b",
                    "overall_preference": 2, "individual_preference": []},
                   [((U("q"),), (A("b"), A("a")), {"margin": 2.0})]),
    "nectar": ({"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "source": ["s"], "good_natured": True, "answers": [
        {"answer": "b", "model": "m", "rank": 2.0}, {"answer": "a", "model": "n", "rank": 1.0}]},
        [("\n\nHuman: q\n\nAssistant: ", ("a", "b"), {"scores": (-1.0, -2.0), "extra": {"models": ("n", "m")}})]),
    "reward_bench": ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "s", "id": 3, "chosen_model": "m",
                      "rejected_model": "n"}, [("q", ("a", "b"), {"extra": {"models": ("m", "n"), "subset": "s"}})]),
    "reward_bench_2": ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "subset": "s", "id": "3",
                        "num_correct": 1}, [("q", ("a", "b", "c"), {"labels": (1.0, 0.0, 0.0)})]),
    "alpaca_eval": ({"dataset": "d", "instruction": "q", "output_1": "a", "generator_1": "m", "output_2": "b",
                     "generator_2": "n", "preference": 1.75},
                    [("q", ("b", "a"), {"extra": {"models": ("n", "m"), "probability": 0.75}})]),
    "gsm8k": ({"question": "q", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
              [("q", ("1+1 = <<1+1=2>>2\n#### 2",), {"extra": {"answer": "2"}})]),
    "gsm8k_solutions": ({"question": "q", "ground_truth": "so\nA: 2", "m": {"is_correct": False, "solution": "A: 3"},
                         "n": {"is_correct": True, "solution": "A: 2"}},
                        [("q", ("A: 2", "A: 3"), {"labels": (1.0, 0.0), "extra": {
                            "models": ("n", "m"), "answer": "2", "solution": "so\nA: 2"}})]),
    "math": ({"problem": "q", "solution": r"so $\boxed{\frac{1}{2}}$.", "level": "Level 5", "type": "Algebra"},
             [("q", (r"so $\boxed{\frac{1}{2}}$.",), {"extra": {"answer": r"\frac{1}{2}", "level": "Level 5"}})]),
    "math_shepherd": (SHEPHERD, [("1+1? ", ("Step 1: 1+1 is 2. \nStep 2: The answer is: 2",), {
        "labels": (0.0,), "extra": {"steps": (((17, 1.0), (43, 0.0)),)}})]),
    "prm800k": (prm(step(("a", 1)), step(("bad", -1), ("b", 0), chosen=1)),
                [("1+1?", ("a\nb",), {"labels": (1.0,), "extra": {"steps": (((1, 1.0), (3, 0.0)),), "answer": "2"}})]),
}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def parse(name, row):
    place = Place("f", 7)
    return FORMATS[name].parse(Fields(row, place), place)


def test_every_format_has_an_example():
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_what_its_layout_says(tmp_path, name):
    row, expected = ROWS[name]
    ledger = Ledger()
    records = read(lines(tmp_path / "a.jsonl", row), name, ledger=ledger)
    assert len(records) == len(expected) and not ledger.dropped
    for record, (prompt, completions, rest) in zip(records, expected, strict=True):
        assert (record.prompt, record.completions, record.line) == (prompt, completions, 1)
        for field, value in rest.items():
            assert getattr(record, field) == value
        if record.extra.get("steps"):
            for text, steps in zip(record.completions, record.extra["steps"], strict=True):
                assert all(text[:end].strip() and not text[end:end + 1].strip() for end, _ in steps)
    write_jsonl(tmp_path / "b.jsonl", records)  # prepared records come back
    assert [to_json(r) for r in read_jsonl(tmp_path / "b.jsonl")] == [to_json(r) for r in records]


@pytest.mark.parametrize("name", ROWS)
def test_auto_finds_the_only_layout(tmp_path, name):
    path = lines(tmp_path / "a.jsonl", ROWS[name][0])
    found = detect([json.loads(path.read_text())], str(path)).name
    assert found == {"hh_messages": "hh", "pku_safer": "pku_better"}.get(name, name)
    assert FORMATS[name].accepts(ROWS[name][0])


def test_ignored_fields_are_counted_with_their_names(tmp_path):
    ledger = Ledger()
    read(lines(tmp_path / "a.jsonl", ROWS["summarize_feedback"][0], ROWS["summarize_feedback"][0]), ledger=ledger)
    assert ledger.noted == {f"ignored field {name!r}": 2 for name in
                            ("batch", "extra", "info.id", "summaries.note", "worker")}
    ledger = Ledger()
    read(lines(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c", "note": 1}), ledger=ledger)
    assert ledger.noted == {"ignored field 'note'": 1}


@pytest.mark.parametrize("name, change, reason", [
    ("hh", {"rejected": "\n\nHuman: other\n\nAssistant: x"}, "the two dialogues differ before their last turn"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "}, "empty completion"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r", "rejected": "\n\nHuman: q\n\nAssistant: b"},
     "a dialogue ends with a human turn"),
    ("tulu", {"rejected": J(("user", "other"), ("assistant", "bad"))}, "the two dialogues differ before an answer"),
    ("tulu", {"rejected": J(("user", "q"))}, "one dialogue is the beginning of the other"),
    ("ultrafeedback_binarized", {"rejected": J(("user", "q"), ("assistant", ""))}, "empty completion"),
    ("alpaca_eval", {"preference": 1.5}, "tie"), ("alpaca_eval", {"preference": None}, "no preference"),
    ("helpsteer3", {"overall_preference": 0}, "tie"),
    ("ultrafeedback", {"completions": []}, "no completions"),
    ("ultrafeedback", {"completions": [{"response": "a", "annotations": {}}]}, "a completion without any rating"),
    ("prm800k", {"label": {"steps": [step(chosen=None, human={"text": "h"})], "finish_reason": "solution"}},
     "no rated step"),
    ("oasst_trees", {"prompt": {"text": "q", "role": "prompter", "replies": []}}, "no turn with two ranked replies"),
])
def test_rows_that_state_nothing_are_counted_or_refused(tmp_path, name, change, reason):
    path, ledger = lines(tmp_path / "a.jsonl", ROWS[name][0], {**ROWS[name][0], **change}), Ledger()
    kept = read(path, name, ledger=ledger)
    assert len(kept) == len(ROWS[name][1]) and ledger.dropped == {reason: 1}
    with pytest.raises(DataError, match=re.escape(f"{path}:2: {reason}")):
        read(path, name)


@pytest.mark.parametrize("name, change, words", [
    ("hh", {"chosen": "Human: q"}, ["'chosen'", "begins with"]), ("hh", {"chosen": 3}, ["'chosen'", "string", "int 3"]),
    ("hh", {"rejected": "\n\nHuman: q"}, ["'rejected'", "no turn"]),
    ("summarize_feedback", {"choice": 2}, ["'choice'", "[0, 1]", "2"]),
    ("summarize_feedback", {"summaries": [{"text": "a"}]}, ["'summaries'", "at least 2"]),
    ("summarize_feedback", {"info": "x"}, ["'info'", "object", "str"]),
    ("shp", {"labels": True}, ["'labels'", "bool"]), ("shp", {"score_A": "3"}, ["'score_A'", "number"]),
    ("pku_better", {"better_response_id": 2}, ["'better_response_id'", "2"]),
    ("pku_better", {"is_response_0_safe": 1}, ["'is_response_0_safe'", "int 1"]),
    ("oasst_trees", {"prompt": {"text": "q", "role": "bot"}}, ["'prompt.role'", "bot"]),
    ("ultrafeedback", {"completions": [{"response": "a", "annotations": {"honesty": {"Rating": "good"}}}]},
     ["annotations.honesty.Rating", "'good'"]),
    ("ultrafeedback_binarized", {"score_chosen": "x"}, ["'score_chosen'", "number"]),
    ("ultrafeedback_binarized", {"chosen": []}, ["'chosen'", "at least 1"]),
    ("helpsteer", {"verbosity": None}, ["'verbosity'", "NoneType"]),
    ("helpsteer3", {"overall_preference": 4}, ["'overall_preference'", "-3 to 3", "4"]),
    ("nectar", {"answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}, ["missing field 'answers[1].rank'"]),
    ("reward_bench_2", {"rejected": ["a", 3]}, ["'rejected[1]'", "int 3"]),
    ("alpaca_eval", {"preference": 2.5}, ["'preference'", "2.5"]),
    ("gsm8k", {"answer": "2"}, ["'answer'", "####"]), ("gsm8k_solutions", {"ground_truth": "2"}, ["'A: number'"]),
    ("gsm8k_solutions", {"m": {"is_correct": "no", "solution": "s"}}, ["'m.is_correct'", "'no'"]),
    ("math", {"solution": "none"}, ["'solution'", "boxed"]),
    ("math_shepherd", {"label": "other"}, ["'label'", "character 0"]),
    ("math_shepherd", {"label": SHEPHERD["label"] + " Step 3"}, ["'label'", "goes on"]),
    ("math_shepherd", {"input": "no mark"}, ["'input'", "mark"]),
    ("prm800k", {"label": {"steps": [step(("a", 2))], "finish_reason": "solution"}}, ["rating", "-1, 0, 1", "2"]),
    ("prm800k", {"label": {"steps": [step(("a", 1), chosen=3)]}}, ["chosen_completion", "0 to 0", "3"]),
    ("tofu", {"perturbed_answer": "x"}, ["'perturbed_answer'", "list"]),
    ("tofu", {"answer": ""}, ["'answer'", "empty"]),
    ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, ["from", "robot"]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, ["no 'assistant' turn"]),
])
def test_faulty_fields_are_named_with_file_and_line(tmp_path, name, change, words):
    path = lines(tmp_path / "a.jsonl", ROWS[name][0], {**ROWS[name][0], **change})
    with pytest.raises(DataError) as error:
        read(path, name, ledger=Ledger())
    for word in [f"{path}:2: ", *words]:
        assert word in str(error.value)


def test_steps_end_where_a_bad_one_or_a_persons_one_says():
    [bad] = parse("prm800k", prm(step(("a", 1)), step(("bad", -1), ("other", 1), chosen=None), finish="found_error"))
    assert bad.completions == ("a\nbad",) and bad.labels == (0.0,) and bad.extra["steps"] == (((1, 1.0), (5, -1.0)),)
    [first] = parse("prm800k", prm(step(("a", 1)), step(("bad", -1)), step(("later", 1))))
    assert first.completions == ("a\nbad",) and first.labels == (0.0,)
    [mixed] = parse("prm800k", prm(step(("x", -1), chosen=None, human={"text": "mine"}), step(("end", 1))))
    assert mixed.completions == ("mine\nend",) and mixed.extra["steps"] == (((4, None), (8, 1.0)),)
    [texts] = parse("prm800k", prm(step(("x", -1), chosen=None, human="mine"), step(("end", 1))))
    assert texts.completions == mixed.completions and texts.labels == (1.0,)


@pytest.mark.parametrize("solution, answer", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\fbox{x_{1}}", "x_{1}"), (r"\boxed 7$.", "7"), (r"\boxed{1", None),
    ("", None)])
def test_the_boxed_answer(solution, answer):
    assert boxed(solution) == answer


def test_rows_of_one_prompt_are_joined(tmp_path):
    rows = [{"prompt": p, "response": r, "helpfulness": h, **HS} for p, r, h in
            (("q", "low", 1), ("q", "high", 4), ("q", "low too", 1), ("r", "only", 2), ("q", "later", 3))]
    ledger = Ledger()
    first, second, third = read(lines(tmp_path / "a.jsonl", *rows), ledger=ledger)
    assert first.completions == ("high", "low", "low too") and first.scores == (4.0, 1.0, 1.0) and first.line == 1
    assert [a["helpfulness"] for a in first.extra["aspects"]] == [4.0, 1.0, 1.0]
    assert second.completions == ("only",) and third.completions == ("later",) and third.line == 5
    assert ledger.noted == {"rows joined with the row before them": 2}


# --- file kinds ------------------------------------------------------------------------------------------------------

def test_the_same_rows_come_back_from_every_kind_of_file(tmp_path):
    row = {"prompt": "q, \"x\"\nnext \u2028", "completions": ["a", "b"], "scores": [1, 2.5], "labels": [False, True],
           "extra": {"models": ["m", "n"]}, "margin": 0.25, "id": "7"}
    lines(tmp_path / "a.jsonl", row)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps([row]), "utf-8")
    (tmp_path / "d.json").write_text(json.dumps(row) + "\n", "utf-8")
    (tmp_path / "f.json").write_text(json.dumps(row, indent=4), "utf-8")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(row)
    writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
    (tmp_path / "e.csv").write_text("\ufeff" + text.getvalue(), "utf-8", newline="")
    want = to_json(read_jsonl(tmp_path / "a.jsonl")[0])
    assert want["completions"] == ["b", "a"] and want["extra"] == {"models": ["n", "m"]}
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.csv", "f.json"):
        [record] = read(tmp_path / name)
        assert to_json(record) == want, name
        assert record.line == {"e.csv": 2}.get(name, 1)


def test_a_folder_with_a_file_for_every_problem_of_math(tmp_path):
    """The layout in which the authors of MATH publish: one object per file, by split and subject."""
    for number, subject in enumerate(("algebra", "geometry")):
        folder = tmp_path / "train" / subject
        folder.mkdir(parents=True)
        row = {"problem": f"What is 1 + {number}?", "level": "Level 1", "type": subject,
               "solution": f"It is $\\boxed{{{number + 1}}}$."}
        (folder / "1.json").write_text(json.dumps(row, indent=4), "utf-8")
    records = read(tmp_path, split="train", ledger=Ledger())
    assert [r.extra["answer"] for r in records] == ["1", "2"]
    assert [r.place for r in records] == [f"{tmp_path}/train/{subject}/1.json:1" for subject in ("algebra", "geometry")]


def test_csv_and_json_faults_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    for text, words in (("prompt,completion\np,c\np,c,d\n", ":3: 3 cells for the 2 columns"),
                        ("prompt,prompt\n", ":1: expected a header"), ("", ":1: expected a header"),
                        ('prompt,completion\n"p\n\n', ":2: broken CSV"),
                        ("prompt,completion,label\np,c,maybe\n", ":2: field 'label': expected JSON"),
                        ("prompt,completion\n\"p\nq\",c\np,\n", ":4: field 'completion': a completion is empty")):
        path.write_text(text)
        with pytest.raises(DataError, match=re.escape(f"{path}{words}")):
            read(path, "alignax")
    path.write_text("prompt,completion,label\np,c,true\np,d,\n")
    assert [r.labels for r in read(path)] == [(1.0,), None]
    path = tmp_path / "a.json"
    for text, words in (("[1]", ":1: expected a JSON object"), ("3", ":1: expected a JSON list"),
                        ('[{"text": "a"},\n{"text"}]', ":2: broken JSON"), ("", ":1: broken JSON"),
                        ('{\n"text": "a",\n"prompt"\n}', ":4: broken JSON"), ('{"text": "a",\n', ":1: broken JSON")):
        path.write_text(text)
        with pytest.raises(DataError, match=re.escape(f"{path}{words}")):
            read(path)


@pytest.mark.slow
def test_parquet(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    row, other = ROWS["tulu"][0], {**PAIR, "source": "s", "chosen_rating": None}
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist([row, other]), path)
    first, second = read(path)
    assert to_json(first) == to_json(read(lines(tmp_path / "a.jsonl", row))[0])
    assert second.margin is None and second.line == 2
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="a.parquet:1: cannot be read as Parquet"):
        read(path)
    import_module = importlib.import_module

    def missing(name):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return import_module(name)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read(path)


def test_folders_and_splits(tmp_path):
    row = {"prompt": "p", "completion": "c"}
    for name in ("data/train-00000.jsonl", "data/train_prefs.jsonl", "test.jsonl", "notes.txt", "trainer.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines(tmp_path / name, {**row, "id": name})
    assert [r.id for r in read(tmp_path, split="train")] == ["data/train-00000.jsonl", "data/train_prefs.jsonl"]
    assert len(read(tmp_path)) == 4
    with pytest.raises(DataError, match="no file of split 'eval'.*train_prefs"):
        read(tmp_path, split="eval")
    lines(tmp_path / "train_b.jsonl", {**row, "id": "data/train_prefs.jsonl"})
    with pytest.raises(DataError, match=r"train_b.jsonl:1: .*already used on line 1 of .*train_prefs.jsonl"):
        read(tmp_path, split="train")
    first, second = dict(ROWS["summarize_feedback"][0]), {**ROWS["summarize_feedback"][0], "split": "valid1"}
    ledger = Ledger()
    [record] = read(lines(tmp_path / "b.jsonl", first, second), split="valid1", ledger=ledger)
    assert record.line == 2 and ledger.noted["row of another split"] == 1
    with pytest.raises(DataError, match=r"test.jsonl:1: split is 'x'.*no field 'split'"):
        read(tmp_path / "test.jsonl", split="x")


def test_errors_name_the_alternatives(tmp_path):
    with pytest.raises(ConfigError, match="'nothing'.*auto.*'gsm8k'"):
        read(tmp_path / "a.jsonl", "nothing")
    with pytest.raises(ConfigError, match="a.txt.*'.parquet'"):
        read(lines(tmp_path / "a.txt", {}))
    with pytest.raises(DataError, match=r"none.jsonl:0: no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl:1: the fields \['x'\] fit no format; known are.*'hh'"):
        read(lines(tmp_path / "a.jsonl", {"x": 1}))
    with pytest.raises(DataError, match=r"\['prompt', 'response'\] fit no format"):  # not a prompt to sample from
        read(lines(tmp_path / "a.jsonl", {"prompt": "q", "response": "a"}))
    with pytest.raises(DataError, match=r"a.jsonl:0: no row"):
        read(lines(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"fit several formats: \['alpaca_eval', 'math'\]"):
        detect([{**ROWS["math"][0], **ROWS["alpaca_eval"][0]}], "f")
    with pytest.raises(ConfigError, match="ledger"):
        read(tmp_path / "a.jsonl", on_identical="drop")
    twice = lines(tmp_path / "a.jsonl", {"prompt": "p", "id": 1}, {"prompt": "p", "id": "1"})
    with pytest.raises(DataError, match=r"a.jsonl:2.*'1' is already used on line 1"):
        read(twice)
    assert get("hh").source.startswith("Anthropic")


def test_identical_completions_follow_the_rule(tmp_path):
    row = {**ROWS["alpaca_eval"][0], "output_1": "b"}
    path, ledger = lines(tmp_path / "a.jsonl", row), Ledger()
    with pytest.raises(DataError, match="identical; on_identical may be"):
        read(path)
    assert read(path, on_identical="drop", ledger=ledger) == [] and ledger.dropped == {"identical completions": 1}
    assert len(read(path, on_identical="keep", ledger=ledger)) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_what_it_is(name):
    rule = FORMATS[name]
    assert rule.name == name and len(rule.about) > 40 and rule.source
    assert set(ROWS[name][0]) >= {key for key in rule.uses or () if key in ROWS[name][0]}
    assert rule.uses is None or any(key in ROWS[name][0] for key in rule.uses)


# --- the real files, against independent readings of them ------------------------------------------------------------

def real(shared: Path, name: str) -> tuple[Path, list[dict]]:
    path = shared / "data" / name
    opened = gzip.open(path, "rt", encoding="utf-8") if name.endswith(".gz") else open(path, encoding="utf-8")
    with opened as handle:
        return path, [json.loads(line) for line in handle]


def test_hh_is_split_exactly_at_the_last_assistant_turn(shared):
    path, rows = real(shared, "hh_rlhf/harmless-base/test.jsonl.gz")
    ledger = Ledger()
    records = read(path, ledger=ledger)
    assert len(rows) == 2312 == len(records) + sum(ledger.dropped.values())
    kept = {record.line: record for record in records}
    reasons = {"empty completion": 0, "the two dialogues differ before their last turn": 0}
    for number, row in enumerate(rows, 1):
        parts = {side: re.fullmatch(r"(.*\n\nAssistant:)((?:(?!\n\nAssistant:).)*)", row[side], re.DOTALL).groups()
                 for side in ("chosen", "rejected")}
        if number in kept:
            record = kept[number]
            assert record.prompt == parts["chosen"][0] == parts["rejected"][0]
            assert (record.prompt + record.completions[0], record.prompt + record.completions[1]) == (
                row["chosen"], row["rejected"])
            assert all("\n\nAssistant:" not in c and "\n\nHuman:" not in c and c.strip() for c in record.completions)
        elif parts["chosen"][0] != parts["rejected"][0]:
            reasons["the two dialogues differ before their last turn"] += 1
        else:
            assert not parts["chosen"][1].strip() or not parts["rejected"][1].strip()
            reasons["empty completion"] += 1
    assert ledger.dropped == reasons == {"empty completion": 4, "the two dialogues differ before their last turn": 5}
    spoken = read(path, "hh_messages", ledger=Ledger())
    assert len(spoken) == len(records)
    for record, text in zip(spoken, records, strict=True):
        assert record.prompt[0].role == "user" and record.line == text.line
        said = [turn.content for turn in (*record.prompt, *record.completions[0])]
        pieces = re.split(r"\n\n(?:Human|Assistant):", text.prompt + text.completions[0])[1:]
        assert said == [piece.strip() for piece in pieces]
    with pytest.raises(DataError, match=r"test.jsonl.gz:\d+: "):
        read(path)


@pytest.mark.parametrize("name, count", [("train", 7473), ("test", 1319)])
def test_gsm8k_whole(shared, name, count):
    path, rows = real(shared, f"gsm8k/{name}.jsonl")
    ledger = Ledger()
    records = read(path, ledger=ledger)
    assert len(records) == len(rows) == count and not ledger.dropped and not ledger.noted
    for record, row in zip(records, rows, strict=True):
        assert (record.prompt, record.completions) == (row["question"], (row["answer"],))
        assert record.extra["answer"] == row["answer"].split("\n#### ")[1]


def test_gsm8k_solutions_whole(shared):
    path, rows = real(shared, "gsm8k/example_model_solutions.jsonl")
    ledger = Ledger()
    records = read(path, ledger=ledger)
    assert len(records) == len(rows) == 1319 and not ledger.dropped and not ledger.noted
    systems = ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    right = dict.fromkeys(systems, 0)
    for record, row in zip(records, rows, strict=True):
        ranked = sorted(systems, key=lambda s: not row[s]["is_correct"])  # right ones first, else the file's order
        assert record.extra["models"] == tuple(ranked)
        assert record.completions == tuple(row[s]["solution"] for s in ranked)
        assert record.labels == tuple(float(row[s]["is_correct"]) for s in ranked)
        for system, label in zip(ranked, record.labels, strict=True):
            right[system] += label
    assert list(right.values()) == [286, 515, 458, 742]


def test_alpaca_eval_whole(shared):
    path, rows = real(shared, "alpaca_eval/preferences.jsonl.gz")
    ledger = Ledger()
    records = read(path, on_identical="drop", ledger=ledger)
    assert len(rows) == 805 * 5 == len(records) + sum(ledger.dropped.values())
    assert ledger.dropped["tie"] == sum(row["preference"] == 1.5 for row in rows) == 11
    for record in records:
        row = rows[record.line - 1]
        won = 2 if row["preference"] > 1.5 else 1
        assert record.prompt == row["instruction"]
        assert record.completions == (row[f"output_{won}"], row[f"output_{3 - won}"])
        assert record.extra["models"] == (row[f"generator_{won}"], row[f"generator_{3 - won}"])
        assert record.extra["probability"] == pytest.approx(abs(row["preference"] - 1.5) + 0.5)
