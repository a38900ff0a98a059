"""The completions that play another role than the pair's: records in, the same number of records out.

aux_prompt           the record's completions behind another prompt
reference_sample     the record's prompt with completions sampled from the reference
degraded             the record's prompt with worsening versions of its chosen completion (see alignax/data/degrade.py)

`mismatched`, which depends on the batch, is made with it (alignax/data/layouts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alignax.data.degrade import without_phrases
from alignax.data.truncate import TokenRecord, _cut_prompt
from alignax.types import ConfigError, DataError


def aux_prompts(records: Sequence[TokenRecord], *, before: Sequence[int] = (), bos_id: int | None = None,
                max_length: int | None = None, truncation: str = "error") -> tuple[list[TokenRecord], int]:
    """(the records' completions behind another prompt, how many prompts were cut).

    That prompt is the record's own `aux_prompt` where it has one; else the ids `before` and the prompt, BOS staying in
    front; else, where `before` is empty, the prompt of the next record (the last takes the first's). A prompt that
    leaves no room for the longest completion within max_length is cut on the side that `truncation` names, its BOS
    kept. Raises DataError naming the record where truncation is `error` or `drop`, or nothing of the prompt would
    remain; ConfigError where a single record has no next one.
    """
    out, cut = [], 0
    for number, record in enumerate(records):
        if record.aux_prompt is not None:
            prompt = record.aux_prompt.tolist()
        elif len(before):
            own = record.prompt.tolist()
            opening = own[:1] if bos_id is not None and own[:1] == [bos_id] else []
            prompt = [*opening, *before, *own[len(opening):]]
        elif len(records) > 1:
            prompt = records[(number + 1) % len(records)].prompt.tolist()
        else:
            raise ConfigError(f"aux_prompt: {record.place}: a single record has no next one; give the record a field "
                              "extra.aux_prompt, or data.aux_prompt")
        room = len(prompt) if max_length is None else max_length - record.longest
        if len(prompt) > room:
            if truncation not in ("left", "right") or room < 1:
                raise DataError(f"{record.place}: aux_prompt: {len(prompt)} tokens and the longest completion of "
                                f"{record.longest} exceed max_length = {max_length}; truncation may be left or right")
            prompt, cut = _cut_prompt(prompt, room, truncation, bos_id), cut + 1
        out.append(dataclasses.replace(record, prompt=np.asarray(prompt, np.int32)))
    return out, cut


def reference_samples(records: Sequence[TokenRecord], sampled: Mapping[str, np.ndarray],
                      ended: Callable[[np.ndarray], bool]) -> list[TokenRecord]:
    """The records' prompts with one sampled completion each, by record id. DataError where a record has none."""
    out = []
    for record in records:
        if record.id not in sampled:
            raise DataError(f"{record.place}: reference_sample: no completion of record {record.id!r} was kept out of "
                            "the pairs")
        ids = np.asarray(sampled[record.id], np.int32)
        out.append(dataclasses.replace(record, completions=(ids,), completion_ended=(bool(ended(ids)),), scores=None,
                                       labels=None, margin=None, scored=None, columns={}))
    return out


def degraded(records: Sequence[TokenRecord], versions: int,
             decode: Callable[[Sequence[int]], str]) -> list[TokenRecord]:
    """The records' prompts with `versions` versions of the first completion, 0 untouched, each next one poorer."""
    return [without_phrases(record, versions, decode) for record in records]
