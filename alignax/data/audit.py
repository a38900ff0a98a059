"""Checks of a data set before it costs a training run: findings with severity, count and the places they stand at.

error    training on it goes wrong, or an evaluation on it says nothing: leaks between parts, completions that state no
         preference, end tokens that are missing or masked, doubled BOS
warning  it can be trained on, but a reader should know: duplicates, contradictions, length bias, tokens that straddle
         the border of prompt and completion, what the limits cut or drop
info     facts, such as a pad token that is an end token (harmless here, where masks are explicit)

Parts are splits or files: what stands in one shall not stand in another. `alignax.data.traps` holds the checks that
need a tokenizer.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from alignax.data import traps
from alignax.data.ledger import Ledger
from alignax.data.records import Content, Record
from alignax.data.tokens import TextPolicy, Tokenizer
from alignax.data.traps import Finding
from alignax.types import ConfigError

SEVERITIES = ("error", "warning", "info")
KINDS = ("pairs", "lists", "unpaired", "demonstrations", "prompts")
EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # of the length histogram
BIASED = 0.6  # a share of longer chosen completions whose whole interval lies beyond this, or below 1 - this
UNBALANCED = 0.1  # a share of the rarer label below this
_STYLE = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What `audit` found, as plain data with tables.

    parts: part -> {"records", "prompts" (distinct), and how many of each of KINDS}. unit: tokens or characters.
    values: part of a record (prompt, chosen, rejected, completion) -> int [n], all lengths. bias: how length predicts
    the choice, or None without pairs. labels: {"desirable", "undesirable"} over unpaired records, or None.
    limited: the ledger of tokenising under the limits, or None where none were given. files: where the records stand.
    """

    parts: Mapping[str, Mapping[str, int]]
    findings: tuple[Finding, ...]
    unit: str
    values: Mapping[str, np.ndarray]
    bias: Mapping[str, float] | None
    labels: Mapping[str, int] | None
    limited: Ledger | None
    files: tuple[str, ...] = ()

    @property
    def errors(self) -> int:
        """Findings of severity `error`."""
        return sum(finding.severity == "error" for finding in self.findings)

    def lengths(self) -> dict[str, dict[str, float]]:
        """part of a record -> n, mean, median, p90, p99, max."""
        return {name: _summary(values) for name, values in self.values.items() if len(values)}

    def histogram(self) -> dict[str, list[int]]:
        """part of a record -> counts between neighbouring EDGES, the last open above."""
        edges = [*EDGES, np.iinfo(np.int64).max]
        return {name: np.histogram(values, edges)[0].tolist() for name, values in self.values.items() if len(values)}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form of everything, histograms with their edges."""
        return {"parts": {name: dict(part) for name, part in self.parts.items()},
                "errors": self.errors, "findings": [dataclasses.asdict(finding) for finding in self.findings],
                "unit": self.unit, "lengths": self.lengths(), "edges": list(EDGES), "histogram": self.histogram(),
                "length_bias": None if self.bias is None else dict(self.bias),
                "labels": None if self.labels is None else dict(self.labels),
                "limits": None if self.limited is None else self.limited.as_dict()}

    def tables(self) -> list[Table]:
        """Tables for a console: parts, lengths, length bias, what the limits would do, findings."""
        out = [self._parts_table(), self._lengths_table()]
        if self.bias is not None:
            out.append(self._bias_table())
        if self.limited is not None:
            out.append(self.limited.table("under the limits"))
            out[-1].title_justify = "left"
        return [*out, self._findings_table()]

    def _parts_table(self) -> Table:
        shown = [kind for kind in KINDS if any(part[kind] for part in self.parts.values())]
        table = Table(title="records", title_justify="left")
        table.add_column("part", overflow="fold")
        for column in ("records", *shown, "distinct prompts"):
            table.add_column(column, justify="right")
        for name, part in self.parts.items():
            table.add_row(name, *(str(part[column]) for column in ("records", *shown, "distinct prompts")))
        return table

    def _lengths_table(self) -> Table:
        table = Table(title=f"lengths in {self.unit}", title_justify="left")
        table.add_column("part of a record")
        for column in ("n", "mean", "median", "p90", "p99", "max"):
            table.add_column(column, justify="right")
        for name, row in self.lengths().items():
            table.add_row(name, str(row["n"]), f"{row['mean']:.1f}", f"{row['median']:.1f}",
                          *(f"{row[column]:.0f}" for column in ("p90", "p99", "max")))
        return table

    def _bias_table(self) -> Table:
        table = Table(title="length bias", title_justify="left")
        for column in ("pairs", "chosen longer", "95% interval", "equal", "AUC of length"):
            table.add_column(column, justify="right")
        b = self.bias
        table.add_row(str(b["pairs"]), f"{b['longer']:.3f}", f"{b['low']:.3f} to {b['high']:.3f}", str(b["equal"]),
                      f"{b['auc']:.3f}")
        return table

    def _findings_table(self) -> Table:
        table = Table(title="findings", title_justify="left")
        table.add_column("severity")
        table.add_column("finding", no_wrap=True)
        table.add_column("count", justify="right")
        table.add_column("what, and where", overflow="fold", ratio=1)
        bases = collections.Counter(os.path.basename(file) for file in self.files)
        for finding in self.findings:
            where = "".join(f"\n  {example}" for example in finding.examples)
            for file in self.files:  # long paths drown the rest; `as_dict` has them in full
                base = os.path.basename(file)
                where = where.replace(f"{file}:", f"{base}:") if bases[base] == 1 else where
            table.add_row(f"[{_STYLE[finding.severity]}]{finding.severity}[/]", finding.code, str(finding.count),
                          traps.escaped(finding.message + where))
        return table


def audit(records: Sequence[Record] | Mapping[str, Sequence[Record]], tokenizer: Tokenizer | None = None,
          policy: TextPolicy | None = None, template: Any = None, *, max_prompt: int | None = None,
          max_completion: int | None = None, max_length: int | None = None, truncation: str = "drop") -> Report:
    """Checks records (one part, or {part: records}) and returns a Report; findings come worst first.

    Without a tokenizer, lengths are in characters and the checks of tokens are left out. With one, policy is needed
    too, and template where records hold messages. max_prompt, max_completion, max_length, truncation: limits whose
    effect is to be counted, as `tokenize_records` would apply them; under `error` whatever exceeds them is an error.
    """
    if (tokenizer is None) != (policy is None):
        raise ConfigError("audit: tokenizer and policy are given together or not at all")
    bounds = {"max_prompt": max_prompt, "max_completion": max_completion, "max_length": max_length}
    if tokenizer is None and any(bound is not None for bound in bounds.values()):
        raise ConfigError(f"audit: {', '.join(k for k, v in bounds.items() if v is not None)} count tokens, but there "
                          "is no tokenizer")
    parts = records if isinstance(records, Mapping) else {"records": records}
    every = [record for part in parts.values() for record in part]
    findings = [*_leaks(parts), *_duplicates(every), *_contradictions(every), *_completions(every), *_mixed(parts)]
    limited = None
    if tokenizer is None:
        values, unit = _characters(every), "characters"
    else:
        tokens, found, limited = traps.tokenise(every, tokenizer, policy, template, bounds, truncation)
        findings += found
        values, unit = _tokens(tokens), "tokens"
    bias, labels = _length_bias(values), _labels(every)
    findings += [*_bias_finding(bias), *_label_findings(every, labels)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable: checks keep their order
    return Report({name: _kinds(part) for name, part in parts.items()}, tuple(findings), unit, values, bias, labels,
                  limited, tuple(sorted({record.file for record in every})))


def text_of(content: Content) -> str:
    """The text of a prompt or a completion; of messages, their roles and contents line by line."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{turn.role}: {turn.content or ''}" for turn in content)


