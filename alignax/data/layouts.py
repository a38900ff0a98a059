"""Token records to batches: how rows are filled. Losses see [B, K, L] whichever layout is used.

padded          one row per completion: prompt, completion, padding. R = B K rows in G = B groups of K rows.
shared_prefix   one row per prompt: prompt once, then its completions side by side, none seeing another; positions
                restart after the prompt. R = B rows in G = B groups.

Slot (b, k, l) is predicted by the hidden state one token earlier: the last prompt token for l = 0. Masks are
explicit: they cover exactly the completion's tokens, EOS included where it stands, or those of them that the record
marks as scored. Where the prompt is empty and there is no BOS, nothing predicts the first token, so slot 0 is not
scored; such a completion counts one token less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from alignax.data.truncate import TokenRecord
from alignax.types import Batch, ConfigError, DataError, Stream

Multiple = int | Sequence[int]
LAYOUT_NAMES = ("padded", "shared_prefix")


def bucket(length: int, multiple: Multiple) -> int:
    """The static size for `length`: the next multiple of an int, or the smallest entry of a list that holds it.

    Raises ConfigError on a multiple below 1 and on a length beyond the longest bucket.
    """
    if isinstance(multiple, int):
        if multiple < 1:
            raise ConfigError(f"bucket: the multiple is {multiple}, expected at least 1")
        return max(-(-length // multiple), 1) * multiple
    fitting = [size for size in multiple if size >= length]
    if not fitting:
        raise ConfigError(f"bucket: length {length} exceeds every bucket of {sorted(multiple)}")
    return min(fitting)


def _width(record: TokenRecord, layout: str) -> int:
    """Columns that one record needs."""
    if layout == "padded":
        return len(record.prompt) + record.longest
    return len(record.prompt) + sum(len(c) for c in record.completions)


def bucket_shape(records: Sequence[TokenRecord], multiples: Multiple | tuple[Multiple, Multiple], *,
                 layout: str = "padded") -> tuple[int, int]:
    """(T, L) that hold all records: columns per row and slots per completion, both rounded up to buckets.

    multiples: a pair (for T, for L), each an int or a list of sizes; a single int serves both. Give the records of
    extra streams as well.
    """
    if layout not in LAYOUT_NAMES:
        raise ConfigError(f"bucket_shape: layout is {layout!r}, allowed are {list(LAYOUT_NAMES)}")
    if isinstance(multiples, int):
        multiples = (multiples, multiples)
    if len(multiples) != 2:
        raise ConfigError(f"bucket_shape: multiples is {multiples!r}, expected an int or a pair (for T, for L)")
    return (bucket(max((_width(record, layout) for record in records), default=1), multiples[0]),
            bucket(max((record.longest for record in records), default=1), multiples[1]))


def mismatched(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The same prompts with the completions of the next record (the last takes the first's), for KTO's KL term.

    Call it on the global batch before slicing, so that the partner does not depend on the number of processes.
    Raises ConfigError on fewer than two records: there is nothing to exchange.
    """
    if len(records) < 2:
        raise ConfigError(f"mismatched: the batch has {len(records)} record(s); KTO's KL term needs at least 2")
    partners = [*records[1:], records[0]]
    return [dataclasses.replace(a, completions=b.completions, completion_ended=b.completion_ended, scores=None,
                                labels=b.labels, margin=None, scored=b.scored)
            for a, b in zip(records, partners, strict=True)]


def _check(records: Sequence[TokenRecord], K: int, T: int, L: int, layout: str) -> None:
    if not records:
        raise DataError(f"{layout}: the batch has no records")
    for record in records:
        found = len(record.completions)
        if not found:
            raise DataError(f"{record.place}: {layout}: the record has no completions to lay out")
        for name, need, given in (("K", found, K), ("T", _width(record, layout), T), ("L", record.longest, L)):
            if need > given:
                raise DataError(f"{record.place}: {layout}: the record needs {name} >= {need}, given is {given} "
                                f"(prompt {len(record.prompt)}, completions {[len(c) for c in record.completions]})")


