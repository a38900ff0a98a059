"""Dialogues as immutable messages, and the checks that every text and JSON value of a record passes.

A message has a role, a text, and whatever else its turn carries (`tool_calls`, `name`, `thinking`, ...), which
templates read and everything else leaves alone. Messages and their extras are immutable, hashable and picklable, so
that records may be compared, shared between processes and used as keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignax.types import DataError

ASSISTANT = "assistant"


class Frozen(Mapping):
    """An immutable JSON object: a mapping whose lists are tuples and whose objects are `Frozen`."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any] | None = None):
        self._fields = {str(key): freeze(value) for key, value in (fields or {}).items()}

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __hash__(self) -> int:
        return hash(frozenset(self._fields.items()))

    def __repr__(self) -> str:
        return f"Frozen({self._fields!r})"


def freeze(value: Any) -> Any:
    """An immutable copy of a JSON value: objects become `Frozen`, lists become tuples."""
    if isinstance(value, Mapping):
        return value if isinstance(value, Frozen) else Frozen(value)
    return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value


def thaw(value: Any) -> Any:
    """The inverse of `freeze`: plain dicts and lists, as `json` and templates expect them."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    role: `system`, `user`, `assistant`, `tool` or whatever the template knows. content: the text, or None for a turn
    that consists of its extras (an assistant's tool calls). extra: the turn's other fields, immutable.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=Frozen)

    def __post_init__(self):
        object.__setattr__(self, "extra", freeze(self.extra))

    def to_json(self) -> dict[str, Any]:
        """{"role", "content", **extra} as plain dicts and lists, as templates read it."""
        return {"role": self.role, "content": self.content, **thaw(self.extra)}


Dialogue = tuple[Message, ...]


def check_text(value: Any, place: str, field: str, *, empty: bool = True) -> str:
    """`value` where it is a string of valid Unicode; else DataError naming place and field.

    empty: whether it may be empty. Lone surrogates (legal in JSON escapes) cannot be encoded and are refused.
    """
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r}: expected a string, found {type(value).__name__} {value!r:.80}")
    if not value and not empty:
        raise DataError(f"{place}: field {field!r}: a completion is empty; expected at least one character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: field {field!r}: holds a lone surrogate at character {error.start}; expected valid "
                        "Unicode") from error
    return value


def check_json(value: Any, place: str, field: str) -> Any:
    """`value` where all its strings are valid Unicode and all its numbers finite; else DataError."""
    if isinstance(value, str):
        check_text(value, place, field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: field {field!r}: expected a finite number, found {value!r}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, place, field)
            check_json(item, place, f"{field}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_json(item, place, f"{field}[{index}]")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise DataError(f"{place}: field {field!r}: expected a JSON value, found {type(value).__name__}")
    return value


def message(value: Any, place: str, field: str) -> Message:
    """One message from its JSON object; DataError (place and field) on anything but a role and a text.

    A turn may have no `content`, or null, where it has other fields (tool calls, thoughts); an assistant's empty
    turn without any is refused, since nothing of it can be trained on. Other fields that are null count as absent.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: field {field!r}: expected a message, an object with 'role' and 'content', found "
                        f"{type(value).__name__} {value!r:.80}")
    if "role" not in value:
        raise DataError(f"{place}: field {field!r}: missing 'role'; found {sorted(map(str, value))}")
    role = check_text(value["role"], place, f"{field}.role")
    if not role:
        raise DataError(f"{place}: field '{field}.role': the role is empty; expected for instance 'user'")
    extra = {key: item for key, item in value.items() if key not in ("role", "content") and item is not None}
    carries = any(item not in ("", [], {}) for item in extra.values())
    content = value.get("content")
    if content is None and not carries:
        raise DataError(f"{place}: field {field!r}: missing 'content'; found {sorted(map(str, value))}")
    if isinstance(content, list):
        raise DataError(f"{place}: field '{field}.content': expected a string, found a list of parts; only text is "
                        "read")
    if content is not None:
        check_text(content, place, f"{field}.content", empty=carries or role != ASSISTANT)
    return Message(role, content, Frozen(check_json(extra, place, field)))


def dialogue(value: Any, place: str, field: str) -> Dialogue:
    """A tuple of messages from a JSON list; DataError where it is no list or a message is faulty."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{place}: field {field!r}: expected a list of messages, found {type(value).__name__} "
                        f"{value!r:.80}")
    return tuple(message(item, place, f"{field}[{index}]") for index, item in enumerate(value))


def check_answer(turns: Dialogue, place: str, field: str) -> Dialogue:
    """`turns` where they are a completion: they open with an assistant turn; else DataError."""
    if not turns:
        raise DataError(f"{place}: field {field!r}: a completion is empty; expected at least one assistant turn")
    if turns[0].role != ASSISTANT:
        raise DataError(f"{place}: field {field!r}: the completion opens with a {turns[0].role!r} turn; expected "
                        f"{ASSISTANT!r} (whole dialogues are given without a prompt)")
    return turns


def shared_prompt(dialogues: Sequence[Dialogue], place: str, fields: Sequence[str]) -> tuple[Dialogue, list[Dialogue]]:
    """(prompt, completions): the longest common prefix of whole dialogues, and what follows it in each.

    Identical dialogues are cut before their last turn. Raises DataError where a dialogue ends inside the common
    prefix or goes on with a turn that is not the assistant's.
    """
    first = dialogues[0]
    shortest = min(len(turns) for turns in dialogues)
    common = next((i for i in range(shortest) if any(turns[i] != first[i] for turns in dialogues)), shortest)
    if common and all(turns == first for turns in dialogues):
        common -= 1
    rests = [check_answer(turns[common:], f"{place}", field) for turns, field in zip(dialogues, fields, strict=True)]
    return first[:common], rests


def trained_turns(turns: Dialogue, place: str, field: str) -> tuple[Dialogue, Dialogue]:
    """(prompt, completion) of one dialogue: everything before the first assistant turn, and the rest.

    Text behind the last assistant turn is kept in the completion, where it is not trained on. DataError where the
    dialogue has no assistant turn.
    """
    first = next((index for index, turn in enumerate(turns) if turn.role == ASSISTANT), None)
    if first is None:
        raise DataError(f"{place}: field {field!r}: no {ASSISTANT!r} turn to train on; roles are "
                        f"{[turn.role for turn in turns]}")
    return turns[:first], turns[first:]
