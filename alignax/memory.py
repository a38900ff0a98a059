"""Out of memory: a message that says what is big and which settings make it smaller."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from alignax.types import Batch

EXIT_MEMORY = 71


class OutOfMemory(RuntimeError):
    """The devices' memory did not hold a step; the message lists the parts by size, and settings to change."""


def exhausted(error: BaseException) -> bool:
    """Whether an exception is XLA's way of saying that memory is out."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text


def size(tree: Any) -> int:
    """Bytes of a tree's arrays on one device: of a cut array, its largest piece."""

    def one(leaf) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else np.shape(leaf)
        kind = getattr(leaf, "dtype", None)
        bits = 4 if kind is None or not hasattr(kind, "itemsize") else kind.itemsize
        return int(np.prod(shape, dtype=np.int64)) * bits

    return sum(map(one, jax.tree.leaves(tree)))


def _shown(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def estimate(batch: Batch, *, layers: int, width: int, inner: int, vocab: int, head_bytes: int, remat: str,
             accumulation: int, ways: int) -> dict[str, int]:
    """Bytes of the largest arrays of a step on one device, by name; forms, not measurements.

    Activations: float32 [R,T] of about 8 widths and 3 inner widths a layer, of all layers without rematerialisation and
    of one with it. ways: over how many devices the batch is cut.
    """
    tokens = sum(int(np.prod(s.tokens.shape)) for s in batch.streams.values()) / ways / accumulation
    layer = 4 * tokens * (8 * width + 3 * inner)
    columns = max(s.tokens.shape[1] for s in batch.streams.values())
    logits = sum(int(np.prod(s.targets.shape)) for s in batch.streams.values()) / ways / accumulation * vocab * 4
    return {f"activations of {'all layers (no remat)' if remat == 'none' else 'one layer (remat)'}":
            int(layer * (layers if remat == "none" else 1)),
            f"attention scores at {columns} columns, for each head and layer": int(4 * tokens * columns),
            "logits held at once": int(min(logits, head_bytes))}


@contextlib.contextmanager
def explained(describe: Callable[[], tuple[str, Mapping[str, int], Mapping[str, str]]]) -> Iterator[None]:
    """Turns XLA's error about memory into OutOfMemory; `describe`, called only then, gives `explain` what it takes."""
    try:
        yield
    except Exception as error:
        if not exhausted(error):
            raise
        raise explain(error, *describe()) from error


def explain(error: BaseException, where: str, parts: Mapping[str, int], advice: Mapping[str, str]) -> OutOfMemory:
    """The error to raise. parts: name -> bytes on one device. advice: config key -> its value and what to set instead.

    The request that failed is taken from XLA's message where it tells it.
    """
    asked = re.search(r"(?:allocate|allocating|request for|exceeds?)\D{0,40}([\d.]+\s?[KMGT]?i?B(?:ytes)?|\d+ bytes)",
                      str(error))
    lines = [f"{where}: out of memory" + (f"; the request that failed: {asked[1]}" if asked else "")]
    lines.append("largest parts on one device: " + "; ".join(
        f"{name} {_shown(count)}" for name, count in sorted(parts.items(), key=lambda p: -p[1])[:6]))
    lines.append("what helps: " + "; ".join(f"{key}={change}" for key, change in advice.items()))
    lines.append(f"(XLA: {str(error).splitlines()[0][:300]})" if str(error) else "")
    return OutOfMemory("\n".join(filter(None, lines)))
