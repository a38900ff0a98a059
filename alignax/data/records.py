"""Preference records on disk: one JSON object per line, plain or gzipped.

The layout of a line follows from its fields (an optional `id` and `margin` may accompany any of them):

    prompt, chosen, rejected                    a pair; completion 0 is the chosen one
    prompt, completions [, scores] [, labels]   a list, put best first (stably) where scores are given
    prompt, completion [, label]                unpaired, label true/false or 1/0
    prompt                                      a prompt to sample from
    text                                        plain text: an empty prompt and one completion

Every fault is a DataError that names file, line and field. Other fields are ignored and noted in the ledger.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignax.data.ledger import Ledger
from alignax.types import ConfigError, DataError

LAYOUTS: tuple[tuple[frozenset[str], frozenset[str]], ...] = (  # (required, optional) content fields
    (frozenset({"prompt", "chosen", "rejected"}), frozenset()),
    (frozenset({"prompt", "completions"}), frozenset({"scores", "labels"})),
    (frozenset({"prompt", "completion"}), frozenset({"label"})),
    (frozenset({"prompt"}), frozenset()),
    (frozenset({"text"}), frozenset()),
)
CONTENT = frozenset().union(*(required | optional for required, optional in LAYOUTS))
ON_IDENTICAL = ("error", "drop", "keep")


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt and its completions, with the place it came from.

    completions: empty for a prompt to sample from; pairs have the chosen one first, scored lists the best first.
    scores, labels: one per completion or None. margin: external margin of the pair or None.
    file, line: the source, line counted from 1.
    """

    id: str
    prompt: str
    completions: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    labels: tuple[float, ...] | None = None
    margin: float | None = None
    file: str = "<memory>"
    line: int = 0

    @property
    def place(self) -> str:
        """`file:line`, as error messages give it."""
        return f"{self.file}:{self.line}"


def record_number(id: str) -> np.uint32:
    """A stable 32-bit number of a record id: the first four bytes of its SHA-256, big endian."""
    return np.uint32(int.from_bytes(hashlib.sha256(id.encode("utf-8")).digest()[:4], "big"))


def _layout_names() -> str:
    lines = []
    for required, optional in LAYOUTS:
        names = [name for name in ("prompt", "chosen", "rejected", "completions", "completion", "text")
                 if name in required]
        lines.append("{" + ", ".join(names + [f"[{name}]" for name in sorted(optional, reverse=True)]) + "}")
    return " | ".join(lines)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object")
    return found


