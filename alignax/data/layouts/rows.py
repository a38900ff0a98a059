"""Filling rows: one function for all layouts, which differ in where a piece of a record begins.

A piece is what stays together in a row: a prompt with one completion, or with all of them (shared prefix).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from alignax.data.columns import lay_out
from alignax.data.layouts.packing import first_fit_decreasing
from alignax.data.layouts.shapes import Shape, item_sizes, measure, packs, shares
from alignax.data.truncate import TokenRecord
from alignax.types import Batch, ConfigError, DataError, Stream


def mismatched(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The same prompts with the completions of the next record (the last takes the first's), for KTO's KL term.

    Call it on the global batch before slicing, so that the partner does not depend on the number of processes.
    Raises ConfigError on fewer than two records: there is nothing to exchange.
    """
    if len(records) < 2:
        raise ConfigError(f"mismatched: the batch has {len(records)} record(s); KTO's KL term needs at least 2")
    partners = [*records[1:], records[0]]
    return [dataclasses.replace(a, completions=b.completions, completion_ended=b.completion_ended, scores=None,
                                labels=b.labels, margin=None, scored=b.scored, columns=b.columns)
            for a, b in zip(records, partners, strict=True)]


def _check(records: Sequence[TokenRecord], sizes: np.ndarray, shape: Shape, layout: str) -> None:
    """Refuses records that the shape cannot hold, naming the first; sizes: int [B, U], the pieces' columns."""
    for record, pieces in zip(records, sizes, strict=True):
        found = len(record.completions)
        if not found:
            raise DataError(f"{record.place}: {layout}: the record has no completions to lay out")
        for name, need, given in (("K", found, shape.K), ("T", pieces.max(), shape.T), ("L", record.longest, shape.L)):
            if need > given:
                raise DataError(f"{record.place}: {layout}: the record needs {name} >= {need}, given is {given} "
                                f"(prompt {len(record.prompt)}, completions {[len(c) for c in record.completions]})")


