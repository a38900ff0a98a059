"""Which members train on: successive halving at rungs, and an early end for those that get no better.

Both read the numbers of a stage's evaluation. A rung is a number of updates at which members are ranked and the best
share of them goes on (successive halving: Jamieson and Talwalkar, arXiv 1502.07943). Members that differ in the seed
only stand and fall together, by their mean: dropping the worse seeds of a setting would make it look better than it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignax.types import ConfigError

MODES = ("min", "max")


@dataclasses.dataclass(frozen=True)
class Halving:
    """metric: a number of the evaluation (`loss`, `accuracy`, ...), mode: min or max. rungs: rising numbers of updates,
    each a multiple of the stage's eval_every and before its end. keep: share of the settings that go on at each rung,
    above 0 and below 1, rounded up. stage: a train stage, by default a member's last."""

    metric: str
    mode: str
    rungs: tuple[int, ...]
    keep: float
    stage: str = ""

    def ends(self, total: int, eval_every: int, name: str) -> tuple[int, ...]:
        """The rungs and the stage's end. Raises ConfigError for a rung where nothing is evaluated or left to train."""
        for rung in self.rungs:
            if rung % eval_every or rung >= total:
                raise ConfigError(f"rungs={self.rungs}: {rung}; allowed: multiples of config.{name}.eval_every="
                                  f"{eval_every} below the stage's {total} updates")
        return *self.rungs, total

    def updates(self, total: int, units: Sequence[Any], *, after: bool = False) -> int:
        """The updates of all members together in a stage of `total`, or (after) in a later one. units: as for `choose`,
        of one program; where settings have unequal numbers of seeds, as if they had equal ones."""
        settings = len(set(units))
        done, begin, going = 0, 0, settings
        for rung in self.rungs:
            done += (min(rung, total) - begin) * going
            begin, going = min(rung, total), self._count(going)
        done = total * going if after else done + (total - begin) * going
        return round(done * len(units) / max(settings, 1))

    def _count(self, settings: int) -> int:
        """How many settings go on at a rung."""
        return math.ceil(self.keep * settings - 1e-9)  # 0.1 * 30 is more than 3 in binary

    def choose(self, values: Sequence[float | None], units: Sequence[Any]) -> list[tuple[bool, int, int, int]]:
        """For each member: (whether it goes on, the place of its settings from 1, how many settings, how many go on).

        values: the metric of each member, None for one that diverged. units: what is equal for members that stand and
        fall together. Settings of which a seed diverged or is not finite come last, equal ones in the given order.
        """
        held: dict[Any, list[float]] = {}
        for unit, value in zip(units, values, strict=True):
            held.setdefault(unit, []).append(math.nan if value is None else value)
        sign = 1 if self.mode == "min" else -1
        score = {unit: sign * sum(some) / len(some) for unit, some in held.items()}
        ranked = sorted(score, key=lambda unit: score[unit] if math.isfinite(score[unit]) else math.inf)
        count = self._count(len(ranked))
        place = {unit: number for number, unit in enumerate(ranked, 1)}
        return [(place[unit] <= count, place[unit], len(ranked), count) for unit in units]


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """A member's training ends after `patience` evaluations in a row that are not better than its best one before;
    what it is then is its result. metric, mode, stage: as for Halving."""

    metric: str
    mode: str
    patience: int
    stage: str = ""

    def watch(self, seen: tuple[float, int] | None, value: float) -> tuple[float, int]:
        """(best value, evaluations since), after one more; seen: the same before, None at the first."""
        if seen is None or (value < seen[0] if self.mode == "min" else value > seen[0]):
            return value, 0
        return seen[0], seen[1] + 1


def halving(given: Mapping[str, Any], where: str = "halving") -> Halving:
    """Halving from plain settings. Raises ConfigError for unknown, missing or impossible ones; where: names them."""
    plain = _checked(given, ("metric", "mode", "rungs", "keep"), where)
    rungs = plain["rungs"] if isinstance(plain["rungs"], (tuple, list)) else (plain["rungs"],)
    if not rungs or not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in rungs) or (
            list(rungs) != sorted(set(rungs))):
        raise ConfigError(f"{where}: rungs={plain['rungs']!r}; allowed: rising numbers of updates, 1 or more")
    keep = plain["keep"]
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1:
        raise ConfigError(f"{where}: keep={keep!r}; allowed: a share above 0 and below 1")
    return Halving(plain["metric"], plain["mode"], tuple(rungs), float(keep), plain["stage"])


def early_stop(given: Mapping[str, Any], where: str = "early_stop") -> EarlyStop:
    """EarlyStop from plain settings. Raises ConfigError for unknown, missing or impossible ones; where: names them."""
    plain = _checked(given, ("metric", "mode", "patience"), where)
    patience = plain["patience"]
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ConfigError(f"{where}: patience={patience!r}; allowed: a number of evaluations, 1 or more")
    return EarlyStop(plain["metric"], plain["mode"], patience, plain["stage"])


def _checked(given: Mapping[str, Any], needed: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or set(given) - {*needed, "stage"} or set(needed) - set(given):
        raise ConfigError(f"{where}={given!r}; expected {', '.join(needed)}, and optionally stage")
    plain = {"stage": ""} | dict(given)
    if plain["mode"] not in MODES:
        raise ConfigError(f"{where}: mode={plain['mode']!r}; allowed: {', '.join(MODES)}")
    for key in ("metric", "stage"):
        if not isinstance(plain[key], str) or (key == "metric" and not plain[key]):
            raise ConfigError(f"{where}: {key}={plain[key]!r}; allowed: a name")
    return plain


def applies(rule: Halving | EarlyStop | None, stage: str, plain: Mapping[str, Any]) -> bool:
    """Whether a rule is about this stage of a member; plain: its config."""
    if rule is None:
        return False
    return stage == (rule.stage or [s for s in plain["stages"] if plain[s]["kind"] == "train"][-1])


def check(rule: Halving | EarlyStop, plain: Mapping[str, Any], where: str) -> None:
    """Refuses, before anything runs, a rule that a member's config cannot follow. plain: the config; where: its name.

    Raises ConfigError where it has no such train stage, or evaluates at no rung; the metric is known later.
    """
    trained = [s for s in plain["stages"] if plain.get(s, {}).get("kind") == "train"]
    if not trained or (rule.stage and rule.stage not in trained):
        raise ConfigError(f"{where}: stage={rule.stage!r}; allowed, the train stages: {', '.join(trained) or 'none'}")
    section = plain[rule.stage or trained[-1]]
    if isinstance(rule, Halving):
        try:
            rule.ends(section["steps"] or rule.rungs[-1] + 1, section["eval_every"], rule.stage or trained[-1])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def value_of(rule: Halving | EarlyStop, evaluated: Mapping[str, float]) -> float:
    """The rule's number in an evaluation. Raises ConfigError, with the names there are, where it is missing."""
    if rule.metric not in evaluated:
        raise ConfigError(f"metric={rule.metric!r} is no number of the evaluation; allowed: "
                          f"{', '.join(sorted(evaluated))}")
    return evaluated[rule.metric]
