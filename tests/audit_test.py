"""Checks of data sets: every fault that is put in is found, counted and placed, and sound data have no findings."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from alignax import data
from alignax.data import audit as checks
from alignax.data import chat, mixture
from alignax.data.messages import Message
from alignax.data.records import Record
from alignax.diagnostics import show
from alignax.types import ConfigError, DataError

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "off")


def pair(i: int, chosen: str = "", rejected: str = "", prompt: str = "", **more) -> Record:
    """Pair i of `set.jsonl`; by default nothing about it repeats, and both completions are equally long."""
    return Record(f"r{i}", prompt or f"prompt {i}", (chosen or f"good {i}", rejected or f"evil {i}"), file="set.jsonl",
                  line=i, **more)


SOUND = [pair(i) for i in range(1, 9)]


def found(records, *settings, **more) -> dict[str, checks.Finding]:
    return {finding.code: finding for finding in checks.audit(records, *settings, **more).findings}


@pytest.fixture(scope="module")
def tokens():
    """A byte-level tokenizer with a policy: pad 0, BOS 1, EOS 2."""
    tokenizer = data.train_tokenizer(["the cat sat on a mat " * 3], 300)
    return tokenizer, data.text_policy(tokenizer)


def test_sound_data_have_no_findings(tokens):
    report = checks.audit({"train": SOUND, "eval": [pair(i) for i in range(20, 25)]}, *tokens)
    assert report.findings == () and report.errors == 0
    assert report.parts["train"] | {"records": 8, "pairs": 8, "prompts": 0} == report.parts["train"]
    assert checks.audit([]).findings == ()


@pytest.mark.parametrize("code, severity, count, place, extra", [
    ("duplicates", "warning", 2, "set.jsonl:50 and set.jsonl:1",
     [pair(50, "good 1", "evil 1", "prompt 1"), pair(51, "good 1", "evil 1", "prompt 1")]),
    ("near duplicates", "warning", 1, "set.jsonl:50 and set.jsonl:1", [pair(50, "GOOD, 1!", "evil\n1", "Prompt 1.")]),
    ("contradictions", "warning", 1, "set.jsonl:50 and set.jsonl:1", [pair(50, "evil 1", "good 1", "prompt 1")]),
    ("identical completions", "error", 2, "set.jsonl:50", [pair(50, "same", "same"), pair(51, "same", "same")]),
    ("blank completions", "error", 1, "set.jsonl:50", [pair(50, " \n", "evil")]),
    ("alike completions", "warning", 1, "set.jsonl:50", [pair(50, "It is so.", "it is so")]),
    ("leading space", "warning", 1, "set.jsonl:50", [pair(50, " good", "evil!")]),
    ("mixed kinds", "warning", 1, "records: {'pairs': 8, 'demonstrations': 1}", [Record("d", "p", ("c",))]),
])
def test_a_fault_put_in_is_found(code, severity, count, place, extra):
    assert code not in found(SOUND)
    finding = found([*SOUND, *extra])[code]
    assert (finding.severity, finding.count) == (severity, count)
    assert finding.examples[0] == place and len(finding.examples) <= 3


def test_leaks_between_parts():
    evaluation = [pair(20), pair(21, prompt="PROMPT 3"), pair(22, prompt="prompt 3"), pair(23, prompt="prompt 23")]
    assert "leak" not in found([*SOUND, *evaluation])  # one part may repeat its prompts
    finding = found({"train": SOUND, "eval": evaluation})["leak"]
    assert (finding.severity, finding.count) == ("error", 2) and "2 of eval stand in train" in finding.message
    assert finding.examples == ("set.jsonl:21 has the prompt of set.jsonl:3",
                                "set.jsonl:22 has the prompt of set.jsonl:3")
    texts = {"train": [Record("a", "", ("one text",)), Record("b", "", ("two",))], "eval": [Record("c", "", ("x",))]}
    assert "leak" not in found(texts)  # no prompt at all is nothing to share
    texts["eval"].append(Record("d", "", ("One text!",)))
    assert found(texts)["leak"].count == 1


def test_unpaired_labels():
    unpaired = [Record(f"u{i}", f"p{i}", ("c",), labels=(float(i % 20 == 0),), line=i) for i in range(40)]
    report = checks.audit(unpaired)
    assert report.labels == {"desirable": 2, "undesirable": 38} and report.bias is None
    finding = found(unpaired)["label balance"]
    assert finding.severity == "warning" and "2 are desirable" in finding.message
    assert finding.examples == ("<memory>:0", "<memory>:20")
    assert "label balance" not in found(unpaired[:1] + unpaired[1:10])
    opposite = dataclasses.replace(unpaired[1], id="again", labels=(1.0,))
    assert found([*unpaired, opposite])["contradictions"].count == 1


def test_length_statistics_and_bias():
    """Chosen longer in 45 of 50 unequal pairs, 10 equal: the share leaves out ties, the AUC counts them half."""
    sizes = [(9, 4)] * 45 + [(4, 9)] * 5 + [(6, 6)] * 10
    pairs = [pair(i, "x" * a, "y" * b, "z" * (i + 1)) for i, (a, b) in enumerate(sizes)]
    report = checks.audit(pairs)
    assert report.bias["pairs"] == 60 and report.bias["equal"] == 10 and report.bias["longer"] == 45 / 50
    low, high = report.bias["low"], report.bias["high"]
    p, n, z = 0.9, 50, 1.96  # Wilson: the p with |0.9 - p| = z sqrt(p (1 - p) / n)
    for bound in (low, high):
        assert abs(p - bound) == pytest.approx(z * (bound * (1 - bound) / n) ** 0.5, abs=1e-12)
    chosen, rejected = np.array(sizes).T
    wins = (chosen[:, None] > rejected).mean() + 0.5 * (chosen[:, None] == rejected).mean()
    assert report.bias["auc"] == pytest.approx(wins)
    assert found(pairs)["length bias"].severity == "warning"
    assert "length bias" not in found(pairs[:5] + pairs[45:50])  # five against five
    rows = report.lengths()
    assert rows["chosen"]["mean"] == chosen.mean() and rows["rejected"]["max"] == 9 and rows["prompt"]["n"] == 60
    assert rows["prompt"]["median"] == 30.5 and report.unit == "characters"
    counts = report.histogram()["prompt"]
    assert sum(counts) == 60 and counts[:4] == [15, 16, 29, 0]  # 1 to 15, 16 to 31, 32 to 60 characters


# With a tokenizer

def test_lengths_are_those_that_training_sees(tokens):
    tokenizer, policy = tokens
    report = checks.audit(SOUND, tokenizer, policy)
    seen = data.tokenize_records(SOUND, tokenizer, policy, ledger=data.Ledger())
    assert report.unit == "tokens" and report.values["prompt"].tolist() == [len(r.prompt) for r in seen]
    assert report.values["rejected"].tolist() == [len(r.completions[1]) for r in seen]


def test_end_tokens_and_special_spellings(tokens):
    tokenizer, policy = tokens
    none = found(SOUND, tokenizer, dataclasses.replace(policy, eos_id=None, eos_ids=frozenset()))["EOS missing"]
    assert none.severity == "error" and none.count == 16 and "appends none" in none.message
    pad = found(SOUND, tokenizer, dataclasses.replace(policy, pad_id=policy.eos_id))["pad is EOS"]
    assert pad.severity == "info" and pad.count == 8
    both = found(SOUND, tokenizer, dataclasses.replace(policy, bos_id=policy.eos_id))
    assert both["BOS is EOS"].severity == "info" and "BOS inside" not in both
    spelled = found([*SOUND, pair(50, "stop <eos> here", "evil 50 <pad>")], *tokens)["special spelled"]
    assert spelled.count == 1 and spelled.examples == ("set.jsonl:50 <eos> <pad>",)


def test_doubled_bos(tokens):
    """A tokenizer that reads specials in texts, and a text that spells BOS: the classic double BOS is one, not two."""
    tokenizer, policy = tokens
    reading = data.Tokenizer(tokenizer.core, special_in_text=True)
    once = found([pair(1, prompt="<bos>hello")], reading, policy)
    assert "double BOS" not in once
    twice = found([*SOUND, pair(50, prompt="<bos><bos>hello")], reading, policy)["double BOS"]
    assert (twice.severity, twice.count, twice.examples) == ("error", 1, ("set.jsonl:50",))
    inside = found([*SOUND, pair(50, chosen="a<bos>b")], reading, policy)["BOS inside"]
    assert inside.count == 1 and inside.examples == ("set.jsonl:50",)


def test_end_tokens_that_are_not_trained_on(tokens, monkeypatch):
    """`tokenize_records` always scores the end token of a turn; records from elsewhere may not."""
    def masked(records, *settings, **more):
        out = data.tokenize_records(records, *settings, **more)
        masks = [np.arange(len(c)) < len(c) - (out[0].id == "r3") for c in out[0].completions]
        return [dataclasses.replace(out[0], scored=tuple(masks))]

    monkeypatch.setattr(checks.traps, "tokenize_records", masked)
    finding = found(SOUND, *tokens)["EOS masked"]
    assert (finding.severity, finding.count, finding.examples) == ("error", 2, ("set.jsonl:3",) * 2)


def test_tokens_across_the_border(tokens):
    tokenizer, policy = tokens
    joined = next(a + b for a, b in [("th", "e"), ("ca", "t"), (" c", "at"), ("s", "at")]
                  if len(tokenizer.encode_prompt(a + b)) == 1)
    bad = pair(50, chosen=joined[-1] + " x", rejected="! y", prompt="say " + joined[:-1])
    merged = tokenizer.encode_pair(bad.prompt, bad.completions[0])[2]
    finding = found([*SOUND, bad], *tokens).get("merged border")
    assert merged == (finding is not None) and merged
    assert finding.count == 1 and finding.examples == (f"set.jsonl:50 {bad.prompt[-12:]!r} | {joined[-1] + ' x'!r}",)


def test_what_the_limits_do(tokens):
    """The ledger under the limits is that of `tokenize_records`, whatever the rule; `error` counts as errors."""
    records = [*SOUND, pair(50, "x" * 50, "y"), pair(51, "x", "y", "z" * 70)]
    for rule in ("drop", "left", "right"):
        report, ledger = checks.audit(records, *tokens, max_length=40, truncation=rule), data.Ledger()
        data.tokenize_records(records, *tokens, ledger=ledger, max_length=40, truncation=rule)
        assert report.limited.as_dict() | {"noted": {}} == ledger.as_dict() | {"noted": {}}
        assert report.errors == 0
    dropped = found(records, *tokens, max_length=40)["over max_length"]
    assert (dropped.severity, dropped.count) == ("warning", 2)
    refused = found(records, *tokens, max_length=40, truncation="error")["over max_length"]
    assert (refused.severity, refused.count) == ("error", 2)
    assert found(records, *tokens, max_prompt=40, truncation="left")["cut"].severity == "warning"
    bare = [Record("a", "", ("x",)), Record("b", "", ("xyz" * 30,))]  # without BOS and EOS nothing predicts the x
    codes = found(bare, tokens[0], data.TextPolicy(None, None), max_length=9)
    assert codes["dropped"].count == codes["over max_length"].count == 1 and "over no scored tokens" not in codes


# With a chat template

def dialogue(i: int, *answers: str, thoughts: str = "") -> Record:
    extra = {"thinking": thoughts} if thoughts else {}
    return Record(f"d{i}", (Message("user", f"question {i}"),),
                  tuple((Message("assistant", a, extra),) for a in answers), file="chat.jsonl", line=i)


def template(text: str, tokens) -> chat.ChatTemplate:
    specials = chat.template_specials(tokens[0], bos_id=tokens[1].bos_id, eos_id=tokens[1].eos_id)
    return chat.ChatTemplate({"default": text}, specials=specials)


TURNS = ("{{ %s }}{%% for m in messages %%}{{ m['role'][:1] + ':' + %s }}{%% if m['role'] == 'assistant' %%}"
         "{{ %s }}{%% endif %%}{%% endfor %%}{%% if add_generation_prompt %%}{{ 'a:' }}{%% endif %%}")


@pytest.mark.parametrize("opening, content, closing, code, severity", [
    ("bos_token", "m['content']", "eos_token", None, None),
    ("bos_token + bos_token", "m['content']", "eos_token", "double BOS", "error"),
    ("''", "m['content']", "eos_token", "BOS missing", "warning"),
    ("bos_token", "m['content']", "''", "EOS appended", "info"),
    ("bos_token", "m['content'][:3]", "eos_token", "template drops", "error"),
])
def test_faults_of_templates(tokens, opening, content, closing, code, severity):
    records = [dialogue(i, f"answer {i}", f"reply {i}!") for i in range(1, 4)]
    findings = found(records, *tokens, template(TURNS % (opening, content, closing), tokens))
    assert set(findings) == ({code} if code else set()), findings
    if code:
        assert findings[code].severity == severity and findings[code].examples[0] == "chat.jsonl:1"


def test_thoughts_that_the_template_drops_and_dialogues_that_it_refuses(tokens):
    good = template(TURNS % ("bos_token", "m['content']", "eos_token"), tokens)
    finding = found([dialogue(1, "yes", "nope", thoughts="hmm")], *tokens, good)["drops thoughts"]
    assert (finding.severity, finding.count, finding.examples) == ("warning", 2, ("chat.jsonl:1",))
    strict = template("{{ raise_exception('no user turns') if messages[0]['role'] == 'user' }}", tokens)
    finding = found([dialogue(1, "yes", "nope")], *tokens, strict)["refused"]
    assert finding.severity == "error" and "chat.jsonl:1" in finding.examples[0] and "no user turns" in str(finding)
    assert found(SOUND, *tokens, good)["template unused"].count == 8


# The report

def test_the_report_as_data_and_as_tables(tokens):
    records = [*SOUND, pair(50, "same [red]", "same [red]"), pair(51, "b\x1b[31m", "c")]
    report = checks.audit({"train": records}, *tokens, max_length=9)
    plain = report.as_dict()
    assert plain["errors"] == 1 and plain["findings"][0]["code"] == "identical completions"
    assert [f["severity"] for f in plain["findings"]] == sorted((f["severity"] for f in plain["findings"]),
                                                                key=checks.SEVERITIES.index)
    assert sum(plain["histogram"]["chosen"]) == 10 and plain["limits"]["dropped"]["max_length"] > 0
    out = io.StringIO()
    for table in report.tables():
        Console(file=out, width=120).print(table)
    text = out.getvalue()
    assert all(len(line) <= 120 for line in text.splitlines())
    for word in ("train", "identical completions", "set.jsonl:50", "max_length", "median", "AUC"):
        assert word in text


def test_settings_that_cannot_work(tokens):
    with pytest.raises(ConfigError, match="together or not at all"):
        checks.audit(SOUND, tokens[0])
    with pytest.raises(ConfigError, match="max_length count tokens"):
        checks.audit(SOUND, max_length=5)
    with pytest.raises(ConfigError, match="truncation is 'middle'"):
        checks.audit(SOUND, *tokens, max_length=5, truncation="middle")


# Rendering

def test_pieces_cover_every_token_with_its_mask(tokens):
    tokenizer, policy = tokens
    record = data.tokenize_records([pair(1, " grüß 🐈 dich", "no")], tokenizer, policy, ledger=data.Ledger())[0]
    parts = show.pieces(record, 0, tokenizer, policy)
    assert show.plain(parts) == "{BOS <bos>}prompt 1[[ grüß 🐈 dich{EOS <eos>}]]"
    assert sum(p.tokens for p in parts) == len(record.prompt) + len(record.completions[0])
    mask = np.ones(len(record.completions[0]), bool)
    mask[2:5] = False
    half = dataclasses.replace(record, scored=(mask, np.ones(len(record.completions[1]), bool)))
    parts = show.pieces(half, 0, tokenizer, policy)
    assert sum(p.tokens for p in parts if p.kind == "scored") == mask.sum()
    assert sum(p.tokens for p in parts if p.kind == "unscored") == 3
    text = show.coloured(parts)
    styles = {str(span.style) for span in text.spans}
    assert {"dim", "green", "yellow", "bold green reverse", "bold dim reverse"} == styles
    assert text.plain == "".join(p.text for p in parts)
    cat = next(i for i in range(len(mask)) if "🐈" in tokenizer.decode(record.completions[0][:i + 1]))
    split = dataclasses.replace(record, scored=(np.arange(len(mask)) < cat, half.scored[1]))  # inside its four bytes
    assert show.plain(show.pieces(split, 0, tokenizer, policy)) == \
        "{BOS <bos>}prompt 1[[ grüß \ufffd]]\ufffd dich{EOS <eos>}"
    bare = dataclasses.replace(record, prompt=record.prompt[:0])  # nothing predicts the first token
    assert show.pieces(bare, 1, tokenizer, policy)[0][1:] == ("unscored", False, 1)
    with pytest.raises(ConfigError, match="completion 2 of 2"):
        show.pieces(record, 2, tokenizer, policy)


def test_histogram_and_figure(tmp_path):
    table = show.histogram({"a": [0, 3, 0, 6, 0], "b": [0, 0, 0, 1, 0]}, [0, 4, 8, 16, 32], title="t", width=12)
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    rows = [line for line in out.getvalue().splitlines() if "–" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["4–7", "8–15", "16–31"]
    assert [row.count("█") for row in rows] == [6, 0, 12 + 2] and rows[0].split("│")[3].strip() == "3"
    with pytest.raises(ConfigError, match="'a' has 1 bins for 2 edges"):
        show.histogram({"a": [1]}, [0, 4], title="t")
    lengths = {"a": np.array([1, 2, 3]), "none": np.array([])}
    path = show.save_histogram(lengths, tmp_path / "x" / "l.png", unit="tokens")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no lengths"):
        show.save_histogram({"a": np.array([])}, tmp_path / "l.png", unit="tokens")


# Mixtures

def source(name: str, n: int) -> list[Record]:
    return [Record(f"{name}{i}", f"p{i}", ("c",)) for i in range(n)]


SOURCES = {"one": source("a", 30), "two": source("b", 10), "three": source("c", 7)}
WEIGHTS = {"one": 0.5, "two": 0.3, "three": 0.2}


def test_mixture_counts_are_exact_and_prefixes_are_in_proportion():
    mixed = mixture.mixture(SOURCES, WEIGHTS, n=101, seed=3)
    assert mixed.counts == {"one": 51, "two": 30, "three": 20}  # 50.5, 30.3, 20.2: the largest remainder gets the rest
    assert len({r.id for r in mixed.records}) == len(mixed.records) == 101
    sources = [r.id.partition("/")[0] for r in mixed.records]
    for length in range(1, 102):
        for name, count in mixed.counts.items():
            share = count / 101
            assert abs(sources[:length].count(name) - length * share) <= 1 + 3 * share
    assert {r.id for r in mixed.records} >= {f"two/b{i}" for i in range(10)} | {f"two/b{i}#2" for i in range(10)}


def test_mixture_order_is_a_function_of_seed_and_epoch():
    ids = lambda **more: [r.id for r in mixture.mixture(SOURCES, WEIGHTS, n=40, **more).records]
    assert ids(seed=1) == ids(seed=1, epoch=0) != ids(seed=2)
    assert ids(seed=1, epoch=1) != ids(seed=1)
    first, second = ids(seed=1), ids(seed=1, epoch=1)
    ones = [i for i in first + second if i.startswith("one/")]
    assert len(ones) == 40 and len(set(ones[:30])) == 30  # 20 and 20 of 30: a pass over the source crosses epochs
    fewer = mixture.mixture({"one": SOURCES["one"], "two": SOURCES["two"]}, {"one": 0.5, "two": 0.5}, n=40, seed=1)
    assert [r.id for r in fewer.records if r.id.startswith("one/")] == [i for i in first if i.startswith("one/")]


def test_mixture_sizes():
    whole = mixture.mixture(SOURCES)
    assert whole.counts == whole.sizes == {"one": 30, "two": 10, "three": 7}
    assert sorted(r.id for r in whole.records) == sorted(f"{n}/{r.id}" for n, part in SOURCES.items() for r in part)
    assert mixture.mixture(SOURCES, epochs=2).counts == {"one": 60, "two": 20, "three": 14}
    assert mixture.mixture(SOURCES, WEIGHTS | {"three": 0.0}, n=8).counts == {"one": 5, "two": 3, "three": 0}
    out = io.StringIO()
    Console(file=out, width=120).print(mixture.mixture(SOURCES, WEIGHTS, n=100).table())
    assert "1.67" in out.getvalue() and "0.500" in out.getvalue()


@pytest.mark.parametrize("change, error, message", [
    (dict(weights={"one": 1.0}), ConfigError, "expected the same"),
    (dict(weights=WEIGHTS | {"one": -1.0}), ConfigError, "expected finite numbers >= 0"),
    (dict(weights=WEIGHTS | {"one": float("inf")}), ConfigError, "expected finite numbers >= 0"),
    (dict(weights=dict.fromkeys(WEIGHTS, 0.0)), ConfigError, "not all 0"),
    (dict(n=0), ConfigError, "n is 0"),
    (dict(n=1, epochs=1.0), ConfigError, "give one of them"),
    (dict(sources=SOURCES | {"two": []}), DataError, "source 'two' is empty"),
    (dict(sources={"a/b": SOURCES["one"]}, weights=None), ConfigError, "source name 'a/b'"),
])
def test_bad_mixtures_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        mixture.mixture(**{"sources": SOURCES, "weights": WEIGHTS, "n": None if "epochs" in change else 9} | change)


def test_mixture_from_a_config(tmp_path):
    for name, part in SOURCES.items():
        data.write_jsonl(tmp_path / f"{name}@x.jsonl", part)
    spec = "; ".join(f"{name}={tmp_path}/{name}@x.jsonl@{WEIGHTS[name]}" for name in SOURCES)
    parsed = mixture.parse_mixture(spec)
    assert parsed["two"] == {"path": f"{tmp_path}/two@x.jsonl", "weight": 0.3, "format": "auto", "split": None}
    assert mixture.parse_mixture({name: dict(part) for name, part in parsed.items()}) == parsed
    mixed = mixture.load_mixture(spec, n=40, seed=1)
    assert [r.id for r in mixed.records] == [r.id for r in mixture.mixture(SOURCES, WEIGHTS, n=40, seed=1).records]
    unweighted = mixture.parse_mixture({"one": f"{tmp_path}/one@x.jsonl"})["one"]
    assert unweighted["path"].endswith("one@x.jsonl") and unweighted["weight"] is None
    assert mixture.load_mixture(f"one={tmp_path}/one@x.jsonl").counts == {"one": 30}
    for bad, message in [("one", "expected name=path"), ("", "expected name=path"), ("a=x;a=y", "stands twice"),
                         ("a=x@1;b=y", r"\['a'\] have weights"), ({"a": {"path": "x", "wieght": 1}}, "wieght"),
                         ({"a": {"weight": 1}}, "expected path"), ({}, "no source")]:
        with pytest.raises(ConfigError, match=message):
            mixture.parse_mixture(bad)
