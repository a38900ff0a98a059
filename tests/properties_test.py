"""Properties of the data layer on generated input: any text, any dialogue, any cut, and three hundred broken files."""

import gzip
import json
import random
import re
import string

import numpy as np
import pytest
import tokenizers
from chat_test import SPECIAL, TEMPLATES, byte_core, piece_core, policy_of, template
from formats_test import ROWS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alignax.data import (
    Ledger,
    Message,
    Record,
    Tokenizer,
    from_json,
    read_jsonl,
    to_json,
    tokenize_records,
    write_jsonl,
)
from alignax.data.formats import FORMATS, read
from alignax.data.layouts import bucket_shape, padded, shared_prefix
from alignax.types import DataError

BOUNDED = settings(max_examples=60, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SPELLED = st.sampled_from([*SPECIAL, "<|im_end", "|>", "\n", " ", "<think>", "\ufdd0", "\ufdd1",
                           "<mask>", "<sep>"])
TEXT = st.lists(ANY | SPELLED, max_size=4).map("".join)
SAID = TEXT.filter(lambda text: text.strip() == text and text)  # templates that trim change nothing of these
JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | ANY,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3), max_leaves=6)
PLACED = ["chatml", "llama3", "gemma", "marked"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(byte_core())


@st.composite
def dialogues(draw, said=SAID):
    """(prompt, completion): user and assistant in turn, the completion opening with the assistant."""
    before, after = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    turns = [Message("user" if i % 2 == 0 else "assistant", draw(said)) for i in range(2 * (before + after))]
    return tuple(turns[:2 * before + 1]), tuple(turns[2 * before + 1:])


def tokenize(tokenizer, records, name, ledger=None, **arguments):
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    return tokenize_records(records, tokenizer, policy_of(tokenizer, end), ledger=ledger or Ledger(),
                            template=template(name), **arguments), end


@BOUNDED
@given(talk=dialogues(), name=st.sampled_from(PLACED))
def test_masks_cover_exactly_what_the_assistant_says(tokenizer, talk, name):
    prompt, completion = talk
    [record], end = tokenize(tokenizer, [Record("r", prompt, (completion,))], name)
    flags = np.ones(record.longest, bool) if record.scored is None else record.scored[0]
    assert tokenizer.decode(record.completions[0][flags], skip_special=False) == "".join(
        turn.content + end for turn in completion if turn.role == "assistant")
    text = template(name).render((*prompt, *completion))
    whole = tokenizer.decode([*record.prompt, *record.completions[0]], skip_special=False)
    assert text.startswith(whole) and text[len(whole):].strip() == "" and record.completion_ended == (True,)
    assert tokenizer.decode(record.prompt, skip_special=False) == template(name).render(
        prompt, add_generation_prompt=True)
    # Special ids are those of the same dialogue with innocent texts, whatever the data spell.
    bland = [Record("r", *(tuple(Message(t.role, "ok") for t in part) if k == 0 else (
        tuple(Message(t.role, "ok") for t in part),) for k, part in enumerate((prompt, completion))))]
    [clean], _ = tokenize(tokenizer, bland, name)
    special = set(tokenizer.special_tokens.values())
    for ids, expected in ((record.prompt, clean.prompt), (record.completions[0], clean.completions[0])):
        assert [i for i in ids.tolist() if i in special] == [i for i in expected.tolist() if i in special]


@BOUNDED
@given(talks=st.lists(dialogues(), min_size=1, max_size=3), name=st.sampled_from(PLACED),
       rule=st.sampled_from(["drop", "left", "right"]), bounds=st.tuples(*[st.integers(2, 40) | st.none()] * 3))
def test_cuts_lose_nothing_uncounted_and_keep_masks_aligned(tokenizer, talks, name, rule, bounds):
    records = [Record(str(i), prompt, (completion, completion[:1])) for i, (prompt, completion) in enumerate(talks)]
    limits = dict(zip(("max_prompt", "max_completion", "max_length"), bounds, strict=True))
    whole = {r.id: r for r in tokenize(tokenizer, records, name)[0]}
    ledger = Ledger()
    out, _ = tokenize(tokenizer, records, name, ledger, truncation=rule, **limits)
    assert ledger.kept == len(out) and ledger.total == len(records) == len(whole)
    size = lambda record: len(record.prompt) + sum(map(len, record.completions))
    assert sum(size(whole[r.id]) - size(r) for r in out) == sum(ledger.cut_tokens.values())
    for record in out:
        full = whole[record.id]
        for k, (ids, reference) in enumerate(zip(record.completions, full.completions, strict=True)):
            flags, all_flags = (np.ones(len(r.completions[k]), bool) if r.scored is None else r.scored[k]
                                for r in (record, full))
            assert np.array_equal(ids, reference[:len(ids)]) and np.array_equal(flags, all_flags[:len(ids)])
            assert flags.any() and record.completion_ended[k] <= flags[-1]
    if out:
        for layout in (padded, shared_prefix):
            T, L = bucket_shape(out, 8, layout=layout.__name__)
            stream = layout(out, K=2, T=T, L=L, pad_id=0).streams["pair"]
            for b, record in enumerate(out):
                for k, ids in enumerate(record.completions):
                    flags = np.ones(len(ids), bool) if record.scored is None else record.scored[k]
                    assert np.array_equal(stream.mask[b, k, :len(ids)], flags)
                    assert not stream.mask[b, k, len(ids):].any()
                    assert np.array_equal(stream.targets[b, k, :len(ids)], ids)


@pytest.mark.parametrize("kind", ["bytes", "stripping", "first", "legacy"])
@BOUNDED
@example(parts=["a  <mask> b<sep> \n c", "<sep>", " <mask>", " "])
@given(parts=st.lists(ANY | SPELLED | st.sampled_from(["hello world", " how are you", "I am"]), max_size=6))
def test_encoding_piece_by_piece_equals_one_call(pieces, kind, parts):
    text, tokenizer = "".join(parts), pieces[kind]
    one, where = tokenizer.encode_rendered(text)
    many, places = tokenizer.encode_rendered(text, [(0, 0)])  # an empty literal span: the careful way, nothing to guard
    assert one == many
    assert [b for _, b in where] == [b for _, b in places]


@pytest.fixture(scope="module")
def pieces():
    stripping = byte_core()  # special tokens that swallow the white space beside them, as some <mask> tokens do
    stripping.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True),
                                  tokenizers.AddedToken("<sep>", rstrip=True)])
    return {"bytes": Tokenizer(byte_core()), "stripping": Tokenizer(stripping), "first": Tokenizer(piece_core("first")),
            "legacy": Tokenizer(piece_core("legacy"))}


