"""What a format is, and typed access to the fields of a row whose every refusal names file, line and field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from alignax.data import messages as chat
from alignax.data.records import PER_COMPLETION, Content, Record, best_first, plain
from alignax.types import DataError


class Place(NamedTuple):
    """Where a row stands: file, and line counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Unusable(DataError):
    """A sound row that states nothing to learn from (a tie, an empty answer); `reason` is what a ledger counts."""

    def __init__(self, place: Place, reason: str, detail: str = ""):
        super().__init__(f"{place}: {reason}" + (f": {detail}" if detail else ""))
        self.reason = reason


class Fields:
    """The fields of one row, or of an object inside it, read by type; DataError with place and field otherwise.

    decode: whether cells are strings that hold JSON where something other than text is asked for (CSV).
    """

    def __init__(self, values: Mapping[str, Any], place: Place, prefix: str = "", decode: bool = False):
        self.values, self.place, self.prefix, self.decode = values, place, prefix, decode

    def fail(self, name: str, message: str) -> DataError:
        """The error of one field, to be raised."""
        return DataError(f"{self.place}: field {self.prefix + name!r}: {message}")

    def get(self, name: str) -> Any:
        """The raw value; DataError where it is missing."""
        if name not in self.values:
            raise DataError(f"{self.place}: missing field {self.prefix + name!r}: found {sorted(self.values)}")
        return self.values[name]

    def _decoded(self, name: str) -> Any:
        value = self.get(name)
        if self.decode and isinstance(value, str):
            try:
                return json.loads(value.lower() if value in ("True", "False") else value)
            except (ValueError, RecursionError) as error:
                raise self.fail(name, f"expected JSON in the cell, found {value!r:.80}") from error
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there and holds something."""
        return self.values.get(name) not in (None, "")

    def text(self, name: str, *, empty: bool = True) -> str:
        """A string of valid Unicode."""
        return chat.check_text(self.get(name), str(self.place), self.prefix + name, empty=empty)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._decoded(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, f"expected a number, found {type(value).__name__} {value!r:.80}")
        if isinstance(value, int) and abs(value) > 1 << 53 or not math.isfinite(value):
            raise self.fail(name, f"expected a finite number, found {value!r:.80}")
        return float(value)

    def choice(self, name: str, allowed: Sequence[Any]) -> Any:
        """One of the allowed values (True and 1 are not the same)."""
        value = self._decoded(name) if not isinstance(allowed[0], str) else self.get(name)
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise self.fail(name, f"expected one of {list(allowed)}, found {type(value).__name__} {value!r:.80}")
        return value

    def items(self, name: str, least: int = 0) -> list[Any]:
        """A list of at least `least` entries."""
        value = self._decoded(name)
        if not isinstance(value, (list, tuple)) or len(value) < least:
            raise self.fail(name, f"expected a list of at least {least} entries, found {type(value).__name__} "
                                  f"{value!r:.80}")
        return list(value)

    def texts(self, name: str, least: int = 0, *, empty: bool = False) -> list[str]:
        """A list of strings."""
        return [chat.check_text(item, str(self.place), f"{self.prefix}{name}[{i}]", empty=empty)
                for i, item in enumerate(self.items(name, least))]

    def inside(self, name: str) -> Fields:
        """The fields of an object."""
        return self._child(self._decoded(name), name)

    def each(self, name: str, least: int = 0) -> list[Fields]:
        """The fields of each object of a list."""
        return [self._child(item, f"{name}[{i}]") for i, item in enumerate(self.items(name, least))]

    def _child(self, value: Any, name: str) -> Fields:
        if not isinstance(value, Mapping):
            raise self.fail(name, f"expected an object, found {type(value).__name__} {value!r:.80}")
        return Fields(value, self.place, f"{self.prefix}{name}.", self.decode)

    def dialogue(self, name: str) -> chat.Dialogue:
        """A list of messages."""
        return chat.dialogue(self.items(name), str(self.place), self.prefix + name)


Uses = Mapping[str, frozenset[str] | None]


def uses(*names: str, **nested: Sequence[str]) -> Uses:
    """Which fields a format reads: plain names, and objects (or lists of them) with the names read inside."""
    return {name: None for name in names} | {name: frozenset(inner) for name, inner in nested.items()}


@dataclasses.dataclass(frozen=True)
class Format:
    """One published layout of rows.

    about: what a row is and becomes, and what is left out. source: where it is published, and its licence in words.
    parse: (Fields, Place) -> records; raises DataError, or Unusable for rows that state nothing. accepts: whether
    a row has the fields that tell this layout from the others. uses: the fields that are read, None for all; others
    are counted as ignored. automatic: whether `auto` considers it (variants of a layout are asked for by name).
    gather: joins the records of all rows, where a layout spreads one prompt over several.
    """

    name: str
    about: str
    source: str
    parse: Callable[[Fields, Place], list[Record]]
    accepts: Callable[[Mapping[str, Any]], bool]
    uses: Uses | None
    automatic: bool = True
    gather: Callable[[list[Record]], list[Record]] | None = None

    def ignored(self, fields: Mapping[str, Any]) -> list[str]:
        """Names of the fields of a row that are not read, those inside objects as `outer.inner`."""
        if self.uses is None:
            return []
        found = [name for name in fields if name not in self.uses]
        for name, inner in self.uses.items():
            value = fields.get(name)
            parts = value if isinstance(value, (list, tuple)) else [value]
            if inner is not None:
                keys = {key for part in parts if isinstance(part, Mapping) for key in part}
                found += [f"{name}.{key}" for key in keys - inner]
        return sorted(map(str, found))


def having(*names: str, without: Sequence[str] = ()) -> Callable[[Mapping[str, Any]], bool]:
    """A test for rows that have all `names` and none of `without`."""
    return lambda fields: all(name in fields for name in names) and not any(name in fields for name in without)


def record(place: Place, prompt: Content, completions: Sequence[Content], *, scores: Sequence[float] | None = None,
           labels: Sequence[float] | None = None, margin: float | None = None, **extra: Any) -> Record:
    """A record whose id is a hash of content and line; lists are put best first, by scores, else by
    labels. None in `extra` is absent.

    Raises Unusable where a completion, or an assistant turn in it, is empty or blank.
    """
    for completion in completions:
        said = [completion] if isinstance(completion, str) else [
            turn.content or "" for turn in completion if turn.role == chat.ASSISTANT and not turn.extra]
        if not all(text.strip() for text in said):
            raise Unusable(place, "empty completion")
    extra = chat.freeze({name: value for name, value in extra.items() if value is not None})
    own = [name for name in PER_COMPLETION if name in extra]
    rank = labels if scores is None else scores
    completions, scores, labels, *columns = best_first(
        [0.0] * len(completions) if rank is None else rank, completions, scores, labels, *(extra[n] for n in own))
    extra = chat.Frozen({**extra, **dict(zip(own, columns, strict=True))})
    chat.check_json(extra, str(place), "extra")
    content = json.dumps([plain(prompt), [plain(c) for c in completions], scores, labels, margin, chat.thaw(extra),
                          place.line], ensure_ascii=True)
    name = hashlib.sha256(content.encode("ascii")).hexdigest()[:16]
    return Record(name, prompt, completions, scores, labels, margin, place.file, place.line, extra=extra)


def by_prompt(records: list[Record]) -> list[Record]:
    """Joins neighbouring scored rows of one prompt into a list, best first; the first row names file and line."""
    groups: list[list[Record]] = []
    for item in records:
        if groups and groups[-1][0].prompt == item.prompt:
            groups[-1].append(item)
        else:
            groups.append([item])
    out = []
    for group in groups:
        if len(group) == 1:
            out += group
            continue
        first = group[0]
        aspects = [value for item in group for value in item.extra["aspects"]] if "aspects" in first.extra else None
        out.append(record(Place(first.file, first.line), first.prompt, [c for item in group for c in item.completions],
                          scores=[s for item in group for s in item.scores], aspects=aspects))
    return out
