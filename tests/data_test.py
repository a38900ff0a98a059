"""Reading, the ledger, tokenising, truncation, the plan and the synthetic stories."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rich.console
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax.data import (
    Ledger,
    Plan,
    Record,
    TextPolicy,
    Tokenizer,
    check_vocab,
    epoch_order,
    generate_corpus,
    load_policy,
    load_tokenizer,
    prompt_texts,
    read_jsonl,
    record_number,
    split_prompts,
    stories,
    stories_tokenizer,
    text_policy,
    token_record,
    tokenize_records,
    train_tokenizer,
    word_tokenizer,
    write_jsonl,
)
from alignax.rewards import lexicon_reward
from alignax.types import ConfigError, DataError

SHARED = Path(os.environ.get("ALIGNAX_SHARED", Path(__file__).parents[2] / "shared"))
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@pytest.fixture(scope="module")
def byte_tokenizer():
    texts = [row["prompt"] + row["completion"] for row in generate_corpus(200, 1)]
    return train_tokenizer(texts, 400, kind="bytes")


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


# --- records ---------------------------------------------------------------------------------------------------------

def test_every_layout_is_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl",
                       {"prompt": "p", "chosen": "c", "rejected": "r", "id": "one", "margin": 2},
                       {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 3, 1.5, 3],
                        "labels": [0, 1, 0, 1]},
                       {"prompt": "p", "completions": ["a", "b", "c"], "labels": [False, True, False],
                        "extra": {"models": ["m", "n", "o"]}},
                       {"prompt": "p", "completion": "a", "label": False},
                       {"prompt": "p", "completion": "a"}, {"prompt": "p"}, {"text": "t"}, "",
                       {"prompt": "", "completion": "x", "note": 1, "id": 7})
    ledger = Ledger()
    pair, scored, labelled, unpaired, plain, prompt, text, empty = read_jsonl(path, ledger=ledger)
    assert (pair.id, pair.completions, pair.margin, pair.line) == ("one", ("c", "r"), 2.0, 1)
    assert scored.completions == ("b", "d", "c", "a")  # best first; the tie b, d keeps the file's order
    assert scored.scores == (3.0, 3.0, 1.5, 1.0) and scored.labels == (1.0, 1.0, 0.0, 0.0)
    assert labelled.labels == (1.0, 0.0, 0.0) and labelled.scores is None
    assert labelled.completions == ("b", "a", "c") and labelled.extra["models"] == ("n", "m", "o")
    assert unpaired.labels == (0.0,) and plain.labels is None
    assert prompt.completions == () and (text.prompt, text.completions) == ("", ("t",))
    assert empty.id == "7" and empty.line == 9
    assert ledger.as_dict()["noted"] == {"blank line": 1, "ignored field 'note'": 1}


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "p", ', ["broken JSON"]),
    ("[1]", ["JSON object", "list"]),
    ({"prompt": "p", "chosen": "c"}, ["missing field 'rejected'", "['chosen', 'prompt']", "legal layouts"]),
    ({"chosen": "c", "rejected": "r"}, ["missing field 'prompt'"]),
    ({"score": 1}, ["missing field 'prompt'", "['score']"]),
    ({"prompt": "p", "scores": [1]}, ["missing field 'completions'"]),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "completion": "x"}, ["fit no layout"]),
    ({"prompt": 3, "completion": "c"}, ["'prompt'", "string", "int 3"]),
    ({"prompt": "p", "chosen": "c", "rejected": ""}, ["'rejected'", "empty"]),
    ({"prompt": "p", "completions": "ab"}, ["'completions'", "list"]),
    ({"prompt": "p", "completions": []}, ["'completions'", "empty"]),
    ({"prompt": "p", "completions": ["a", None]}, ["'completions[1]'", "NoneType"]),
    ({"prompt": "p", "completions": ["a", ""]}, ["'completions[1]'", "empty"]),
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, ["'scores'", "1 entries for 2"]),
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1, "2"]}, ["'scores[1]'", "number"]),
    ('{"prompt": "p", "completions": ["a", "b"], "scores": [1, NaN]}', ["'scores[1]'", "finite"]),
    ({"prompt": "p", "completions": ["a", "b"], "labels": [1, 2]}, ["'labels[1]'", "true, false"]),
    ({"prompt": "p", "completion": "a", "label": "yes"}, ["'label'", "true, false"]),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": True}, ["'margin'", "number"]),
    ({"prompt": "p", "chosen": "c", "rejected": "c"}, ["'rejected'", "identical", "on_identical"]),
    ({"prompt": "p", "completion": "c", "id": "first"}, ["'id'", "line 1"]),
    ({"prompt": "p", "completion": "c", "id": [1]}, ["'id'", "list"]),
    ('{"prompt": "p", "prompt": "q", "completion": "c"}', ["'prompt'", "twice"]),
    ('{"prompt": "p", "completion": "\\ud800"}', ["'completion'", "surrogate"]),
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 10**400]}, ["'scores[1]'"]),
])
def test_broken_lines_name_file_line_and_field(tmp_path, line, words):
    path = write_lines(tmp_path / "bad.jsonl", {"prompt": "p", "completion": "c", "id": "first"}, line)
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    for word in [f"{path}:2", *words]:
        assert word in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="none.jsonl.*no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"plain.jsonl.gz:1"):
        read_jsonl(tmp_path / "plain.jsonl.gz")
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(64) for i in range(3000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: cannot be read"):
        read_jsonl(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not valid UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(ConfigError, match="neither"):
        read_jsonl(tmp_path / "a.csv")


def test_identical_completions_are_refused_dropped_or_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c", "rejected": "c"}, {"text": "t"})
    ledger = Ledger()
    assert len(read_jsonl(path, on_identical="drop", ledger=ledger)) == 1
    assert ledger.dropped == {"identical completions": 1}
    assert len(read_jsonl(path, on_identical="keep", ledger=ledger)) == 2
    with pytest.raises(ConfigError, match="ledger"):
        read_jsonl(path, on_identical="drop")
    with pytest.raises(ConfigError, match="'ignore'.*error"):
        read_jsonl(path, on_identical="ignore")


def test_prompts_to_sample_from_are_texts(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": [{"role": "user", "content": "q"}]})
    with pytest.raises(DataError, match="a.jsonl:2: field 'prompt'.*messages"):
        prompt_texts(str(path), split="train", seed=0, n=0)
    [(_, text)] = prompt_texts(str(write_lines(path, {"prompt": "p"})), split="train", seed=0, n=1)
    assert text == "p"


def test_default_ids_are_stable_across_processes_and_positions(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"})
    first, second = read_jsonl(path)
    assert first.id != second.id
    code = "import sys; from alignax.data import read_jsonl; sys.stdout.write(read_jsonl(sys.argv[1])[0].id)"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1]),
                                "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True,
                          check=True).stdout == first.id
    # SHA-256 of "abc" begins with ba7816bf (FIPS 180-2, appendix B.1)
    assert record_number("abc") == 0xBA7816BF and record_number("abc").dtype == np.uint32


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_write_then_read_returns_the_records(tmp_path, suffix):
    records = [Record("a", "p\n\u2028", ("x", "y")), Record("b", "", ("x",), labels=(0.0,)), Record("c", "p"),
               Record("d", "p", ("x", "y", "z"), scores=(3.0, 2.0, 2.0), labels=(1.0, 0.0, 0.0), margin=0.5),
               Record("e", "p", ("x",), scores=(1.5,)), Record("f", "p", ("x", "y"), labels=(1.0, 1.0))]
    path = tmp_path / f"out{suffix}"
    assert write_jsonl(path, records) == 6
    again = read_jsonl(path)
    assert [(r.id, r.prompt, r.completions, r.scores, r.labels, r.margin) for r in again] == [
        (r.id, r.prompt, r.completions, r.scores, r.labels, r.margin) for r in records]
    before = path.read_bytes()
    write_jsonl(path, again)
    assert path.read_bytes() == before
    assert suffix == ".jsonl" or before[4:8] == bytes(4)  # gzip's time field (RFC 1952): equal records, equal bytes

    def broken():
        yield records[0]
        raise RuntimeError("half way")
    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("path, words", [
    ("gsm8k/test.jsonl", r"test.jsonl:1: missing field 'prompt': found \['answer', 'question'\]; legal layouts"),
    ("hh_rlhf/harmless-base/test.jsonl.gz", r"test.jsonl.gz:1: missing field 'prompt': found \['chosen', 'rejected'\]"),
])
def test_real_files_of_another_layout_are_refused_with_what_was_found(path, words):
    path = SHARED / "data" / path
    if not path.is_file():
        pytest.skip(f"no {path}; set ALIGNAX_SHARED")
    with pytest.raises(DataError, match=words):
        read_jsonl(path)


# --- ledger ----------------------------------------------------------------------------------------------------------

def test_ledger_merges_and_shows_every_count():
    a, b = Ledger(), Ledger()
    a.keep(3), a.drop("max_prompt"), a.cut("max_length: prompt", 5, "left"), a.note("boundary_merge")
    b.keep(1), b.drop("max_prompt", 2), b.cut("max_length: prompt", 2, "left")
    both = a.merge(b)
    assert both.as_dict() == {"kept": 4, "dropped": {"max_prompt": 3}, "noted": {"boundary_merge": 1}, "cut": [
        {"reason": "max_length: prompt", "side": "left", "count": 2, "tokens": 7}]}
    assert both.total == 7 and a.kept == 3
    assert Ledger.from_dict(json.loads(json.dumps(both.as_dict()))) == both
    console = rich.console.Console(width=100, file=open(os.devnull, "w"), record=True)
    console.print(both.table())
    shown = console.export_text()
    for word in ("kept", "max_prompt", "max_length: prompt (left)", "7", "boundary_merge"):
        assert word in shown
    with pytest.raises(ConfigError, match="middle"):
        a.cut("x", 1, "middle")


# --- tokens ----------------------------------------------------------------------------------------------------------

def test_policy_frames_each_text_once():
    policy = TextPolicy(bos_id=0, eos_id=2, eos_ids=frozenset({2, 3}), pad_id=2)
    assert policy.prompt([5]) == [0, 5] and policy.prompt([]) == [0]  # id 0 is an id, not "none"
    assert policy.prompt([0, 5]) == [0, 5]
    assert policy.completion([5]) == [5, 2] and policy.completion([5, 3]) == [5, 3]
    assert policy.ended([5, 3]) and not policy.ended([5]) and not policy.ended([])
    bare = TextPolicy(None, None)
    assert bare.prompt([5]) == [5] and bare.completion([5]) == [5] and bare.eos_ids == frozenset()
    with pytest.raises(ConfigError, match="bos_id.*-1"):
        TextPolicy(-1, None)


def test_special_tokens_spelled_in_a_text_stay_text(byte_tokenizer):
    assert byte_tokenizer.token_id("<eos>") not in byte_tokenizer.encode_completion("a <eos> b")
    assert byte_tokenizer.decode(byte_tokenizer.encode_completion("a <eos> b")) == "a <eos> b"
    with pytest.raises(ConfigError, match="'<end>'.*<eos>"):
        byte_tokenizer.token_id("<end>")


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_pairs_are_lossless_on_any_text(byte_tokenizer, prompt, completion):
    head, tail, merged = byte_tokenizer.encode_pair(prompt, completion)
    assert byte_tokenizer.decode([*head, *tail]) == prompt + completion
    assert head == byte_tokenizer.encode_prompt(prompt)
    if not merged:
        assert head + tail == byte_tokenizer.encode_prompt(prompt + completion)


def test_boundary_merge_is_counted(byte_tokenizer):
    ledger, policy = Ledger(), text_policy(byte_tokenizer)
    inside = Record("a", "Tom we", ("nt to the river .", " x"))
    [record] = tokenize_records([inside], byte_tokenizer, policy, ledger=ledger)
    assert ledger.noted["boundary_merge"] == 1
    assert byte_tokenizer.decode([*record.prompt, *record.completions[0]]) == "Tom went to the river ."


def test_sentencepiece_continuation_gets_no_invented_space():
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set ALIGNAX_SHARED")
    tokenizer = load_tokenizer(folder)
    head, tail, merged = tokenizer.encode_pair("Once upon a ti", "me there")
    assert merged and tokenizer.decode([*head, *tail]) == "Once upon a time there"
    head, tail, merged = tokenizer.encode_pair("Once upon a time", " there </s> was")
    assert not merged and tokenizer.decode_completion(head, tail) == " there </s> was"
    policy = load_policy(folder, eos_id=1)  # this model begins and ends its texts with the same token
    assert policy == TextPolicy(1, 1, frozenset({1, 2}), 1)
    assert policy.prompt(head)[:2] == [1, head[0]] and head[0] != 1
    with pytest.raises(ConfigError, match=r"\[1, 2\]"):
        load_policy(folder)
    check_vocab(tokenizer, 512)
    with pytest.raises(ConfigError, match="512.*511"):
        check_vocab(tokenizer, 511)


def test_a_prepended_space_opens_a_text_but_never_a_continuation():
    core = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: index for index, token in enumerate(["_", "a", "b", "_a", "ab"])}, [("_", "a"), ("a", "b")]))
    core.normalizer = tokenizers.normalizers.Prepend("_")
    tokenizer = Tokenizer(core)
    assert tokenizer.encode_pair("", "ab") == ([], [3, 2], False)  # it opens the text: "_a", "b"
    assert tokenizer.encode_pair("b", "ab") == ([0, 2], [4], False)
    assert tokenizer.encode_pair("ba", "b") == ([0, 2, 1], [2], True)  # "ab" straddles the border


def test_tokenizers_load_and_refuse(tmp_path, byte_tokenizer):
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert again.encode_prompt("Tom went") == byte_tokenizer.encode_prompt("Tom went")
    assert again.vocab_size == byte_tokenizer.vocab_size == 400
    with pytest.raises(ConfigError, match="expected a tokenizer.json"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="259"):
        train_tokenizer(["a"], 100)
    words = train_tokenizer(["b a b"], 6, kind="words")
    assert words.encode_prompt("a b z") == [5, 4, words.unk_id]


# --- truncation ------------------------------------------------------------------------------------------------------

WORDS = word_tokenizer([f"w{i}" for i in range(20)])
POLICY = text_policy(WORDS)  # <bos> 1, <eos> 2, w0 = 4


def words(*numbers):
    return " ".join(f"w{i}" for i in numbers)


def tokenized(rule, record=None, **bounds):
    ledger = Ledger()
    record = record or Record("r", words(0, 1, 2, 3), (" " + words(5, 6, 7), " " + words(8)), file="f.jsonl", line=4)
    return tokenize_records([record], WORDS, POLICY, ledger=ledger, truncation=rule, **bounds), ledger.as_dict()


def test_untouched_records_are_framed():
    [record], ledger = tokenized("error", max_prompt=5, max_completion=4, max_length=9)
    assert record.prompt.tolist() == [1, 4, 5, 6, 7] and record.prompt.dtype == np.int32
    assert [c.tolist() for c in record.completions] == [[9, 10, 11, 2], [12, 2]]
    assert record.completion_ended == (True, True) and record.number == record_number("r")
    assert ledger == {"kept": 1, "dropped": {}, "cut": [], "noted": {}}


@pytest.mark.parametrize("rule, kept", [("left", [1, 6, 7]), ("right", [1, 4, 5])])
def test_prompts_are_cut_on_the_named_side_and_keep_bos_on_the_left(rule, kept):
    [record], ledger = tokenized(rule, max_prompt=3)
    assert record.prompt.tolist() == kept
    assert ledger["cut"] == [{"reason": "max_prompt: prompt", "side": rule, "count": 1, "tokens": 2}]


def test_cut_completions_lose_their_end_token():
    [record], ledger = tokenized("left", max_completion=3)
    assert [c.tolist() for c in record.completions] == [[9, 10, 11], [12, 2]]
    assert record.completion_ended == (False, True)
    assert ledger["cut"] == [{"reason": "max_completion: completion", "side": "right", "count": 1, "tokens": 1}]


def test_max_length_takes_from_the_prompt_first_then_from_completions():
    [record], ledger = tokenized("right", max_length=6)
    assert record.prompt.tolist() == [1, 4] and len(record.completions[0]) == 4
    [record], ledger = tokenized("right", max_length=3)
    assert record.prompt.tolist() == [1] and [len(c) for c in record.completions] == [2, 2]
    assert [(row["reason"], row["count"], row["tokens"]) for row in ledger["cut"]] == [
        ("max_length: completion", 1, 2), ("max_length: prompt", 1, 4)]


def test_error_and_drop():
    message = r"f.jsonl:4: 5 tokens exceed max_prompt = 4 \(prompt 5, completions \[4, 2\]\)"
    with pytest.raises(DataError, match=message):
        tokenized("error", max_prompt=4)
    for bound, limit in (("max_prompt", 4), ("max_completion", 3), ("max_length", 8)):
        records, ledger = tokenized("drop", **{bound: limit})
        assert records == [] and ledger["dropped"] == {bound: 1} and ledger["kept"] == 0
    with pytest.raises(ConfigError, match="'middle'.*left"):
        tokenized("middle")
    with pytest.raises(ConfigError, match="max_prompt is 0"):
        tokenized("left", max_prompt=0)


def test_completions_without_a_scored_token_are_refused_or_counted():
    bare = TextPolicy(None, None)
    record = Record("r", "", (words(0),), file="f.jsonl", line=2)
    with pytest.raises(DataError, match="f.jsonl:2.*no scored token"):
        tokenize_records([record], WORDS, bare, ledger=Ledger())
    ledger = Ledger()
    assert tokenize_records([record], WORDS, bare, ledger=ledger, truncation="drop") == []
    assert ledger.dropped == {"no scored tokens": 1}
    [kept] = tokenize_records([record], WORDS, POLICY, ledger=ledger)
    assert kept.prompt.tolist() == [1]


def test_notes_on_lost_differences_and_unknown_words():
    pair = Record("r", words(0), (" " + words(1, 2), " " + words(1, 3)))
    _, ledger = tokenized("left", pair, max_completion=1)
    assert ledger["noted"] == {"completions identical after a cut": 1}
    _, ledger = tokenized("error", Record("r", words(0), (" w1", "  w1 zzz zzz")))
    assert ledger["noted"] == {"unknown tokens": 2}
    _, ledger = tokenized("error", Record("r", words(0), (" w1", "  w1")))
    assert ledger["noted"] == {"completions identical as ids": 1}


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, st.lists(TEXT.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=4),
       rule=st.sampled_from(["drop", "left", "right"]), bounds=st.tuples(*[st.integers(2, 30) | st.none()] * 3))
def test_nothing_is_lost_uncounted(byte_tokenizer, texts, rule, bounds):
    policy, ledger = text_policy(byte_tokenizer), Ledger()
    records = [Record(str(i), prompt, tuple(completions)) for i, (prompt, completions) in enumerate(texts)]
    bounded = dict(zip(("max_prompt", "max_completion", "max_length"), bounds, strict=True))
    whole = {r.id: r for r in tokenize_records(records, byte_tokenizer, policy, ledger=Ledger())}
    out = tokenize_records(records, byte_tokenizer, policy, ledger=ledger, truncation=rule, **bounded)
    assert ledger.total == len(records) and ledger.kept == len(out) and len(whole) == len(records)

    def size(record):
        return len(record.prompt) + sum(len(c) for c in record.completions)
    lost = sum(size(whole[r.id]) - size(r) for r in out)
    assert lost == sum(ledger.cut_tokens.values()) and (lost > 0) == bool(ledger.cuts)
    for record in out:
        P = len(record.prompt)
        for bound, found in zip(bounds, (P, record.longest, P + record.longest), strict=True):
            assert bound is None or found <= bound
        original = whole[record.id].completions
        for cut, full, ended in zip(record.completions, original, record.completion_ended, strict=True):
            assert len(cut) and np.array_equal(cut, full[:len(cut)]) and ended == (len(cut) == len(full))


def test_sampled_ids_are_taken_as_they_are():
    record = token_record("a", [1, 5], [[5, 6, 2], np.asarray([7], np.int64)], eos_ids={2, 3}, scores=[1, 2])
    assert record.completion_ended == (True, False) and record.scores == (1.0, 2.0)
    assert all(c.dtype == np.int32 for c in record.completions)
    for arguments, words_ in (({"completions": [[]]}, "no tokens"),
                              ({"completions": [[2, 5]]}, "end token 2 at 0 of 2"),
                              ({"completions": [[1.5]]}, "integer"), ({"completions": [[-1]]}, "-1"),
                              ({"completions": [[5]], "scores": [1, 2]}, "scores: 2 entries")):
        with pytest.raises(DataError, match=words_):
            token_record("a", [1], eos_ids={2}, **arguments)


# --- plan ------------------------------------------------------------------------------------------------------------

def test_the_order_depends_on_seed_and_epoch_alone():
    assert sorted(epoch_order(50, 3, 0)) == list(range(50))
    assert np.array_equal(epoch_order(50, 3, 1), epoch_order(50, 3, 1))
    assert not np.array_equal(epoch_order(50, 3, 0), epoch_order(50, 3, 1))
    assert not np.array_equal(epoch_order(50, 3, 0), epoch_order(50, 4, 0))
    # A change here changes the data order of every stored run.
    assert epoch_order(8, 0, 0).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [3, 6, 4, 0, 7, 5, 2, 1]


@pytest.mark.parametrize("n, size", [(10, 4), (3, 8), (7, 7), (1, 1)])
def test_batches_cross_epoch_borders_and_drop_nothing(n, size):
    plan = Plan(n, size, seed=5)
    steps = plan.num_steps(3)
    stream = np.concatenate([plan.batch_indices(step) for step in range(steps)])
    expected = np.concatenate([epoch_order(n, 5, epoch) for epoch in range(-(-steps * size // n))])
    assert np.array_equal(stream, expected[:len(stream)])
    assert len(stream) - size < 3 * n <= len(stream)
    fresh = Plan(n, size, seed=5).batches(2)  # any position can be entered directly
    for step in (2, 3):
        position, indices = next(fresh)
        assert position == step and np.array_equal(indices, plan.batch_indices(step))


def test_processes_share_a_batch():
    plan = Plan(20, 8, seed=1)
    assert np.array_equal(np.concatenate([plan.local_indices(3, p, 4) for p in range(4)]), plan.batch_indices(3))
    with pytest.raises(ConfigError, match="8.*of 3"):
        plan.local_indices(0, 0, 3)


def test_grouping_by_length_keeps_every_record_and_tightens_batches():
    lengths = np.random.default_rng(0).integers(1, 100, 64)
    plan, plain = Plan(64, 4, 2, lengths=lengths, window=16), Plan(64, 4, 2)
    assert plan.num_steps(1) == 16
    batches = [plan.batch_indices(step) for step in range(16)]
    assert sorted(np.concatenate(batches)) == list(range(64))
    later = [plan.batch_indices(step) for step in range(16, 32)]  # the next window is the next epoch here
    assert sorted(np.concatenate(later)) == list(range(64))
    spread = sum(np.ptp(lengths[b]) for b in batches)
    assert spread < sum(np.ptp(lengths[plain.batch_indices(step)]) for step in range(16)) / 4
    assert np.corrcoef([lengths[b].mean() for b in batches], range(16))[0, 1] ** 2 < 0.5  # not sorted by length


def test_a_plan_resumes_only_as_itself():
    plan = Plan(10, 4, seed=5)
    assert plan.state(6) == {"n": 10, "batch_size": 4, "seed": 5, "shuffle": 1, "window": 1, "lengths": 0,
                             "position": 6, "epoch": 2}
    assert Plan(10, 4, seed=5).resume(plan.state(6)) == 6
    with pytest.raises(ConfigError, match="n was 10.*11"):
        Plan(11, 4, seed=5).resume(plan.state(6))
    grouped = Plan(4, 2, lengths=np.asarray([1, 2, 3, 4]), window=2)
    with pytest.raises(ConfigError, match="lengths was"):
        Plan(4, 2, lengths=np.asarray([1, 2, 3, 5]), window=2).resume(grouped.state(0))


# --- stories ---------------------------------------------------------------------------------------------------------

def test_stories_are_what_the_main_job_needs():
    corpus = generate_corpus(3000, 0)
    rewards = lexicon_reward([row["completion"] for row in corpus])
    assert abs(rewards.mean()) < 0.2 and 1.2 < rewards.std() < 1.8 and rewards.max() >= 5
    tokenizer = stories_tokenizer()
    assert 240 <= tokenizer.vocab_size <= 400
    policy, ledger = text_policy(tokenizer), Ledger()
    records = [Record(str(i), row["prompt"], (row["completion"],)) for i, row in enumerate(corpus)]
    tokens = tokenize_records(records, tokenizer, policy, ledger=ledger)
    assert ledger.as_dict() == {"kept": 3000, "dropped": {}, "cut": [], "noted": {}}  # no unknown word, no merge
    for record, row in zip(tokens, corpus, strict=True):
        assert tokenizer.decode([*record.prompt, *record.completions[0]]) == row["prompt"] + row["completion"]
        assert tokenizer.decode_completion(record.prompt, record.completions[0]) == row["completion"]
    lengths = [record.longest for record in tokens]
    assert 15 <= np.median(lengths) <= 30 and max(lengths) <= 48
    assert len({sentence for row in corpus for sentence in row["completion"].split(" .")}) > 2000


def test_each_sentence_is_worth_what_the_grammar_says():
    rng = np.random.default_rng(0)
    for worth in (-2, -1, 0, 1, 2):
        sentences = [stories._sentence(rng, worth, "he", "him", "Mia", {}) for _ in range(300)]
        assert set(lexicon_reward(sentences)) == {worth}
    assert set(lexicon_reward(stories.all_prompts())) == {0}


def test_stories_are_reproducible_and_extend():
    assert generate_corpus(20, 3) == generate_corpus(40, 3)[:20] != generate_corpus(20, 4)
    assert generate_corpus(2, 0)[0] == GOLDEN_STORY


GOLDEN_STORY = {"prompt": "Zoe had a striped whistle .",
                "completion": " Anna fought the striped puppy . the sky over the shop was bright ."}


def test_held_out_prompts_are_disjoint():
    train, held = split_prompts(0, 4000, 700)
    assert len(set(train)) == 4000 and len(set(held)) == 700 and not set(train) & set(held)
    assert split_prompts(0, 10, 700)[1] == held != split_prompts(1, 10, 700)[1]
    assert {row["prompt"] for row in generate_corpus(50, 0, train[:5])} == set(train[:5])
    with pytest.raises(ConfigError, match=str(len(stories.all_prompts()))):
        split_prompts(0, 10**6, 1)
    with pytest.raises(ConfigError, match="names no hero"):
        generate_corpus(1, 0, ["the dog ran ."])


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_trained_tokenizers_are_lossless_on_stories(kind):
    texts = [row["prompt"] + row["completion"] for row in generate_corpus(300, 2)]
    tokenizer = train_tokenizer(texts, 500, kind=kind)
    assert [tokenizer.decode(tokenizer.encode_prompt(text)) for text in texts] == texts
    assert [tokenizer.token_id(token) for token in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
