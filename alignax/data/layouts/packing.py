"""Bin packing of sequences into rows: first-fit decreasing, many independent packings at once.

First-fit decreasing takes items from the longest to the shortest and puts each into the first row with room; it never
needs more than 11/9 of the best number of rows plus 6/9 (Dosa 2007). It is deterministic: equal lengths keep
their order, so that any process that packs the same lengths gets the same rows.
"""

from __future__ import annotations

import numpy as np

from alignax.types import ConfigError

_LANE_CELLS = 1 << 22  # free-space counters held at a time, 16 MB


def first_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs each lane of `sizes`, int [N, n], into rows of `capacity` columns.

    Returns (row int32 [N, n], start int32 [N, n], rows int32 [N]): where item i of a lane begins, and how many rows
    the lane fills (at least 1). Items of size 0 take no room. Work is n steps over at most n rows for all lanes
    together. Raises ConfigError where an item is longer than a row or negative.
    """
    sizes = np.asarray(sizes)
    lanes, n = sizes.shape
    if sizes.size and not 0 <= sizes.min() <= sizes.max() <= capacity:
        raise ConfigError(f"first_fit_decreasing: sizes run from {sizes.min()} to {sizes.max()}, expected 0 to "
                          f"capacity = {capacity}")
    row, start = np.zeros((2, lanes, n), np.int32)
    chunk = max(_LANE_CELLS // max(n, 1), 1)
    for low in range(0, lanes, chunk):
        part = slice(low, low + chunk)
        row[part], start[part] = _pack(sizes[part], capacity)
    # An item without tokens starts nothing: it must not count as a row of its own.
    rows = np.where(sizes > 0, row + 1, 1).max(axis=1, initial=1).astype(np.int32)
    return row, start, rows


def _pack(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, start) of lanes that fit in memory together; lanes advance side by side, item by item."""
    lanes, n = sizes.shape
    order = np.argsort(-sizes, axis=1, kind="stable")
    free = np.full((lanes, n), capacity, np.int32)
    row, start = np.zeros((2, lanes, n), np.int32)
    lane = np.arange(lanes)
    for step in range(n):
        item = order[:, step]
        size = sizes[lane, item]
        # Items placed so far lie in the first `step` rows, so one of the first step + 1 has room.
        first = (free[:, :step + 1] >= size[:, None]).argmax(axis=1)
        row[lane, item], start[lane, item] = first, capacity - free[lane, first]
        free[lane, first] -= size
    return row, start