def normalised(content: Content) -> str:
    """The text without case, punctuation, white space and compatibility forms: equal for near-duplicates."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text_of(content)).casefold()).strip()


def _kind(record: Record) -> str:
    if not record.completions:
        return "prompts"
    if len(record.completions) == 1:
        return "demonstrations" if record.labels is None else "unpaired"
    return "pairs" if len(record.completions) == 2 else "lists"


def _kinds(part: Sequence[Record]) -> dict[str, int]:
    found = collections.Counter(_kind(record) for record in part)
    return {"records": len(part)} | {kind: found[kind] for kind in KINDS} | \
        {"distinct prompts": len({record.prompt for record in part})}


def _groups(records: Iterable[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """Records with equal keys, in the order of their first; None keys are left out."""
    out: dict[Any, list[Record]] = {}
    for record in records:
        if (found := key(record)) is not None:
            out.setdefault(found, []).append(record)
    return list(out.values())


def _equals(groups: Iterable[Sequence[Record]]) -> list[str]:
    """`second place equals first place` of each group, for the examples."""
    return [f"{group[1].place} and {group[0].place}" for group in groups]


def _content(record: Record) -> tuple:
    return record.prompt, record.completions, record.labels


def _plain(record: Record) -> tuple:
    return normalised(record.prompt), tuple(map(normalised, record.completions)), record.labels


def _duplicates(records: Sequence[Record]) -> list[Finding]:
    exact = [group for group in _groups(records, _content) if len(group) > 1]
    firsts = [group[0] for group in _groups(records, _content)]  # near-duplicates are looked for among these
    near = [group for group in _groups(firsts, _plain) if len(group) > 1]
    return [*traps.finding("duplicates", "warning", sum(len(group) - 1 for group in exact),
                           "records that repeat another, prompt and completions alike", _equals(exact)),
            *traps.finding("near duplicates", "warning", sum(len(group) - 1 for group in near),
                           "records that repeat another but for case, punctuation and white space", _equals(near))]


def _leaks(parts: Mapping[str, Sequence[Record]]) -> list[Finding]:
    first: dict[str, tuple[str, Record]] = {}
    leaked, examples = collections.Counter(), []
    for name, part in parts.items():
        for record in part:
            # A text without a prompt leaks where the text itself stands in two parts.
            key = normalised(record.prompt) or "\0".join(map(normalised, record.completions))
            where, other = first.setdefault(key, (name, record))
            if where != name:
                leaked[where, name] += 1
                examples.append(f"{record.place} has the prompt of {other.place}")
    between = "; ".join(f"{count} of {b} stand in {a}" for (a, b), count in leaked.items())
    return traps.finding("leak", "error", sum(leaked.values()),
                         f"records whose prompt stands in an earlier part too: {between}", examples)


def _contradictions(records: Sequence[Record]) -> list[Finding]:
    opposed, examples = 0, []
    for group in _groups(records, lambda r: (r.prompt, frozenset(r.completions)) if len(set(r.completions)) == 2
                         and len(r.completions) == 2 else None):
        other = next((r for r in group if r.completions != group[0].completions), None)
        if other is not None:
            opposed += min(collections.Counter(r.completions for r in group).values())
            examples.append(f"{other.place} and {group[0].place}")
    for group in _groups(records, lambda r: (r.prompt, r.completions) if _kind(r) == "unpaired" else None):
        other = next((r for r in group if r.labels != group[0].labels), None)
        if other is not None:
            opposed += min(collections.Counter(r.labels for r in group).values())
            examples.append(f"{other.place} and {group[0].place}")
    return traps.finding("contradictions", "warning", opposed,
                         "records that state the opposite of another on the same texts", examples)


def _completions(records: Sequence[Record]) -> list[Finding]:
    identical, alike, blank, spaces = [], [], [], []
    for record in records:
        texts = [text_of(c) for c in record.completions]
        contents = [c if isinstance(c, str) else "".join(t.content or str(t.extra or "") for t in c)
                    for c in record.completions]
        if any(not text.strip() for text in contents):
            blank.append(record.place)
        if len(texts) < 2:
            continue
        if len(set(record.completions)) == 1:
            identical.append(record.place)
        elif len({normalised(c) for c in record.completions}) == 1:
            alike.append(record.place)
        if len({text[:1].isspace() for text in texts if text}) == 2:
            spaces.append(record.place)
    return [*traps.finding("identical completions", "error", len(identical),
                           "records whose completions are all the same: they state no preference", identical),
            *traps.finding("blank completions", "error", len(blank), "records with a completion of nothing but white "
                           "space", blank),
            *traps.finding("alike completions", "warning", len(alike), "records whose completions differ in case, "
                           "punctuation and white space only", alike),
            *traps.finding("leading space", "warning", len(spaces), "records where some completions open with white "
                           "space and some do not: a cue that has nothing to do with quality", spaces)]


def _mixed(parts: Mapping[str, Sequence[Record]]) -> list[Finding]:
    mixed = {name: kinds for name, part in parts.items()
             if len(kinds := collections.Counter(_kind(record) for record in part)) > 1}
    return traps.finding("mixed kinds", "warning", len(mixed), "parts that hold several kinds of records, which no one "
                         "loss reads", [f"{name}: {dict(kinds)}" for name, kinds in mixed.items()])


def _names(record: Any) -> list[str]:
    """What the completions of a record are called in the lengths: chosen, rejected, or completion."""
    count = len(record.completions)
    return ["chosen", "rejected"] if count == 2 else ["completion"] * count


def _characters(records: Sequence[Record]) -> dict[str, np.ndarray]:
    def size(content: Content) -> int:
        return len(content) if isinstance(content, str) else sum(len(turn.content or "") for turn in content)

    return _by_name((_names(r), size(r.prompt), [size(c) for c in r.completions]) for r in records)


def _tokens(records: Iterable[Any]) -> dict[str, np.ndarray]:
    return _by_name((_names(r), len(r.prompt), [len(c) for c in r.completions]) for r in records)


def _by_name(rows: Iterable[tuple[list[str], int, list[int]]]) -> dict[str, np.ndarray]:
    out: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "completion": []}
    for names, prompt, completions in rows:
        out["prompt"].append(prompt)
        for name, size in zip(names, completions, strict=True):
            out[name].append(size)
    return {name: np.asarray(values, np.int64) for name, values in out.items()}


def _summary(values: np.ndarray) -> dict[str, float]:
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return {"n": len(values), "mean": float(values.mean()), "median": float(median), "p90": float(p90),
            "p99": float(p99), "max": int(values.max())}


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share; 95% for z = 1.96."""
    share, scale = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / scale
    return middle - half, middle + half


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(a random positive exceeds a random negative), ties counted half: the area under the ROC curve."""
    ordered = np.sort(negatives)
    below, upto = np.searchsorted(ordered, positives, "left"), np.searchsorted(ordered, positives, "right")
    return float(np.mean((below + upto) / 2) / len(ordered))


def _length_bias(values: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Share of pairs whose chosen completion is longer (those of equal length left out), and the AUC of length."""
    chosen, rejected = values["chosen"], values["rejected"]
    if not len(chosen):
        return None
    longer, equal = int(np.sum(chosen > rejected)), int(np.sum(chosen == rejected))
    unequal = len(chosen) - equal
    low, high = wilson(longer, unequal) if unequal else (0.0, 1.0)
    return {"pairs": len(chosen), "longer": longer / unequal if unequal else 0.5, "low": low, "high": high,
            "equal": equal, "auc": auc(chosen, rejected)}


def _bias_finding(bias: Mapping[str, float] | None) -> list[Finding]:
    if bias is None or not (bias["low"] > BIASED or bias["high"] < 1 - BIASED):
        return []
    return traps.finding("length bias", "warning", bias["pairs"],
                         f"pairs of which {bias['longer']:.1%} prefer the longer completion: length alone tells "
                         "chosen from rejected, and a model will learn it", [])


def _labels(records: Sequence[Record]) -> dict[str, int] | None:
    labels = [record.labels[0] for record in records if _kind(record) == "unpaired"]
    good = sum(label > 0.5 for label in labels)
    return {"desirable": good, "undesirable": len(labels) - good} if labels else None


def _label_findings(records: Sequence[Record], labels: Mapping[str, int] | None) -> list[Finding]:
    if labels is None:
        return []
    rare = min(labels, key=lambda name: labels[name])
    total = sum(labels.values())
    if labels[rare] >= UNBALANCED * total:
        return []
    examples = [r.place for r in records if _kind(r) == "unpaired" and (r.labels[0] > 0.5) == (rare == "desirable")]
    return traps.finding("label balance", "warning", total, f"unpaired records of which {labels[rare]} are {rare}; "
                         "losses on labels need both, or weights that make up for it", examples)
