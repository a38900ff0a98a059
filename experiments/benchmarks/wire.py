"""What a benchmark's worker needs in any of the virtual environments: orders in, answers out, pairs, peak memory.

Only the standard library and numpy: the peers' environments have nothing of ours. A worker reads one order per line on
its standard input (JSON) and writes one answer per line on its standard output; whatever a library prints meanwhile
goes to standard error.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


class Wire:
    """The worker's end of the line."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)  # libraries that print would spoil the protocol

    def orders(self) -> Iterator[dict[str, Any]]:
        """Orders until the driver hangs up."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, **values: Any) -> None:
        """One answer; every order gets exactly one."""
        self._out.write(json.dumps(values) + "\n")


def peak_bytes() -> int | None:
    """The high-water mark of resident memory of this process, or None where the system does not tell.

    Read from its own memory map and not from getrusage, which may still know the parent's.
    """
    if not STATUS.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else None


def forget_peak() -> None:
    """Starts the high-water mark anew, so that steps are told apart from loading and compiling; a no-op elsewhere."""
    try:
        CLEAR.write_text("5")
    except OSError:
        pass


def write_pairs(path: str | os.PathLike, pairs: list[tuple[list[int], list[int], list[int]]]) -> None:
    """(prompt, chosen, rejected) ids as flat arrays with lengths; no ids are lost or padded."""
    arrays = {}
    for column, name in enumerate(("prompt", "chosen", "rejected")):
        arrays[name] = np.concatenate([np.asarray(pair[column], np.int32) for pair in pairs])
        arrays[f"{name}_lengths"] = np.asarray([len(pair[column]) for pair in pairs])
    np.savez(path, **arrays)


def read_pairs(path: str | os.PathLike) -> list[tuple[list[int], list[int], list[int]]]:
    """What write_pairs wrote."""
    with np.load(path) as arrays:
        columns = [[piece.tolist() for piece in np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1])]
                   for name in ("prompt", "chosen", "rejected")]
    return list(zip(*columns, strict=True))


def serve(training: Callable[[dict], Any], sampling: Callable[[dict], Any], version: str) -> None:
    """Serves a contender whose updates come one at a time until the driver hangs up.

    training(order): has once() -> (seconds, loss) and facts() -> what `load` answers, asked before the first update;
    for snapshots also save(path), which writes the parameters as a Hugging Face folder. A second load begins anew.
    sampling(order): has generate(prompts, new, seed, ends, batch, show) -> the answer.
    """
    wire, run = Wire(), None
    for order in wire.orders():
        if order["do"] == "load" and order.get("task") == "generate":
            run = sampling(order)
            wire.answer(version=version)
        elif order["do"] == "load":
            run = training(order)
            facts = run.facts()
            first, loss = run.once()
            wire.answer(first_seconds=first, loss=loss, peak=peak_bytes(), version=version, **facts)
            forget_peak()
        elif order["do"] == "steps":
            spent, done = time.process_time(), [run.once() for _ in range(order["count"])]
            wire.answer(cpu=(time.process_time() - spent) / order["count"], seconds=[s for s, _ in done],
                        losses=[x for _, x in done], peak=peak_bytes())
        elif order["do"] == "save":
            run.save(order["path"])
            wire.answer()
        else:
            wire.answer(**run.generate(order["prompts"], order["new"], order["seed"], order["ends"], order["batch"],
                                       order.get("show", False)))
