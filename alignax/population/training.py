"""One train stage of many members: in rounds that fit into memory, and from rung to rung where members are dropped.

Data order, keys and hyper-parameters of a member are those that it would have alone. What differs is rounding: an
update of N members multiplies matrices in batches, and a batch may be padded to what another member's batch needs.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from alignax import checkpoint, context, memory
from alignax.population import rules
from alignax.population.program import Program
from alignax.population.rounds import Lane, Round
from alignax.stage_setup import Setup

_PLAN = "rounds.json"


@dataclasses.dataclass
class Outcome:
    """What became of a member's stage. params: its trained parameters, NumPy; None where it diverged, and then `error`
    says at which step, or was dropped at a rung, and then `dropped` says where and why. evaluated: the numbers of its
    last evaluation. stopped: the update after which it was stopped early, else 0."""

    params: Any
    evaluated: dict[str, float]
    error: str
    compilations: int
    stopped: int = 0
    dropped: Mapping[str, Any] | None = None


def key_of(setup: Setup) -> tuple:
    """What has to be equal, beside the structure of their configs, for stages to be trained together: sizes that
    depend on the data."""
    return setup.total, len(setup.cuts), tuple(b - a for a, b in setup.cuts), setup.laid.width, setup.laid.groups, bool(
        setup.held_out), tuple(sorted(setup.others))


def train(setups: Sequence[Setup], folder: pathlib.Path, *, console: Console, stop: context.Stop,
          mesh: Mesh | None = None, steps_per_call: int = 16, memory_limit: int | None = None,
          halving: rules.Halving | None = None, early_stop: rules.EarlyStop | None = None,
          units: Sequence[Any] | None = None) -> list[Outcome]:
    """Trains the stages of `setups` together, in rounds where they do not fit into memory, and returns their outcomes.

    setups: of one structure (see structure.signature and `key_of`). folder: for the rounds' checkpoints; an
    interrupted call goes on from there, to the bit. mesh: devices that the members are divided over. halving: at each
    of its rungs the members are ranked, and the program is made again for those that go on; units: what is equal for
    members that are ranked as one (default: each for itself). Rows of metrics are written as training goes. A round
    that runs out of memory is cut in halves and begins again.
    Raises ConfigError for rungs that the stage does not have, context.Preempted when `stop` is requested and all is
    saved.
    """
    program = Program(setups, mesh, steps_per_call)
    lanes = [Lane(setup) for setup in setups]
    total, name = program.total, setups[0].name
    ends = (total,) if halving is None else halving.ends(total, program.section["eval_every"], name)
    units = list(range(len(setups))) if units is None else list(units)
    going, begin = list(range(len(setups))), 0
    for number, end in enumerate(ends):
        place = folder / f"rung-{number}" if len(ends) > 1 else folder
        found = _Span(program, [lanes[i] for i in going], place, memory_limit, begin=begin, end=end, console=console,
                      stop=stop, early_stop=early_stop, halving=halving).run()
        for i, lane in zip(going, found, strict=True):
            lanes[i] = lane
        if end == total:
            break
        _drop(lanes, units, halving, end, console)
        going, begin = [i for i, lane in enumerate(lanes) if lane.goes_on], end
        if not going:
            break
    count = len(program.compiled)
    return [Outcome(None if lane.error or lane.dropped else lane.parameters, lane.evaluated, lane.error, count,
                    lane.stopped, lane.dropped) for lane in lanes]


def _drop(lanes: Sequence[Lane], units: Sequence[Any], halving: rules.Halving, rung: int, console: Console) -> None:
    """Ranks the members that are still there and marks those that do not go on."""
    there = [i for i, lane in enumerate(lanes) if not lane.dropped and not lane.left]
    values = [None if lanes[i].error else rules.value_of(halving, lanes[i].evaluated) for i in there]
    chosen = halving.choose(values, [units[i] for i in there])
    for i, value, (kept, place, settings, count) in zip(there, values, chosen, strict=True):
        lane = lanes[i]
        if lane.error:
            lane.left = True  # it has been counted once
        elif not kept:
            lane.dropped = {"stage": lane.setup.name, "step": rung, "metric": halving.metric, "value": value,
                            "place": place, "settings": settings, "kept": count, "evaluated": lane.evaluated}
            lane.state = None
    left = sum(not (lanes[i].error or lanes[i].dropped) for i in there)
    console.print(f"{lanes[0].setup.name}, rung {rung}: {left} of {len(there)} members go on, by {halving.metric}",
                  markup=False, highlight=False)


class _Span:
    """The updates from `begin` to `end` of members, cut into rounds; the cut is kept in the folder, since how much
    memory is free is another number in another invocation. settings: for Round."""

    def __init__(self, program: Program, lanes: Sequence[Lane], folder: pathlib.Path, memory_limit: int | None, *,
                 console: Console, **settings):
        self.program, self.lanes, self.folder, self.console = program, lanes, folder, console
        self.memory_limit, self.settings = memory_limit, settings | {"console": console}
        self.ways = 1 if program.mesh is None else program.mesh.size

    def run(self) -> list[Lane]:
        """The members as they are at `end`."""
        name, rounds = self.program.setups[0].name, self._rounds()
        if len(rounds) > 1:
            self.console.print(f"{name}: {len(self.lanes)} members in {len(rounds)} rounds of {rounds[0][0]}, which "
                               "fit into memory", markup=False, highlight=False)
        out, number = [], 0
        while number < len(rounds):
            size, start, stop = rounds[number]
            place = self.folder / f"round-{number}"
            try:
                out += Round(self.program, self.lanes[start:stop], size, place, **self.settings).run()
                number += 1
            except Exception as error:
                if not memory.exhausted(error) or size <= self.ways:
                    raise
                smaller = max(size // 2 // self.ways * self.ways, self.ways)
                self.console.print(f"{name}: out of memory with {size} members at a time; those that are not done "
                                   f"begin again with {smaller}", markup=False, highlight=False)
                rounds[number:] = self._cut(smaller, start)
                self._write(rounds)
                shutil.rmtree(place, ignore_errors=True)
        return out

    def _rounds(self) -> list[list[int]]:
        """[members at once, first, last + 1] of each round, as an earlier invocation cut them, else as they fit."""
        stored = self.folder / _PLAN
        if stored.exists():
            rounds = json.loads(stored.read_text(encoding="utf-8"))
            if not any(size % self.ways for size, _, _ in rounds):
                return rounds
            self.console.print(f"{self.folder}: its rounds of {rounds[0][0]} members do not fit {self.ways} devices; "
                               "they begin again", markup=False, highlight=False, soft_wrap=True)
            shutil.rmtree(self.folder)
        rounds = self._cut(self.program.sized(len(self.lanes), self.memory_limit), 0)
        self._write(rounds)
        return rounds

    def _cut(self, size: int, start: int) -> list[list[int]]:
        count = len(self.lanes)
        return [[size, i, min(i + size, count)] for i in range(start, count, size)]

    def _write(self, rounds: list[list[int]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(self.folder / _PLAN, rounds)
