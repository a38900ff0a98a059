"""Per-token columns of a record: which reasoning step each token of a completion belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignax.data.records import Record
from alignax.data.tokens import Tokenizer
from alignax.types import DataError

OUTSIDE: Mapping[str, Any] = {"steps": -1}
"""What a column holds where a completion has no token; 0 for columns that are not named."""


def step_columns(record: Record, completions: Sequence[Sequence[int]], tokenizer: Tokenizer
                 ) -> dict[str, tuple[np.ndarray, ...]]:
    """{"steps": int32 arrays as long as the completions} of a text record with `extra.steps`; {} without them.

    A token belongs to the step in which it begins, ends being counted in characters of the completion; what follows
    the last end, such as an end token, to the last step. completions: the ids, special ones included, uncut.
    Raises DataError, with file and line, where the entry is not a list of (end, ...) with rising ends in the text.
    """
    if "steps" not in record.extra or record.is_chat:
        return {}
    out = []
    for k, (text, ids) in enumerate(zip(record.completions, completions, strict=True)):
        ends = _ends(record.extra["steps"][k], len(text), f"{record.place}: field 'extra.steps[{k}]'")
        starts = tokenizer.completion_starts(record.prompt, text)[:len(ids)]
        column = np.full(len(ids), len(ends) - 1, np.int32)
        column[:len(starts)] = np.minimum(np.searchsorted(ends, starts, side="right"), len(ends) - 1)
        out.append(column)
    return {"steps": tuple(out)}


def _ends(entry: Any, length: int, place: str) -> np.ndarray:
    """The ends of the steps of one completion of `length` characters."""
    try:
        ends = [step[0] for step in entry]
    except (TypeError, IndexError, KeyError):
        ends = []
    good = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if not ends or not good or sorted(set(ends)) != ends or not 0 < ends[0] <= ends[-1] <= length:
        raise DataError(f"{place}: found {str(entry):.80}; expected a list of (end, label) with ends rising within 1 "
                        f"to {length}, the characters of the completion")
    return np.asarray(ends)


def lay_out(records: Sequence[Any], shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """{name: [B, K, L]} of the columns of token records, from their `columns`; int32, bool or float32 as they are.

    Raises DataError where some records of the batch hold a column that others lack: its default would mean
    something else.
    """
    out = {}
    for name in sorted({name for record in records for name in record.columns}):
        lacking = [record for record in records if name not in record.columns]
        if lacking:
            raise DataError(f"{lacking[0].place}: the record lacks the column {name!r} that others of its batch have")
        kind = np.result_type(*(array.dtype for record in records for array in record.columns[name]))
        wide = {"i": np.int32, "u": np.int32, "b": np.bool_}.get(kind.kind, np.float32)
        table = np.full(shape, OUTSIDE.get(name, 0), wide)
        for b, record in enumerate(records):
            for k, completion in enumerate(record.completions):
                table[b, k, :len(completion)] = record.columns[name][k][:len(completion)]
        out[name] = table
    return out
