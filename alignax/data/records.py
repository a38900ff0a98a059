"""Preference records: one type for texts and for dialogues, and its JSON form, one object per line.

The layout of a line follows from its fields:

    prompt, chosen, rejected                    a pair; completion 0 is the chosen one
    prompt, completions [, scores] [, labels]   a list, put best first (stably) by scores, else by labels
    prompt, completion [, label]                unpaired, label true/false or 1/0
    prompt                                      a prompt to sample from
    text                                        plain text: an empty prompt and one completion
    chosen, rejected                            whole dialogues: the prompt is the messages that both begin with
    messages                                    a dialogue to train on: the prompt ends before the first assistant turn

`id`, `margin`, `tools` (a list of objects, for chat templates) and `extra` (an object, kept as it is) may accompany
any of them. A prompt and its completions are texts, or lists of messages {"role", "content", ...} throughout; beside
a prompt of messages, a completion given as a text is one assistant turn. A completion opens with an assistant turn.

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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignax.data import messages as chat
from alignax.data.ledger import Ledger
from alignax.data.messages import Frozen, Message, check_text
from alignax.data.rows import json_lines
from alignax.types import ConfigError, DataError

LAYOUTS: tuple[tuple[frozenset[str], frozenset[str]], ...] = (  # (required, optional) content fields
    (frozenset({"prompt", "chosen", "rejected"}), frozenset()),
    (frozenset({"prompt", "completions"}), frozenset({"scores", "labels"})),
    (frozenset({"prompt", "completion"}), frozenset({"label"})),
    (frozenset({"prompt"}), frozenset()),
    (frozenset({"text"}), frozenset()),
    (frozenset({"chosen", "rejected"}), frozenset()),
    (frozenset({"messages"}), frozenset()),
)
CONTENT = frozenset().union(*(required | optional for required, optional in LAYOUTS))
META = frozenset({"id", "margin", "tools", "extra"})
ON_IDENTICAL = ("error", "drop", "keep")
PER_COMPLETION = ("steps", "aspects", "models")  # entries of `extra` with one item per completion

Content = str | tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt and its completions, with the place it came from.

    prompt, completions: texts, or tuples of messages throughout. completions: empty for a prompt to sample from;
    pairs have the chosen one first, scored or labelled lists the best first.
    scores, labels: one per completion or None. margin: external margin of the pair or None.
    file, line: the source, line counted from 1. tools: what a template may offer the model, as JSON objects.
    extra: whatever else a data set knows, immutable. Of its names some are fixed: `steps` holds for each completion
    its reasoning steps as (end, label), end counted in characters of the text; `aspects` for each completion an
    object of named scores; `models` for each completion its author; `answer` the reference answer.

    Raises DataError where texts and messages are mixed.
    """

    id: str
    prompt: Content
    completions: tuple[Content, ...] = ()
    scores: tuple[float, ...] | None = None
    labels: tuple[float, ...] | None = None
    margin: float | None = None
    file: str = "<memory>"
    line: int = 0
    tools: tuple[Mapping[str, Any], ...] | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=Frozen)

    def __post_init__(self):
        kinds = {type(part) for part in (self.prompt, *self.completions)}
        if kinds != {str} and kinds != {tuple}:
            raise DataError(f"{self.place}: the prompt is a {type(self.prompt).__name__}, the completions are "
                            f"{[type(c).__name__ for c in self.completions]}; expected texts (str) throughout or "
                            "tuples of messages throughout")
        object.__setattr__(self, "extra", chat.freeze(self.extra))
        if self.tools is not None:
            object.__setattr__(self, "tools", chat.freeze(self.tools))

    @property
    def place(self) -> str:
        """`file:line`, as error messages give it."""
        return f"{self.file}:{self.line}"

    @property
    def is_chat(self) -> bool:
        """Whether the record holds messages, which a chat template turns into text."""
        return not isinstance(self.prompt, str)


def record_number(id: str) -> np.uint32:
    """A stable 32-bit number of a record id: the first four bytes of its SHA-256, big endian."""
    return np.uint32(int.from_bytes(hashlib.sha256(id.encode("utf-8")).digest()[:4], "big"))


def as_dialogue(record: Record) -> Record:
    """A text record as one user turn and assistant turns that answer it; a record of messages as it is."""
    if isinstance(record.prompt, tuple):
        return record
    completions = tuple((Message(chat.ASSISTANT, str(text)),) for text in record.completions)
    return dataclasses.replace(record, prompt=(Message("user", record.prompt),), completions=completions)


def _layout_names() -> str:
    lines = []
    for required, optional in LAYOUTS:
        names = [name for name in ("prompt", "chosen", "rejected", "completions", "completion", "text", "messages")
                 if name in required]
        lines.append("{" + ", ".join(names + [f"[{name}]" for name in sorted(optional, reverse=True)]) + "}")
    return " | ".join(lines)


