"""One train stage of many members in one compiled program: the loop of `train`, with a leading axis N.

Data order, keys and hyper-parameters of a member are those that it would have alone. What differs is rounding: an
update of N members multiplies matrices in batches, and a batch may be padded to what another member's batch needs.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from alignax import checkpoint, context, metrics, stage_setup, step
from alignax.population import arrays
from alignax.population.program import Program
from alignax.stage_setup import Setup
from alignax.types import ConfigError

_EVAL_KEY = 2**31  # the number that `train` folds into the key of an evaluation


@dataclasses.dataclass
class Outcome:
    """What became of a member's stage. params: its trained parameters, NumPy, None where it diverged, and then
    `error` says at which step. evaluated: the numbers of its last evaluation."""

    params: Any
    evaluated: dict[str, float]
    error: str
    compilations: int


def key_of(setup: Setup) -> tuple:
    """What has to be equal, beside the structure of their configs, for stages to be trained together: sizes that
    depend on the data."""
    return setup.total, len(setup.cuts), tuple(b - a for a, b in setup.cuts), setup.laid.width, setup.laid.groups, bool(
        setup.held_out), tuple(sorted(setup.others))


def train(setups: Sequence[Setup], folder: pathlib.Path, *, console: Console, stop: context.Stop,
          mesh: Mesh | None = None, steps_per_call: int = 16, memory_limit: int | None = None) -> list[Outcome]:
    """Trains the stages of `setups` together, in rounds where they do not fit into memory, and returns their outcomes.

    setups: of one structure (see structure.signature and `key_of`). folder: for the rounds' checkpoints; an
    interrupted call goes on from there, to the bit. mesh: devices that the members are divided over. Rows of
    metrics are written as training goes. Raises context.Preempted when `stop` is requested and all is saved.
    """
    size, program = Program(setups, mesh, steps_per_call).sized(memory_limit)
    rounds = -(-len(setups) // size)
    if rounds > 1:
        console.print(f"{setups[0].name}: {len(setups)} members in {rounds} rounds of {size}, which fit into memory",
                      markup=False, highlight=False)
    out = []
    for number in range(rounds):
        some = setups[number * size:(number + 1) * size]
        # The last round is filled up with members that nobody trains, so that one program serves all.
        spare = size - len(some)
        out += _Round(program, [*some, *[some[-1]] * spare], len(some), folder / f"round-{number}", console, stop).run()
    return out


class _Round:
    """The loop over the steps of members that are trained at the same time. real: how many of them count."""

    def __init__(self, program: Program, setups: Sequence[Setup], real: int, folder: pathlib.Path, console: Console,
                 stop: context.Stop):
        self.program, self.setups, self.real, self.console, self.stop = program, setups, real, console, stop
        self.section, self.total, self.name = program.section, program.total, setups[0].name
        self.size = len(setups)
        self.hyper = program.place(program.hyper(setups))
        self.ref = program.common(setups, "ref", program.place)
        self.frozen = program.common(setups, "frozen", program.place)
        seeds = jnp.stack([jax.random.key(s.ctx.seed) for s in setups])
        self.fold = jax.jit(lambda n: jax.vmap(lambda one: jax.vmap(jax.random.fold_in, (0, None))(seeds, one))(n))
        self.saved = checkpoint.Checkpoints(folder / "checkpoints")
        self.best = [{} for _ in setups]
        self.errors = [""] * self.size
        self.windows = [metrics.Window() for _ in setups]
        self._evaluators()

    def _evaluators(self) -> None:
        program, spec = self.program, self.program.spec(self.size)
        own = program.own
        loss = step.make_evaluate(spec, program.loss, diagnostics=("entropy", *program.kl))
        self.evaluate = program.mapped(
            lambda params, frozen, *rest: loss(frozen | params, *rest)[0],
            own=(True, "frozen" in own, "ref" in own, not program.same_data, True, True, True))
        probe = stage_setup.make_probe(spec)
        picked = ("logps", "ref_logps", "ref_policy_kl")

        def numbers(params, frozen, ref, batch):
            found = probe(frozen | params, ref, batch, {}, None, None)[1]
            return {name: found[name] for name in picked}

        self.probe_of = program.mapped(numbers, own=(True, "frozen" in own, "ref" in own, not program.same_data))
        self.probe = self._probe_batch() if self.ref is not None else None
        self.watched = [program.eval_batch(self.setups, number) for number in range(len(self.setups[0].cuts))]

    def _probe_batch(self) -> Any:
        """The probe's records, shared or one set for each member; None where the data has none."""
        if self.program.same_data:
            found = stage_setup.probe_batch(self.setups[0])
            return None if found is None else self.program.place(found, axis=None)
        found = [stage_setup.probe_batch(s) for s in self.setups]
        if any(f is None for f in found) or len({str(jax.tree.map(jnp.shape, f)) for f in found}) > 1:
            return found if any(f is not None for f in found) else None
        return self.program.place(arrays.stack(found))

    def run(self) -> list[Outcome]:
        """Trains to the end, or from the last checkpoint on; the outcomes of the real members."""
        population = jax.jit(self.program.initial, donate_argnums=0)(self.program.stacked(
            [s.params for s in self.setups]), self.hyper)
        population = self.program.place(population)
        spare = range(self.real, self.size)
        population = self.program.place(arrays.deactivate(population, spare)) if spare else population
        at, latest = 0, self.saved.latest()
        for note in self.saved.notes:
            self.console.print(f"{self.name}: {note}", markup=False, soft_wrap=True)
        if latest is not None:
            population, stored = self.saved.restore(latest, population)
            at = self._resume(stored)
        writers = [metrics.MetricWriter(s.ctx.workdir, s.name, resume_at=-1 if latest is None else at)
                   for s in self.setups[:self.real]]
        try:
            population = self._loop(population, at, writers)
        finally:
            for writer in writers:
                writer.close()
            self.saved.close()
        params = jax.device_get(population.state.params)
        count = len(self.program.compiled)
        return [Outcome(None if self.errors[i] else arrays.member(params, i), self.best[i], self.errors[i], count)
                for i in range(self.real)]

    def _resume(self, stored: Mapping[str, Any]) -> int:
        if stored["total"] != self.total or len(stored["plans"]) != self.real:
            raise ConfigError(f"{self.saved.folder}: the checkpoint belongs to a population of {len(stored['plans'])} "
                              f"members and {stored['total']} steps; now it has {self.real} and {self.total}")
        at = [s.plan.resume(plan) for s, plan in zip(self.setups[:self.real], stored["plans"], strict=True)][0]
        for i in range(self.real):
            self.best[i], self.errors[i] = stored["eval"][i], stored["errors"][i]
            self.windows[i] = metrics.Window(stored["windows"][i])
        self.console.print(f"resuming {self.name} at step {at} of {self.total} ({self.real} members)", markup=False)
        return at

    def _loop(self, population: arrays.Population, at: int, writers: Sequence[metrics.MetricWriter]):
        section, began, pending = self.section, time.monotonic(), None
        if at == 0:
            self._evaluate(population, 0, writers)
        number, first = at, at
        with metrics.progress(self.console) as bar:
            task = bar.add_task(f"{self.name} x {self.real}", total=self.total, completed=at, numbers="")
            while number < self.total:
                length = min(self.program.length, self.total - number, self._to_event(number))
                population, out = self._call(population, number, length)
                if pending is not None:
                    self._settle(*pending, writers, began, first)
                pending, number = (number, length, out), number + length
                bar.advance(task, length)
                stopping = self.stop.requested
                due = {name: number == self.total or number % section[f"{name}_every"] == 0
                       for name in ("eval", "checkpoint")}
                if stopping or any(due.values()):
                    self._settle(*pending, writers, began, first)
                    pending = None
                    if due["eval"]:
                        self._evaluate(population, number, writers)
                    if due["checkpoint"] or stopping:
                        self._save(number, population)
                if stopping and number < self.total:
                    raise context.Preempted(f"stopped at step {number} of {self.total} in {self.name}; run the same "
                                            "command again")
                if all(self.errors[:self.real]):
                    break
        spent = time.monotonic() - began
        self.console.print(f"{self.name}: {self.real} members, {number - first} steps, "
                           f"{self.real * (number - first) / max(spent, 1e-9):.1f} member steps/s", highlight=False)
        return population

    def _to_event(self, number: int) -> int:
        return min(every - number % every for every in (self.section["eval_every"], self.section["checkpoint_every"]))

    def _call(self, population, number: int, length: int):
        program = self.program
        batches = program.batches(self.setups, range(number, number + length))
        batches = program.place(batches, axis=1 if "batch" in program.own else None)
        keys = program.place(self.fold(np.arange(number + 1, number + length + 1, dtype=np.uint32)), axis=1)
        arguments = population, self.ref, batches, self.hyper, keys, self.frozen
        return program.steps(self.size, *arguments)(*arguments)

    def _settle(self, number: int, length: int, out: Any, writers, began: float, first: int) -> None:
        """Reads the metrics of `length` updates after update `number`, writes those that are due."""
        out = {name: tuple(np.asarray(part) for part in pair) for name, pair in jax.device_get(out).items()}
        for s in range(length):
            now = number + s + 1
            for i in range(self.real):
                if self.errors[i]:
                    continue
                values = {k: float(total[s, i]) / float(count[s, i])
                          for k, (total, count) in out.items() if count[s, i]}
                if not values.pop("finite"):
                    self._diverged(i, now, values)
                    continue
                self.windows[i].add(values)
                if now % self.section["log_every"] == 0 or now == self.total:
                    rate = (now - first) / max(time.monotonic() - began, 1e-9)
                    mean = self.windows[i].take()
                    writers[i].write(now, mean | {"steps_per_second": rate,
                                                  "tokens_per_second": rate * mean.get("tokens", 0.0)})

    def _diverged(self, index: int, now: int, values: Mapping[str, float]) -> None:
        setup = self.setups[index]
        ids = [setup.train[i].id for i in setup.plan.batch_indices(now - 1)[:self.section["records_in_log"]]]
        self.errors[index] = (f"{setup.name}: step {now} is not finite (loss {values['loss']}, gradient norm "
                              f"{values['grad_norm']}); records {ids}; its state is that of step {now - 1}")
        self.console.print(f"{setup.ctx.workdir.name}: {self.errors[index]}", markup=False, soft_wrap=True)

    def _evaluate(self, population, number: int, writers) -> None:
        program, state = self.program, population.state
        key = program.place(self.fold(np.asarray([_EVAL_KEY], np.uint32))[0])
        sums: dict[str, list[np.ndarray]] = {}
        for batch in self.watched:
            built = program.place(batch, axis=None if program.same_data else 0)
            found = self.evaluate(state.params, self.frozen, self.ref, built, self.hyper["loss"], key, state.loss_state)
            for name, pair in jax.device_get(found).items():
                held = sums.setdefault(name, [np.zeros(self.size), np.zeros(self.size)])
                for total, part in zip(held, pair, strict=True):
                    total += np.asarray(part, np.float64)
        probes = self._probe_now(state)
        for i in range(self.real):
            if self.errors[i]:
                continue
            self.best[i] = {name: float(total[i] / count[i]) for name, (total, count) in sums.items() if count[i]}
            writers[i].write(number, self.best[i], split=self.setups[i].eval_split)
            if probes is not None and probes[i] is not None:
                writers[i].write(number, stage_setup.probe_numbers(probes[i]), split="probe")

    def _probe_now(self, state: step.TrainState) -> list | None:
        if self.probe is None:
            return None
        if not isinstance(self.probe, list):
            found = jax.device_get(self.probe_of(state.params, self.frozen, self.ref, self.probe))
            return [arrays.member(found, i) for i in range(self.size)]
        pick = lambda tree, name, i: arrays.member(tree, i) if name in self.program.own else tree
        one = jax.jit(stage_setup.make_probe(self.program.spec(self.size)))
        return [None if batch is None else jax.device_get(one(
            pick(self.frozen, "frozen", i) | arrays.member(state.params, i), pick(self.ref, "ref", i), batch, {}, None,
            None)[1]) for i, batch in enumerate(self.probe[:self.real])]

    def _save(self, number: int, population) -> None:
        real = range(self.real)
        self.saved.save(number, population, {
            "plans": [self.setups[i].plan.state(number) for i in real], "total": self.total,
            "eval": [self.best[i] for i in real], "errors": [self.errors[i] for i in real],
            "windows": [self.windows[i].state() for i in real]})