def _fill(records: Sequence[TokenRecord], K: int, T: int, L: int, pad_id: int, layout: str) -> Stream:
    """One stream; the two layouts differ in the row and column at which a completion starts."""
    _check(records, K, T, L, layout)
    B, shared = len(records), layout == "shared_prefix"
    rows = 1 if shared else K  # rows of a group, that is, of a prompt
    tokens = np.full((B, rows, T), pad_id, np.int32)
    segment, prefix, position = (np.zeros((B, rows, T), np.int32) for _ in range(3))
    row, col = np.zeros((B, K, L), np.int32), np.zeros((B, K, L), np.int32)
    targets = np.full((B, K, L), pad_id, np.int32)
    mask, valid = np.zeros((B, K, L), bool), np.zeros((B, K), bool)
    for b, record in enumerate(records):
        P = len(record.prompt)
        start = P
        for k, completion in enumerate(record.completions):
            r, C = 0 if shared else k, len(completion)
            if k == 0 or not shared:
                start = P
                tokens[b, r, :P], position[b, r, :P] = record.prompt, np.arange(P)
                segment[b, r, :P] = prefix[b, r, :P] = 1
            here = slice(start, start + C)
            tokens[b, r, here], position[b, r, here] = completion, P + np.arange(C)
            segment[b, r, here], prefix[b, r, here] = (2 + k if shared else 1), 1
            row[b, k, :C] = r
            col[b, k, :C] = start - 1 + np.arange(C)
            col[b, k, 0] = max(P - 1, 0)  # not the end of the neighbouring completion
            targets[b, k, :C] = completion
            mask[b, k, :C] = True if record.scored is None else record.scored[k]
            mask[b, k, 0] &= P > 0
            valid[b, k] = True
            start += C
    grid = (B * rows, T)
    return Stream(tokens.reshape(grid), segment.reshape(grid), prefix.reshape(grid), position.reshape(grid),
                  row, col, targets, mask, valid, groups=B)


def _batch(records: Sequence[TokenRecord], K: int, T: int, L: int, pad_id: int, layout: str,
           extra: Mapping[str, Sequence[TokenRecord]] | None) -> Batch:
    streams = {"pair": _fill(records, K, T, L, pad_id, layout)}
    for name, others in (extra or {}).items():
        if name in streams or len(others) != len(records):
            raise ConfigError(f"{layout}: extra stream {name!r} with {len(others)} records for a batch of "
                              f"{len(records)}; expected another name than 'pair' and one record each")
        streams[name] = _fill(others, K, T, L, pad_id, layout)
    B = len(records)
    labels, scores = np.zeros((B, K), np.float32), np.zeros((B, K), np.float32)
    for b, record in enumerate(records):
        labels[b, 0] = 1.0  # without labels, completion 0 is the desirable one
        if record.labels is not None:
            labels[b, :len(record.labels)] = record.labels
        if record.scores is not None:
            scores[b, :len(record.scores)] = record.scores
    data = {"labels": labels, "weights": np.ones(B, np.float32),
            "margins": np.asarray([0.0 if r.margin is None else r.margin for r in records], np.float32)}
    if all(record.scores is not None for record in records):
        data["scores"] = scores
    return Batch(streams, data, np.asarray([record.number for record in records], np.uint32))


def padded(records: Sequence[TokenRecord], *, K: int, T: int, L: int, pad_id: int,
           extra: Mapping[str, Sequence[TokenRecord]] | None = None) -> Batch:
    """One row per completion: B K rows of T columns, B groups.

    Records with fewer than K completions leave slots with `valid` False and rows of padding. `extra` lays further
    streams of the same batch out alike, for instance {"mismatched": mismatched(records)}.

    data: labels float32 [B,K] (the record's, or 1 for completion 0 and 0 for the others), margins float32 [B] (0
    where none), weights float32 [B] (ones), and scores float32 [B,K] where every record has them.
    Raises DataError with file:line where a record does not fit K, T or L: layouts never cut.
    """
    return _batch(records, K, T, L, pad_id, "padded", extra)


def shared_prefix(records: Sequence[TokenRecord], *, K: int, T: int, L: int, pad_id: int,
                  extra: Mapping[str, Sequence[TokenRecord]] | None = None) -> Batch:
    """One row per prompt: the prompt in segment 1, completion k in segment 2 + k with prefix 1.

    Completions attend to the prompt and to themselves, at positions that continue the prompt, so that log-probs
    equal those of `padded` while the prompt is computed once. T holds the prompt and all completions. Otherwise as
    `padded`.
    """
    return _batch(records, K, T, L, pad_id, "shared_prefix", extra)