@st.composite
def any_records(draw):
    """Any record whose lists are in order already: texts or messages, with or without scores, labels and extras."""
    spoken, count = draw(st.booleans()), draw(st.integers(0, 3))
    turn = lambda role: st.builds(Message, st.just(role), ANY.filter(bool), st.dictionaries(
        st.sampled_from(["name", "thinking", "tool_calls"]), JSON.filter(lambda value: value is not None), max_size=1))
    if spoken:
        prompt = tuple(draw(st.lists(turn("user") | turn("system"), max_size=2)))
        completions = tuple((draw(turn("assistant")), *draw(st.lists(turn("user"), max_size=1))) for _ in range(count))
    else:
        prompt, completions = draw(ANY), tuple(draw(ANY.filter(bool)) for _ in range(count))
    scores = draw(st.sampled_from([None, tuple(sorted((draw(st.floats(-9, 9)) for _ in completions), reverse=True))]))
    labels = [draw(st.sampled_from([0.0, 1.0])) for _ in completions]
    labels = draw(st.sampled_from([None, tuple(labels if scores else sorted(labels, reverse=True))]))
    return Record(draw(ANY.filter(bool)), prompt, completions, scores or None, labels or None,
                  draw(st.none() | st.floats(-9, 9)),
                  tools=draw(st.sampled_from([None, ({"name": "f"},)])),
                  extra=draw(st.dictionaries(st.text(string.ascii_uppercase, max_size=3), JSON, max_size=2)))


@BOUNDED
@given(record=any_records())
def test_records_come_back_from_json(record):
    again = from_json(json.loads(json.dumps(to_json(record))))
    assert again == record and to_json(again) == to_json(record)


@BOUNDED
@given(records=st.lists(any_records(), max_size=4, unique_by=lambda record: record.id))
def test_records_come_back_from_files(tmp_path, records):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, records)
    ledger = Ledger()
    kept = read_jsonl(path, on_identical="drop", ledger=ledger)
    assert len(kept) + sum(ledger.dropped.values()) == len(records)
    by_id = {record.id: record for record in records}
    assert all(to_json(record) == to_json(by_id[record.id]) for record in kept)


# --- broken files ----------------------------------------------------------------------------------------------------

UNCHECKED = {("math", "level"), ("summarize_feedback", "split"), ("summarize_feedback", "info")}
REQUIRED = {"alignax": ["chosen", "rejected"], "sharegpt": ["conversations"], "tofu": ["question", "answer"],
            "math": ["problem", "solution"], "tulu": ["chosen", "rejected", "source"], "prm800k": ["question", "label"],
            "reward_bench": ["prompt", "chosen", "rejected", "subset"], "oasst_trees": ["prompt"],
            "summarize_feedback": ["info", "summaries", "choice"], "gsm8k_solutions": ["question", "ground_truth"],
            "alpaca_eval": ["instruction", "output_1", "output_2"]}


def wrong(value):
    """A value of another type than the one given."""
    return {"x": 1} if isinstance(value, str) else "wrong" if isinstance(value, (bool, int, float)) else 3.5


def texts_of(row):
    """Fields of a row that hold text."""
    return [name for name, value in row.items() if isinstance(value, str)]