class _Line:
    """The fields of one line with typed access; every refusal names file, line and field."""

    def __init__(self, fields: dict[str, Any], file: str, number: int):
        self.fields, self.file, self.number = fields, file, number

    def fail(self, field: str, message: str) -> DataError:
        return DataError(f"{self.file}:{self.number}: field {field!r}: {message}")

    def text(self, field: str, *, empty: bool, value: Any = None) -> str:
        value = self.fields[field] if value is None else value
        if not isinstance(value, str):
            raise self.fail(field, f"expected a string, found {type(value).__name__} {value!r:.80}")
        if not value and not empty:
            raise self.fail(field, "a completion is empty; expected at least one character")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.fail(field, f"holds a lone surrogate at character {error.start}; expected valid Unicode") \
                from error
        return value

    def number_of(self, field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(field, f"expected a number, found {type(value).__name__} {value!r:.80}")
        try:
            value = float(value)
        except OverflowError as error:
            raise self.fail(field, "expected a number in the range of a float, found a larger integer") from error
        if not math.isfinite(value):
            raise self.fail(field, f"expected a finite number, found {value!r}")
        return value

    def label_of(self, field: str, value: Any) -> float:
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return float(value)
        raise self.fail(field, f"expected true, false, 1 or 0, found {type(value).__name__} {value!r:.80}")

    def listed(self, field: str, convert, size: int | None) -> tuple:
        value = self.fields[field]
        if not isinstance(value, list):
            raise self.fail(field, f"expected a list, found {type(value).__name__} {value!r:.80}")
        if size is not None and len(value) != size:
            raise self.fail(field, f"has {len(value)} entries for {size} completions; expected one each")
        return tuple(convert(f"{field}[{index}]", item) for index, item in enumerate(value))


def _parse(line: _Line) -> Record:
    """One record from the fields of a line."""
    fields = line.fields
    present = CONTENT & fields.keys()
    layout = next((required for required, optional in LAYOUTS
                   if required <= present and present <= required | optional), None)
    if layout is None:
        options = [required for required, optional in LAYOUTS if present <= required | optional and present]
        missing = sorted(min(options, key=lambda r: len(r - present)) - present) if options else []
        missing = missing if present else ["prompt"]
        problem = f"missing field {missing[0]!r}" if missing else "the fields fit no layout"
        raise DataError(f"{line.file}:{line.number}: {problem}: found {sorted(fields)}; "
                        f"legal layouts: {_layout_names()}")
    scores = labels = None
    prompt = line.text("prompt", empty=True) if "prompt" in layout else ""
    if "chosen" in layout:
        completions = (line.text("chosen", empty=False), line.text("rejected", empty=False))
    elif "completions" in layout:
        completions = line.listed("completions", lambda name, item: _Line({name: item}, line.file, line.number).text(
            name, empty=False), None)
        if not completions:
            raise line.fail("completions", "the list is empty; expected at least one completion")
        if "scores" in fields:
            scores = line.listed("scores", line.number_of, len(completions))
        if "labels" in fields:
            labels = line.listed("labels", line.label_of, len(completions))
        if scores is not None:
            order = sorted(range(len(scores)), key=lambda k: -scores[k])  # sorted() is stable: ties keep file order
            completions = tuple(completions[k] for k in order)
            labels = None if labels is None else tuple(labels[k] for k in order)
            scores = tuple(scores[k] for k in order)
    elif "completion" in layout:
        completions = (line.text("completion", empty=False),)
        if "label" in fields:
            labels = (line.label_of("label", fields["label"]),)
    elif "text" in layout:
        completions = (line.text("text", empty=False),)
    else:
        completions = ()
    margin = line.number_of("margin", fields["margin"]) if fields.get("margin") is not None else None
    if "id" in fields:
        name = fields["id"]
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise line.fail("id", f"expected a non-empty string or an integer, found {type(name).__name__} "
                                  f"{name!r:.80}")
        name = line.text("id", empty=False, value=str(name))
    else:
        content = json.dumps([prompt, completions, scores, labels, margin, line.number], ensure_ascii=True)
        name = hashlib.sha256(content.encode("ascii")).hexdigest()[:16]
    return Record(name, prompt, completions, scores, labels, margin, line.file, line.number)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of a plain or gzipped file; read errors become DataError with the line reached."""
    number = 0
    try:
        with (gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")) as handle:
            for number, raw in enumerate(handle, 1):
                yield number, raw
    except FileNotFoundError as error:
        raise DataError(f"{path}:0: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from error


def read_jsonl(path: str | os.PathLike, *, on_identical: str = "error", ledger: Ledger | None = None) -> list[Record]:
    """Reads a .jsonl or .jsonl.gz file of records (layouts: see the module).

    on_identical: what to do with a pair or list whose completions are all the same text, so that it states no
    preference: `error`, `drop` (needs a ledger: nothing is dropped uncounted) or `keep` (noted in the ledger).
    An absent id becomes a hash of content and line number. Blank lines and ignored fields are noted in the ledger.

    Raises DataError (file:line and field) on a missing or unreadable file, broken JSON or UTF-8, a missing or
    ill-typed field, an empty completion, and duplicate ids; ConfigError on an illegal `on_identical` or suffix.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"read_jsonl: {str(path)!r} ends in neither '.jsonl' nor '.jsonl.gz'")
    if on_identical not in ON_IDENTICAL:
        raise ConfigError(f"read_jsonl: on_identical is {on_identical!r}, allowed are {list(ON_IDENTICAL)}")
    if on_identical == "drop" and ledger is None:
        raise ConfigError("read_jsonl: on_identical 'drop' needs a ledger, so that what is dropped is counted")
    tally = Ledger() if ledger is None else ledger
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, raw in _raw_lines(path):
        if not raw.strip():
            tally.note("blank line")
            continue
        try:
            fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not valid UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: broken JSON: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(fields).__name__}")
        record = _parse(_Line(fields, str(path), number))
        if record.id in seen:
            raise DataError(f"{path}:{number}: field 'id': {record.id!r} is already used on line {seen[record.id]}; "
                            "ids must be unique")
        seen[record.id] = number
        for name in fields.keys() - CONTENT - {"id", "margin"}:
            tally.note(f"ignored field {name!r}")
        if len(record.completions) > 1 and len(set(record.completions)) == 1:
            field = "rejected" if "rejected" in fields else "completions"
            if on_identical == "error":
                raise DataError(f"{record.place}: field {field!r}: all {len(record.completions)} completions are "
                                f"identical; on_identical may be {list(ON_IDENTICAL)}")
            if on_identical == "drop":
                tally.drop("identical completions")
                continue
            tally.note("identical completions kept")
        records.append(record)
    return records


def _fields(record: Record) -> dict[str, Any]:
    """The JSON object that reads back as `record` (up to file and line)."""
    out: dict[str, Any] = {"id": record.id, "prompt": record.prompt}
    if len(record.completions) == 2 and record.scores is None and record.labels is None:
        out |= {"chosen": record.completions[0], "rejected": record.completions[1]}
    elif len(record.completions) == 1 and record.scores is None:
        out["completion"] = record.completions[0]
        if record.labels is not None:
            out["label"] = int(record.labels[0])
    elif record.completions:
        out["completions"] = list(record.completions)
        if record.scores is not None:
            out["scores"] = list(record.scores)
        if record.labels is not None:
            out["labels"] = [int(label) for label in record.labels]
    if record.margin is not None:
        out["margin"] = record.margin
    return out


def write_jsonl(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Writes records as JSON lines (gzipped where the name ends in .gz) and returns how many.

    Atomic: a temporary file in the same folder is synced and then renamed, so that a reader sees the old file or
    the whole new one. Plain text comes back as an empty prompt with one completion.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"write_jsonl: {str(path)!r} ends in neither '.jsonl' nor '.jsonl.gz'")
    count = 0
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as raw:
            # mtime=0 and no file name: equal records give equal bytes
            out = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.name.endswith(".gz") else raw
            for record in records:
                out.write(json.dumps(_fields(record), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
                count += 1
            if out is not raw:
                out.close()
            raw.flush()
            os.fsync(raw.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; this one is an ordinary result
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count
