"""What a train stage can watch while it runs, what each costs, and how often that is cheap enough.

The numbers are rows of metrics.jsonl with split `diagnostics`, named `GROUP/NAME`. The probe is a fixed set of training
pairs, each with a completion that no pair holds and the greedy completion of the starting parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from alignax.diagnostics import attribution
from alignax.types import ConfigError

GROUPS = {
    "displacement": "change of log pi since the start: chosen, rejected, unseen, greedy, the baseline -KL(ref||policy)",
    "agreement": "ranking accuracy beside the idealised one, correlation of margin and length",
    "profile": "KL(ref||policy) and entropy along the completion, nats per token",
    "ches": "CHES score and its length-normalised form, from the policy's hidden states",
    "squeezing": "where the mass went that the rejected tokens lost, probability of the greedy completion",
    "lens": "logit lens of the first token at which chosen and rejected differ, layer by layer",
    "entanglement": "inner product and norms of the two log-prob gradients, the conditions they violate",
    "noise": "per-example gradient norms and the terms of the gradient noise scale",
    "attribution": "which part of the actual update moves which completion, predicted and measured",
}
SIDES = ("chosen", "rejected", "unseen", "greedy")
PROMPTS, PAIRS = 16, 8
"""Prompts of the probe, and pairs whose gradients are taken one by one."""

SHARE, MARGIN = 0.03, 1.5
"""The share of the run's time that the default interval allows, and a factor for what the count of passes leaves out
(sampling the probe, small shapes, the host)."""

GRADIENTS = ("entanglement", "noise")
_FORWARD = ("displacement", "agreement", "profile", "ches", "squeezing", "lens")


def check(names: Sequence[str], every: int, section: Mapping[str, Any], requests: Collection[str], where: str, *,
          chosen_only: bool = False) -> None:
    """Refuses `diagnostics` and `diagnose_every` of a train stage that cannot work; section: the stage's settings."""
    unknown = [name for name in names if name not in GROUPS]
    if unknown or len(set(names)) != len(names):
        raise ConfigError(f"{where}.diagnostics={tuple(names)!r}; allowed: each at most once of {', '.join(GROUPS)}")
    if every < 0:
        raise ConfigError(f"{where}.diagnose_every={every}; allowed: 0 (chosen by cost) or a number of updates")
    if every and not names:
        raise ConfigError(f"{where}.diagnose_every={every} has no effect with {where}.diagnostics=(); allowed: 0, or "
                          f"some of {', '.join(GROUPS)}")
    if not names:
        return
    if chosen_only or "rewards" in requests:
        kind = "trains on chosen completions alone" if chosen_only else "trains a reward head"
        raise ConfigError(f"{where}.diagnostics={tuple(names)!r}: the loss {section['loss']['name']!r} {kind}; "
                          "allowed: (), or a loss of pairs")
    if "attribution" in names:
        attribution.check(section["optim"]["name"], section["optim"]["options"], f"{where}.diagnostics")
        if section["optim"]["master"]:
            raise ConfigError(f"{where}.diagnostics: attribution cannot split an update of {where}.optim.master=True; "
                              "allowed: False")


def cost(names: Collection[str], *, probe: float, pairs: float, batch: float, layers: int) -> float:
    """Cells of forward passes that one look at `names` takes; a backward pass counts as two forward ones.

    probe, pairs, batch: cells (rows x columns) of the probe, of the pairs of GRADIENTS, and of a training batch.
    """
    total = 2 * probe if set(names) & set(_FORWARD) else 0.0
    total += 2 * probe * ("squeezing" in names) + (layers + 1) / 2 * probe * ("lens" in names)
    if set(names) & set(GRADIENTS):
        total += 2 * pairs  # the loss's own derivatives, by policy and reference
    total += 5 * pairs * ("entanglement" in names) + 3 * pairs * ("noise" in names)
    if "attribution" in names:
        total += 7 * batch + 8 * probe * PAIRS / PROMPTS
    return total


def interval(look: float, update: float) -> int:
    """The fewest updates between two looks at which they cost SHARE of the updates, by counted passes.

    look: of `cost`; update: cells of forward passes of one update.
    """
    return max(1, math.ceil(MARGIN * look / (SHARE * update)))