class _Line:
    """The fields of one line with typed access; every refusal names file, line and field."""

    def __init__(self, fields: Mapping[str, Any], file: str, number: int):
        self.fields, self.file, self.number = fields, file, number
        self.place = f"{file}:{number}"

    def fail(self, field: str, message: str) -> DataError:
        return DataError(f"{self.place}: field {field!r}: {message}")

    def prompt(self) -> Content:
        value = self.fields["prompt"]
        return chat.dialogue(value, self.place, "prompt") if isinstance(value, list) else self.text("prompt", value)

    def text(self, field: str, value: Any, *, empty: bool = True) -> str:
        return check_text(value, self.place, field, empty=empty)

    def completion(self, field: str, value: Any, prompt: Content) -> Content:
        """A completion of the prompt's kind; a text that answers messages becomes one assistant turn."""
        if isinstance(value, list):
            turns = chat.check_answer(chat.dialogue(value, self.place, field), self.place, field)
            if isinstance(prompt, str):
                raise self.fail(field, "holds messages but the prompt is a text; expected both of one kind")
            return turns
        text = self.text(field, value, empty=False)
        return text if isinstance(prompt, str) else (Message(chat.ASSISTANT, text),)

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

    def tools(self) -> tuple | None:
        value = self.fields.get("tools")
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise self.fail("tools", f"expected a list of objects, found {type(value).__name__} {value!r:.80}")
        return chat.freeze(chat.check_json(value, self.place, "tools"))

    def extra(self, size: int) -> Frozen:
        value = self.fields.get("extra")
        if value is None:
            return Frozen()
        if not isinstance(value, dict):
            raise self.fail("extra", f"expected an object, found {type(value).__name__} {value!r:.80}")
        for name in PER_COMPLETION:
            if name in value and not (isinstance(value[name], list) and len(value[name]) == size):
                raise self.fail(f"extra.{name}", f"expected a list with one entry for each of {size} completions, "
                                                 f"found {value[name]!r:.80}")
        return Frozen(chat.check_json(value, self.place, "extra"))

    def id_or(self, content: list) -> str:
        """The line's own id, or a hash of its content and number."""
        if "id" not in self.fields:
            return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()[:16]
        name = self.fields["id"]
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise self.fail("id", f"expected a non-empty string or an integer, found {type(name).__name__} "
                                  f"{name!r:.80}")
        return self.text("id", str(name))


def plain(content: Content) -> str | list[dict[str, Any]]:
    """A prompt or a completion as JSON: the text, or the list of messages."""
    return content if isinstance(content, str) else [turn.to_json() for turn in content]


def best_first(rank: Sequence[float], *columns: Sequence | None) -> list[tuple | None]:
    """The columns in the order in which `rank` falls; ties keep their order, None stays None."""
    order = sorted(range(len(rank)), key=lambda k: -rank[k])
    return [None if column is None else tuple(column[k] for k in order) for column in columns]


def _layout(line: _Line) -> frozenset[str]:
    """The required fields of the line's layout; DataError where it has none."""
    fields = line.fields
    present = CONTENT & fields.keys()
    layout = next((required for required, optional in LAYOUTS
                   if required <= present and present <= required | optional), None)
    whole = frozenset({"chosen", "rejected"})
    if layout is None or (layout == whole and not any(isinstance(fields[name], list) for name in whole)):
        options = [required for required, optional in LAYOUTS
                   if present and present <= required | optional and required != whole]  # texts need their prompt
        missing = sorted(min(options, key=lambda r: len(r - present)) - present) if options else []
        missing = missing if present else ["prompt"]
        problem = f"missing field {missing[0]!r}" if missing else "the fields fit no layout"
        raise DataError(f"{line.place}: {problem}: found {sorted(fields)}; legal layouts: {_layout_names()}")
    return layout


def from_json(fields: Mapping[str, Any], file: str = "<memory>", line: int = 0) -> Record:
    """One record from the object of a line (layouts: see the module); DataError naming file, line and field."""
    here = _Line(fields, file, line)
    layout = _layout(here)
    scores = labels = None
    completions: tuple[Content, ...] = ()
    prompt = here.prompt() if "prompt" in layout else ""
    if layout == {"chosen", "rejected"}:
        whole = [chat.dialogue(fields[name], here.place, name) for name in ("chosen", "rejected")]
        prompt, rests = chat.shared_prompt(whole, here.place, ("chosen", "rejected"))
        completions = tuple(rests)
    elif "messages" in layout:
        turns = chat.dialogue(fields["messages"], here.place, "messages")
        prompt, rest = chat.trained_turns(turns, here.place, "messages")
        completions = (rest,)
    elif "chosen" in layout:
        completions = tuple(here.completion(name, fields[name], prompt) for name in ("chosen", "rejected"))
    elif "completions" in layout:
        completions = here.listed("completions", lambda name, item: here.completion(name, item, prompt), None)
        if not completions:
            raise here.fail("completions", "the list is empty; expected at least one completion")
        if "scores" in fields:
            scores = here.listed("scores", here.number_of, len(completions))
        if "labels" in fields:
            labels = here.listed("labels", here.label_of, len(completions))
    elif "completion" in layout:
        completions = (here.completion("completion", fields["completion"], prompt),)
        if "label" in fields:
            labels = (here.label_of("label", fields["label"]),)
    elif "text" in layout:
        completions = (here.text("text", fields["text"], empty=False),)
    margin = here.number_of("margin", fields["margin"]) if fields.get("margin") is not None else None
    tools, extra = here.tools(), here.extra(len(completions))
    if (rank := labels if scores is None else scores) is not None:
        own = [name for name in PER_COMPLETION if name in extra]
        completions, scores, labels, *columns = best_first(
            rank, completions, scores, labels, *(extra[name] for name in own))
        extra = Frozen({**extra, **dict(zip(own, columns, strict=True))})
    content = [plain(prompt), [plain(c) for c in completions], scores, labels, margin, line]
    content += [chat.thaw(tools), chat.thaw(extra)] if tools is not None or extra else []
    return Record(here.id_or(content), prompt, completions, scores, labels, margin, file, line, tools, extra)


