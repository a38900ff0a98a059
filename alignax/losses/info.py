"""What is known about a method: the decorator that every indexed loss carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

FIDELITIES = ("paper", "official code", "third-party code", "reconstruction")


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """Facts about a method.

    id: the index key; a variant of a method is `method:variant`. system: its name in words. arxiv: id or "".
    fidelity: what the formula was taken from; one of FIDELITIES. kind: loss or reward.
    couples_batch: the loss of an example depends on other examples of the batch.
    completions: how many completions a prompt must have; None for any number.
    init_state: makes the running state, for losses that request `state`.
    chosen_only: it trains on completion 0 of each prompt alone, as supervised losses do; the loop drops the others.
    limits: hyper-parameter -> (low, high), low <= value <= high; checked by `losses.get` on plain numbers only, as a
    traced value cannot be checked.
    """

    id: str
    system: str
    arxiv: str
    fidelity: str
    kind: str = "loss"
    couples_batch: bool = False
    completions: int | None = None
    init_state: Callable[[], Any] | None = None
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    chosen_only: bool = False


def method(
    *,
    id: str,
    system: str,
    arxiv: str,
    fidelity: str,
    kind: str = "loss",
    couples_batch: bool = False,
    completions: int | None = None,
    init_state: Callable[[], Any] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    chosen_only: bool = False,
) -> Callable[[Callable], Callable]:
    """Attach a MethodInfo as the attribute `info`; the function itself is returned unchanged.

    Raises ValueError for a fidelity outside FIDELITIES.
    """
    if fidelity not in FIDELITIES:
        raise ValueError(f"method {id!r}: fidelity = {fidelity!r}; allowed: {', '.join(FIDELITIES)}")
    info = MethodInfo(id, system, arxiv, fidelity, kind, couples_batch, completions, init_state, dict(limits or {}),
                      chosen_only)

    def attach(function: Callable) -> Callable:
        function.info = info
        return function

    return attach