def _place(records: Sequence[TokenRecord], sizes: np.ndarray, shape: Shape, layout: str,
           groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(row inside the group, first column) of each piece, int [B, U]."""
    B, U = sizes.shape
    if not packs(layout):
        return np.broadcast_to(np.arange(U), (B, U)), np.zeros((B, U), np.int64)
    row, start, rows = first_fit_decreasing(sizes.reshape(groups, B // groups * U), shape.T)
    if rows.max() > shape.rows:
        worst = int(rows.argmax())
        raise DataError(f"{records[worst * (B // groups)].place}: {layout}: the group of {B // groups} records that "
                        f"begins here needs rows >= {rows[worst]}, given is {shape.rows} of {shape.T} columns; "
                        "plan_shape(records, ..., least=shape) gives the next bucket")
    return row.reshape(B, U), start.reshape(B, U)


def _stream(records: Sequence[TokenRecord], shape: Shape, pad_id: int, layout: str, groups: int) -> Stream:
    """One stream; `groups` is that of the packed layouts, the others have one group per prompt."""
    (K, T, L, rows), B, shared = shape, len(records), shares(layout)
    prompts, lengths = measure(records)
    sizes = item_sizes(prompts, lengths, layout)
    _check(records, sizes, shape, layout)
    if not packs(layout):
        groups, rows = B, 1 if shared else K
    row_of, start_of = _place(records, sizes, shape, layout, groups)
    tokens = np.full((groups, rows, T), pad_id, np.int32)
    segment, prefix, position = np.zeros((3, groups, rows, T), np.int32)
    row, col = np.zeros((2, B, K, L), np.int32)
    targets = np.full((B, K, L), pad_id, np.int32)
    mask, valid = np.zeros((B, K, L), bool), np.zeros((B, K), bool)
    opened = np.zeros((groups, rows), np.int32)  # segments of a row so far
    # Row by row from the left, so that segments are numbered as they stand.
    group_of = np.broadcast_to(np.arange(B)[:, None] // (B // groups), row_of.shape)
    for piece in np.lexsort((start_of.ravel(), row_of.ravel(), group_of.ravel())):
        b, u = divmod(int(piece), row_of.shape[1])
        record = records[b]
        if not shared and u >= len(record.completions):
            continue
        g, r, begin, P = group_of[b, u], row_of[b, u], start_of[b, u], len(record.prompt)
        opened[g, r] += 1
        own = opened[g, r]  # segment of the prompt
        start = begin + P
        tokens[g, r, begin:start], position[g, r, begin:start] = record.prompt, np.arange(P)
        segment[g, r, begin:start] = prefix[g, r, begin:start] = own
        for k in range(len(record.completions)) if shared else (u,):
            completion = record.completions[k]
            C = len(completion)
            here = slice(start, start + C)
            opened[g, r] += shared
            tokens[g, r, here], position[g, r, here] = completion, P + np.arange(C)
            segment[g, r, here], prefix[g, r, here] = opened[g, r], own
            row[b, k, :C] = r
            col[b, k, :C] = start - 1 + np.arange(C)
            # The end of the prompt, not of the neighbouring completion or record.
            col[b, k, :min(C, 1)] = begin + max(P - 1, 0)
            targets[b, k, :C] = completion
            mask[b, k, :C] = True if record.scored is None else record.scored[k]
            mask[b, k, 0] &= P > 0
            valid[b, k] = True
            start += C
    grid = (groups * rows, T)
    return Stream(tokens.reshape(grid), segment.reshape(grid), prefix.reshape(grid), position.reshape(grid),
                  row, col, targets, mask, valid, groups=groups)


def fill(records: Sequence[TokenRecord], shape: Shape, layout: str, *, pad_id: int, groups: int = 1,
         extra: Mapping[str, Sequence[TokenRecord]] | None = None) -> Batch:
    """The batch of `records` in one of LAYOUT_NAMES, of a shape from plan_shape.

    Records with fewer than K completions leave slots with `valid` False. `extra` lays further streams of the same
    batch out alike, for instance {"mismatched": mismatched(records)}.

    groups: G of the packed layouts: record b lies in group b // (B/G), whose shape.rows rows hold it. Any multiple of
    (number of devices x micro-batches) that divides B keeps a record on its device; fewer groups fill rows better.
    padded and shared_prefix have one group per prompt, which serves any number, and take `groups` only to check it.

    data: labels float32 [B,K] (the record's, or 1 for completion 0 and 0 for the others), margins float32 [B] (0
    where none), weights float32 [B] (ones), scores float32 [B,K] where every record has them, prompt_lengths int32 [B]
    (the prompt of record b is that many columns, up to the one that predicts slot 0), and the records' columns [B,K,L].
    Raises DataError with file:line where a record does not fit K, T or L, or a group not into its rows: layouts
    never cut and never drop. Raises ConfigError where G does not divide B.
    """
    B = len(records)
    if not B:
        raise DataError(f"{layout}: the batch has no records")
    if groups < 1 or B % groups:
        raise ConfigError(f"{layout}: groups is {groups}, expected a divisor of the batch of {B} records")
    streams = {"pair": _stream(records, shape, pad_id, layout, groups)}
    for name, others in (extra or {}).items():
        if name in streams or len(others) != B:
            raise ConfigError(f"{layout}: extra stream {name!r} with {len(others)} records for a batch of "
                              f"{B}; expected another name than 'pair' and one record each")
        streams[name] = _stream(others, shape, pad_id, layout, groups)
    labels, scores = np.zeros((2, B, shape.K), np.float32)
    for b, record in enumerate(records):
        labels[b, 0] = 1.0  # without labels, completion 0 is the desirable one
        if record.labels is not None:
            labels[b, :len(record.labels)] = record.labels
        if record.scores is not None:
            scores[b, :len(record.scores)] = record.scores
    data = {"labels": labels, "weights": np.ones(B, np.float32),
            "margins": np.asarray([0.0 if r.margin is None else r.margin for r in records], np.float32),
            "prompt_lengths": np.asarray([len(r.prompt) for r in records], np.int32)}
    if all(record.scores is not None for record in records):
        data["scores"] = scores
    data |= lay_out(records, (B, shape.K, shape.L))
    return Batch(streams, data, np.asarray([record.number for record in records], np.uint32))


def padded(records: Sequence[TokenRecord], *, K: int, T: int, L: int, pad_id: int,
           extra: Mapping[str, Sequence[TokenRecord]] | None = None) -> Batch:
    """One row per completion: B K rows of T columns, B groups; rows of padding where a completion is missing.

    The same as fill with layout `padded`, which see.
    """
    return fill(records, Shape(K, T, L, K), "padded", pad_id=pad_id, extra=extra)


def shared_prefix(records: Sequence[TokenRecord], *, K: int, T: int, L: int, pad_id: int,
                  extra: Mapping[str, Sequence[TokenRecord]] | None = None) -> Batch:
    """One row per prompt: the prompt in segment 1, completion k in segment 2 + k with prefix 1.

    Completions attend to the prompt and to themselves, at positions that continue the prompt, so that log-probs
    equal those of `padded` while the prompt is computed once. T holds the prompt and all completions. Otherwise the
    same as fill with layout `shared_prefix`.
    """
    return fill(records, Shape(K, T, L, 1), "shared_prefix", pad_id=pad_id, extra=extra)


def occupancy(batch: Batch) -> tuple[int, int]:
    """(tokens, cells) of all streams: the fill of a batch is tokens / cells; add up over batches before dividing.

    A prompt that completions share counts once, since it stands in its row once.
    """
    streams = batch.streams.values()
    return sum(int((np.asarray(s.segment) > 0).sum()) for s in streams), sum(int(s.segment.size) for s in streams)