def check_on_identical(caller: str, on_identical: str, ledger: Ledger | None) -> None:
    """ConfigError on an unknown rule for identical completions, and on dropping them uncounted."""
    if on_identical not in ON_IDENTICAL:
        raise ConfigError(f"{caller}: on_identical is {on_identical!r}, allowed are {list(ON_IDENTICAL)}")
    if on_identical == "drop" and ledger is None:
        raise ConfigError(f"{caller}: on_identical 'drop' needs a ledger, so that what is dropped is counted")


class Collector:
    """Gathers records under the rules of a file: unique ids, and one rule for completions that are all identical."""

    def __init__(self, on_identical: str, ledger: Ledger):
        self.records: list[Record] = []
        self._seen: dict[str, Record] = {}
        self._rule, self._ledger = on_identical, ledger

    def add(self, record: Record, field: str) -> None:
        """Keeps, drops (counted) or refuses one record; `field` is named where its completions are identical."""
        earlier = self._seen.setdefault(record.id, record)
        if earlier is not record:
            where = f"line {earlier.line}" + (f" of {earlier.file}" if earlier.file != record.file else "")
            raise DataError(f"{record.place}: field 'id': {record.id!r} is already used on {where}; ids must be unique")
        if len(record.completions) > 1 and len(set(record.completions)) == 1:
            if self._rule == "error":
                raise DataError(f"{record.place}: field {field!r}: all {len(record.completions)} completions are "
                                f"identical; on_identical may be {list(ON_IDENTICAL)}")
            if self._rule == "drop":
                self._ledger.drop("identical completions")
                return
            self._ledger.note("identical completions kept")
        self.records.append(record)


def read_jsonl(path: str | os.PathLike, *, on_identical: str = "error", ledger: Ledger | None = None) -> list[Record]:
    """Reads a .jsonl or .jsonl.gz file of records (layouts: see the module).

    on_identical: what to do with a pair or list whose completions are all the same, so that it states no
    preference: `error`, `drop` (needs a ledger: nothing is dropped uncounted) or `keep` (noted in the ledger).
    An absent id becomes a hash of content and line number. Blank lines and ignored fields are noted in the ledger.

    Raises DataError (file:line and field) on a missing or unreadable file, broken JSON or UTF-8, a missing or
    ill-typed field, an empty completion, and duplicate ids; ConfigError on an illegal `on_identical` or suffix.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"read_jsonl: {str(path)!r} ends in neither '.jsonl' nor '.jsonl.gz'")
    check_on_identical("read_jsonl", on_identical, ledger)
    tally = Ledger() if ledger is None else ledger
    found = Collector(on_identical, tally)
    for number, fields in json_lines(path, tally):
        record = from_json(fields, str(path), number)
        for name in fields.keys() - CONTENT - META:
            tally.note(f"ignored field {name!r}")
        found.add(record, "rejected" if "rejected" in fields else "completions")
    return found.records


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object that `from_json` reads back as `record` (up to file and line)."""
    completions = [plain(c) for c in record.completions]
    out: dict[str, Any] = {"id": record.id, "prompt": plain(record.prompt)}
    if len(completions) == 2 and record.scores is None and record.labels is None:
        out |= {"chosen": completions[0], "rejected": completions[1]}
    elif len(completions) == 1 and record.scores is None:
        out["completion"] = completions[0]
        if record.labels is not None:
            out["label"] = int(record.labels[0])
    elif completions:
        out["completions"] = completions
        if record.scores is not None:
            out["scores"] = list(record.scores)
        if record.labels is not None:
            out["labels"] = [int(label) for label in record.labels]
    if record.margin is not None:
        out["margin"] = record.margin
    if record.tools is not None:
        out["tools"] = chat.thaw(record.tools)
    if record.extra:
        out["extra"] = chat.thaw(record.extra)
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
                out.write(json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
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