def broken(rng, name):
    """(bytes, suffix, line at fault or None for anywhere, words of the reason) of one broken file of a format."""
    row, count = ROWS[name][0], rng.randint(1, 5)
    lines, at = [json.dumps(row).encode() for _ in range(count)], rng.randrange(count)
    used = [field for field in (FORMATS[name].uses or row) if row.get(field) is not None
            and (name, field) not in UNCHECKED]
    field = rng.choice(used)
    numbers = [f for f in used if isinstance(row[f], (int, float)) and not isinstance(row[f], bool)]
    changed = lambda **new: json.dumps({**row, **new}).encode()
    faults = ["cut", "type", "missing", "utf8", "gzip", "list", "twice", "empty", "deep", "bom", "null", "garbage"]
    faults += ["nan", "huge"] if numbers else []
    faults += ["surrogate"] if set(texts_of(row)) & set(used) else []
    faults += ["ids"] * 3 if name == "alignax" else []
    fault, words, suffix = rng.choice(faults), "", ".jsonl"
    if fault == "cut":
        lines[at] = lines[at][:rng.randrange(1, len(lines[at]))]
        words = "broken JSON|not valid UTF-8"
    elif fault == "type":
        lines[at], words = changed(**{field: wrong(row[field])}), "expected|missing field|fit no layout|legal layouts"
    elif fault == "missing":
        field = rng.choice(REQUIRED.get(name, used))
        lines[at] = json.dumps({k: v for k, v in row.items() if k != field}).encode()
        words = "missing field|fit no layout"
    elif fault == "utf8":
        where = lines[at].index(b'": ') + 4
        lines[at], words = lines[at][:where] + bytes([rng.choice([0xFF, 0xC0, 0x80])]) + lines[at][where:], "UTF-8|JSON"
    elif fault == "list":
        lines[at], words = rng.choice([b"[1, 2]", b'"text"', b"3", b"null", b"true"]), "expected a JSON object"
    elif fault == "twice":
        lines[at] = lines[at][:-1] + b", " + json.dumps(field).encode() + b": 1}"
        words = "twice"
    elif fault == "empty":
        lines, at, words = [], None, "no row|not a|empty"
    elif fault == "deep":
        lines[at], words = b'{"prompt": ' + b"[" * 200_000, "broken JSON"
    elif fault == "bom":
        lines[0], at, words = b"\xef\xbb\xbf" + lines[0], 0, "broken JSON"
    elif fault == "null":
        lines[at], words = lines[at][:5] + b"\x00" + lines[at][5:], "broken JSON|field"
    elif fault == "garbage":
        lines[at], words = bytes(rng.randrange(128, 256) for _ in range(30)), "UTF-8"
    elif fault in ("nan", "huge"):
        value = rng.choice(["NaN", "Infinity", "-Infinity"]) if fault == "nan" else "1" + "0" * 400
        lines[at] = changed(**{rng.choice(numbers): "HERE"}).replace(b'"HERE"', value.encode())
        words = "expected"
    elif fault == "surrogate":
        lines[at] = changed(**{rng.choice(sorted(set(texts_of(row)) & set(used))): "a\ud800"})
        words = "surrogate|expected"
    elif fault == "ids":
        lines = [json.dumps({**row, "id": i}).encode() for i in range(count)] + [changed(id=rng.randrange(count))]
        at, words = count, "already used"
    body = b"\n".join(lines) + (b"\n" if lines else b"")
    if fault == "gzip":
        packed = gzip.compress(b"".join(json.dumps({**row, "pad": rng.random()}).encode() + b"\n" for _ in range(300)))
        body, suffix, at, words = packed[:rng.randrange(11, len(packed) - 8)], ".jsonl.gz", None, "cannot be read"
    elif rng.random() < 0.3 and lines:
        body, suffix = gzip.compress(body), ".jsonl.gz"
    return fault, body, suffix, at, words


def test_three_hundred_broken_files_are_refused_with_file_line_and_reason(tmp_path):
    rng, names, seen = random.Random(20240607), sorted(FORMATS), {}
    for number in range(300):
        name = "alignax" if number % 6 == 0 else names[number % len(names)]
        fault, body, suffix, at, words = broken(rng, name)
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(body)
        story = (number, name, fault)
        # Without the field another layout may fit; and `auto` takes no variants, which read other fields.
        formats = [name, "auto"] if fault != "missing" and FORMATS[name].automatic else [name]
        for format in ["auto"] if fault == "empty" else formats:  # no rows of a known format are an empty list
            try:
                read(path, format, ledger=Ledger())
            except DataError as error:
                found = re.match(rf"{re.escape(str(path))}:(\d+): (.{{8,}})", str(error), re.DOTALL)
                assert found, (story, str(error))
                if at is not None and format != "auto":
                    assert int(found[1]) == at + 1 and re.search(words, found[2]), (story, str(error))
            else:
                pytest.fail(f"{story}: read as {format} without an error: {body[:300]!r}")
        seen[fault] = seen.get(fault, 0) + 1
    assert len(seen) == 16 and min(seen.values()) >= 3, seen


def test_the_same_files_unbroken_are_read(tmp_path):
    for name in FORMATS:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(ROWS[name][0]) + "\n" for _ in range(3)), "utf-8")
        kept = read(path, name, on_identical="keep", ledger=Ledger())
        assert len(kept) == (1 if name == "helpsteer" else 3 * len(ROWS[name][1]))  # rows of one prompt are joined


def test_every_template_is_used_or_known():
    assert set(PLACED) < set(TEMPLATES)
