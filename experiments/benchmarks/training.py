"""Contenders of a DPO run, and the two things that every such benchmark does: the parity gate and timed rounds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common import Contender, Ring, gate
from rich.console import Console

LOG_PROBS, FIRST_LOSS, LATER_LOSS = 1e-4, 1e-5, 2e-3


def ours(name: str, *, layout: str = "padded", reference: str = "frozen", remat: str = "dots", unroll: int = 1,
         multiple: int = 8, columns: int = 0) -> Contender:
    """A row of ours; the defaults are those of the library's configs, but remat keeps the results of weight products
    only: at these sizes faster than keeping everything, in a third of the memory."""
    return Contender(name, sys.executable, "worker_ours.py",
                     dict(layout=layout, reference=reference, remat=remat, unroll=unroll, multiple=multiple,
                          columns=columns))


def trl(name: str, python: str, *, bf16: bool = False, reference: str = "frozen") -> Contender:
    """A row of TRL's DPOTrainer."""
    return Contender(name, python, "worker_trl.py", dict(bf16=bf16, reference=reference))


def tunix(name: str, python: str) -> Contender:
    """A row of Tunix's DPOTrainer."""
    return Contender(name, python, "worker_tunix.py")


def check(ring: Ring, losses: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """The parity gate over contenders in float32: log-probs of every sequence of the first batch, the loss of the
    first step, and (given after warm-up) losses after it, which depend on gradients and optimiser; a run in bfloat16
    is told how far it is. Raises DataError where they differ."""
    exact = [w.name for w in ring.workers if not w.settings.get("bf16")]
    out: dict[str, Any] = {}
    if len(exact) > 1:
        loaded = ring.loaded
        out["log_probs"] = gate({n: loaded[n]["log_probs"] for n in exact}, LOG_PROBS, "log-probs")
        out["first_loss"] = gate({n: [loaded[n]["loss"]] for n in exact}, FIRST_LOSS, "first losses")
        if losses is not None:
            out["later_losses"] = gate({n: losses[n] for n in exact}, LATER_LOSS, "losses after the first update")
    return out


def timed(ring: Ring, console: Console, *, rounds: int, steps: int, warmup: int) -> tuple[dict, dict[str, Any]]:
    """(name -> {"seconds" per round and step, "peak"}, what the parity gate found)."""
    check(ring)
    warm = ring.all("steps", count=warmup)
    apart = check(ring, {name: answer["losses"] for name, answer in warm.items()})
    answers = ring.rounds(rounds, console, "steps", count=steps)
    measured = {}
    for name, given in answers.items():
        measured[name] = dict(
            rounds=[sum(a["seconds"]) / steps for a in given], cpu=[a["cpu"] for a in given],
            peak_steps=given[-1]["peak"],
            peak=max(p for p in (given[-1]["peak"] or 0, ring.loaded[name]["peak"] or 0)) or None,
            first_seconds=ring.loaded[name]["first_seconds"], reference_seconds=ring.loaded[name]["reference_seconds"],
            version=ring.loaded[name]["version"], cells=ring.loaded[name]["cells"])
    return measured, apart
