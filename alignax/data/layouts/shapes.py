"""The static sizes of a batch: completions K, columns T, slots L, and rows of a group, rounded up to buckets.

Every different Shape is a compilation of the step, so shapes are chosen once for a whole plan, or from few buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alignax.data.layouts.packing import first_fit_decreasing
from alignax.data.truncate import TokenRecord
from alignax.types import ConfigError

Multiple = int | Sequence[int]
LAYOUT_NAMES = ("padded", "shared_prefix", "packed", "shared_prefix_packed")
_CHUNK = 1024  # batches whose rows are counted together
_ROW_BUCKETS = 8  # buckets of the number of rows of a single batch, between none and one row per sequence


class Shape(NamedTuple):
    """Completions of a prompt, columns of a row, slots of a completion, rows of a group; all static."""

    K: int
    T: int
    L: int
    rows: int


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


def shares(layout: str) -> bool:
    """Whether the completions of a prompt follow it in one row; ConfigError on an unknown layout."""
    if layout not in LAYOUT_NAMES:
        raise ConfigError(f"layout is {layout!r}, allowed are {list(LAYOUT_NAMES)}")
    return layout.startswith("shared_prefix")


def packs(layout: str) -> bool:
    """Whether sequences of different records share a row; ConfigError on an unknown layout."""
    shares(layout)
    return layout.endswith("packed")


def item_sizes(prompts: np.ndarray, completions: np.ndarray, layout: str) -> np.ndarray:
    """Columns of what the layout places as one piece: int [..., 1] for shared prefixes, otherwise int [..., K].

    prompts: int [...]. completions: int [..., K], -1 where there is none; such pieces have size 0.
    """
    if shares(layout):
        return (prompts + np.maximum(completions, 0).sum(-1))[..., None]
    return np.where(completions >= 0, prompts[..., None] + completions, 0)


def measure(records: Sequence[TokenRecord], K: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prompt lengths int64 [n], completion lengths int64 [n, K], -1 where there is none); K grows to the widest."""
    K = max(K, max((len(record.completions) for record in records), default=1))
    completions = np.full((len(records), K), -1, np.int64)
    for n, record in enumerate(records):
        completions[n, :len(record.completions)] = [len(c) for c in record.completions]
    return np.asarray([len(record.prompt) for record in records], np.int64), completions


def _pair(multiples: Multiple | tuple[Multiple, Multiple]) -> tuple[Multiple, Multiple]:
    if isinstance(multiples, int):
        return multiples, multiples
    if len(multiples) != 2:
        raise ConfigError(f"bucket_shape: multiples is {multiples!r}, expected an int or a pair (for T, for L)")
    return multiples[0], multiples[1]


def bucket_shape(records: Sequence[TokenRecord], multiples: Multiple | tuple[Multiple, Multiple], *,
                 layout: str = "padded") -> tuple[int, int]:
    """(T, L) that hold all records: columns per row and slots per completion, both rounded up to buckets.

    multiples: a pair (for T, for L), each an int or a list of sizes; a single int serves both. Give the records of
    extra streams as well. A packed row is as long as the longest piece; the number of rows is plan_shape's.
    """
    for_columns, for_slots = _pair(multiples)
    prompts, completions = measure(records)
    return (bucket(int(item_sizes(prompts, completions, layout).max(initial=1)), for_columns),
            bucket(int(completions.max(initial=1)), for_slots))


def plan_shape(records: Sequence[TokenRecord], layout: str, multiples: Multiple | tuple[Multiple, Multiple] = 8, *,
               batches: Iterable[np.ndarray] | None = None, groups: int = 1, mismatched: bool = False,
               columns: int = 0, row_multiple: Multiple | None = None, least: Shape | None = None) -> Shape:
    """The Shape that holds every batch, in every layout: one shape, hence one compilation, for a whole plan.

    K, T and L hold all `records`. `rows` is the most that any group of any batch needs when it is packed as `fill`
    packs it, so a plan whose batches were all given here never overflows; padded needs K rows, shared_prefix one.

    batches: index arrays into `records`, one per batch and of any lengths, for instance plan.sequence(steps) and the
    batches of an evaluation; None: the records are one batch. groups: G, which must divide the length of each;
    the unpacked layouts have one group per prompt, which serves any number of devices. mismatched: make room for
    the stream of that name as well. multiples: a pair (for T, for L), each an int or a list of sizes; an int serves
    both. columns: packed rows are at least so long; longer rows pack better, and attention costs T for each token.
    row_multiple: the bucket of rows, an int or a list; None is exact for given batches, whose shape is one, and eighths
    of the rows that padding would take where the records are one batch of many.
    least: the result is at least this. Shape(0, T, 0, 0) of a whole plan, for instance, leaves rows alone to vary.

    A batch that was not planned (from sampling, say) may need more rows than a shape has. `fill` refuses it rather
    than drop a record; `plan_shape(batch, ..., least=shape)` is the same shape where the batch fits and the next
    bucket where it does not, which costs one more compilation. Extra streams other than `mismatched` are given to
    a call of their own with `least`.
    Raises ConfigError on an unknown layout, a size beyond every bucket, and a batch that groups do not divide.
    """
    for_columns, for_slots = _pair(multiples)
    least = least or Shape(0, 0, 0, 0)
    prompts, completions = measure(records, least.K)
    K, L = completions.shape[1], max(bucket(int(completions.max(initial=1)), for_slots), least.L)
    index = [np.arange(len(records))] if batches is None else [np.asarray(b) for b in batches]
    streams = lambda: _streams(prompts, completions, layout, index, mismatched)
    width = max(int(item_sizes(prompts, completions, layout).max(initial=1)), columns if packs(layout) else 1)
    if mismatched:  # a completion meets the prompt before it
        width = max(width, max((int(sizes.max(initial=1)) for sizes in streams()), default=1))
    T = max(bucket(width, for_columns), least.T)
    if not packs(layout):
        return Shape(K, T, L, 1 if shares(layout) else K)
    rows, most = 1, 1
    for sizes in streams():
        size = sizes.shape[1]
        if groups < 1 or size % groups:
            raise ConfigError(f"plan_shape: groups is {groups}, expected a divisor of the batch of {size} records")
        lanes = sizes.reshape(len(sizes) * groups, size // groups * sizes.shape[2])
        rows = max(rows, int(first_fit_decreasing(lanes, T)[2].max(initial=1)))
        most = max(most, lanes.shape[1])
    if row_multiple is None:
        row_multiple = max(-(-most // _ROW_BUCKETS), 1) if batches is None else 1
        rows = min(bucket(rows, row_multiple), most)
    else:
        rows = bucket(rows, row_multiple)
    return Shape(K, T, L, max(rows, least.rows))


def _streams(prompts: np.ndarray, completions: np.ndarray, layout: str, index: list[np.ndarray],
             mismatched: bool) -> Iterator[np.ndarray]:
    """The pieces' sizes int [S, B, U] of S consecutive batches of one length at a time, stream by stream."""
    for _, alike in itertools.groupby(index, key=len):
        while some := list(itertools.islice(alike, _CHUNK)):
            own = np.stack(some)
            yield item_sizes(prompts[own], completions[own], layout)
            if mismatched:
                yield item_sizes(prompts[own], completions[np.roll(own, -1, axis=1)], layout)
