"""The loop of one round: members of one program that are trained at the same time, with a leading axis N."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from alignax import checkpoint, context, metrics, stage_setup, step
from alignax.population import arrays, rules
from alignax.population.program import Program
from alignax.stage_setup import Setup
from alignax.types import ConfigError

_EVAL_KEY = 2**31  # the number that `train` folds into the key of an evaluation


@dataclasses.dataclass
class Lane:
    """A member on its way through a stage, also between two rungs.

    state: its arrays.Population, NumPy, between two rungs; parameters: what it has trained, once it trains no more.
    evaluated: its last evaluation. error: why it diverged, or "". stopped: the update after which it was stopped early,
    0 where it was not, and watched: what EarlyStop.watch remembers. dropped: the record of the rung that dropped it.
    left: it diverged before the last rung. window: the sums of metrics that are not written yet.
    """

    setup: Setup
    state: Any = None
    parameters: Any = None
    evaluated: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""
    stopped: int = 0
    watched: tuple[float, int] | None = None
    dropped: Mapping[str, Any] | None = None
    left: bool = False
    window: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        """Whether there is something left to train."""
        return not (self.error or self.stopped or self.dropped)


class Round:
    """The loop over the updates from `begin` to `end` of `lanes`, which are left as they are given.

    size: how many members the program has; what `lanes` do not fill are copies of the last one that nobody trains.
    folder: for the round's checkpoints. early_stop: whom to stop before the end; halving: only its metric is checked.
    """

    def __init__(self, program: Program, lanes: Sequence[Lane], size: int, folder: pathlib.Path, *, begin: int,
                 end: int, console: Console, stop: context.Stop, early_stop: rules.EarlyStop | None,
                 halving: rules.Halving | None):
        self.program, self.console, self.stop = program, console, stop
        self.early_stop, self.halving = early_stop, halving
        self.lanes = [dataclasses.replace(lane) for lane in lanes]
        self.real, self.size, self.begin, self.end = len(lanes), size, begin, end
        self.setups = setups = [lane.setup for lane in lanes] + [lanes[-1].setup] * (size - len(lanes))
        self.section, self.total, self.name = program.section, program.total, setups[0].name
        self.hyper = program.place(program.hyper(setups))
        self.ref = program.common(setups, "ref", program.place)
        self.frozen = program.common(setups, "frozen", program.place)
        seeds = jnp.stack([jax.random.key(s.ctx.seed) for s in setups])
        self.fold = jax.jit(lambda n: jax.vmap(lambda one: jax.vmap(jax.random.fold_in, (0, None))(seeds, one))(n))
        self.saved = checkpoint.Checkpoints(folder / "checkpoints")
        self.windows = [metrics.Window(lane.window) for lane in lanes]
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

    def run(self) -> list[Lane]:
        """Trains to the end, or from the last checkpoint on; the members as they are then."""
        population = self._first()
        if self.size > self.real:
            population = self.program.place(arrays.deactivate(population, range(self.real, self.size)))
        at, latest = self.begin, self.saved.latest()
        for note in self.saved.notes:
            self.console.print(f"{self.name}: {note}", markup=False, soft_wrap=True)
        if latest is not None:
            population, stored = self.saved.restore(latest, population)
            at = self._resume(stored)
        try:
            if at < self.end:  # else the rows of later rounds stand behind these
                population = self._written(population, at, latest is None)
        finally:
            self.saved.close()
        return self._done(population)

    def _first(self) -> arrays.Population:
        """The population at `begin`."""
        if self.lanes[0].state is None:
            made = jax.jit(self.program.initial, donate_argnums=0)(self.program.stacked(
                [s.params for s in self.setups]), self.hyper)
            return self.program.place(made)
        held = [lane.state for lane in self.lanes]
        held += [held[-1]] * (self.size - self.real)
        return self.program.place(jax.tree.map(lambda *leaves: np.stack(leaves), *held))

    def _written(self, population: arrays.Population, at: int, fresh: bool) -> arrays.Population:
        """The loop, with a writer of metrics for each member."""
        resume_at = -1 if fresh and at == 0 else at
        writers = [metrics.MetricWriter(s.ctx.workdir, s.name, resume_at=resume_at) for s in self.setups[:self.real]]
        try:
            return self._loop(population, at, writers)
        finally:
            for writer in writers:
                writer.close()

    def _done(self, population: arrays.Population) -> list[Lane]:
        """What the members take along: all of their state to the next rung, at the stage's end the parameters."""
        last = self.end == self.total
        held = jax.device_get(population.state.params if last else population)
        for i, lane in enumerate(self.lanes):
            mine = arrays.member(held, i)
            over = last or bool(lane.stopped)
            lane.parameters = (mine if last else mine.state.params) if over and not lane.error else None
            lane.state = None if over or lane.error else mine
            lane.window = self.windows[i].state()
        return self.lanes

    def _resume(self, stored: Mapping[str, Any]) -> int:
        if stored["total"] != self.total or len(stored["plans"]) != self.real:
            raise ConfigError(f"{self.saved.folder}: the checkpoint belongs to a population of {len(stored['plans'])} "
                              f"members and {stored['total']} steps; now it has {self.real} and {self.total}")
        at = [s.plan.resume(plan) for s, plan in zip(self.setups[:self.real], stored["plans"], strict=True)][0]
        for i, lane in enumerate(self.lanes):
            lane.evaluated, lane.error = stored["eval"][i], stored["errors"][i]
            lane.stopped = stored["stopped"][i]
            lane.watched = tuple(stored["watched"][i]) if stored["watched"][i] else None
            self.windows[i] = metrics.Window(stored["windows"][i])
        self.console.print(f"resuming {self.name} at step {at} of {self.total} ({self.real} members)", markup=False)
        return at

    def _loop(self, population: arrays.Population, at: int, writers: Sequence[metrics.MetricWriter]):
        section, began, pending = self.section, time.monotonic(), None
        if at == 0:
            population = self._evaluate(population, 0, writers)
        number, first = at, at
        with metrics.progress(self.console) as bar:
            task = bar.add_task(f"{self.name} x {self.real}", total=self.end, completed=at, numbers="")
            while number < self.end:
                length = min(self.program.length, self.end - number, self._to_event(number))
                population, out = self._call(population, number, length)
                if pending is not None:
                    self._settle(*pending, writers, began, first)
                pending, number = (number, length, out), number + length
                bar.advance(task, length)
                stopping = self.stop.requested
                due = {name: number == self.end or number % section[f"{name}_every"] == 0
                       for name in ("eval", "checkpoint")}
                if stopping or any(due.values()):
                    self._settle(*pending, writers, began, first)
                    pending = None
                    if due["eval"]:
                        population = self._evaluate(population, number, writers)
                    if due["checkpoint"] or stopping:
                        self._save(number, population)
                if stopping and number < self.total:
                    raise context.Preempted(f"stopped at step {number} of {self.total} in {self.name}; run the same "
                                            "command again")
                if not any(lane.goes_on for lane in self.lanes):
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
            for i, lane in enumerate(self.lanes):
                if not lane.goes_on:
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
        error = (f"{setup.name}: step {now} is not finite (loss {values['loss']}, gradient norm "
                 f"{values['grad_norm']}); records {ids}; its state is that of step {now - 1}")
        self.lanes[index].error = error
        self.console.print(f"{setup.ctx.workdir.name}: {error}", markup=False, soft_wrap=True)

    def _evaluate(self, population, number: int, writers) -> arrays.Population:
        """Evaluates those that are trained, writes it, and stops whom the rule stops."""
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
        ended = []
        for i, lane in enumerate(self.lanes):
            if not lane.goes_on:
                continue
            lane.evaluated = {name: float(total[i] / count[i]) for name, (total, count) in sums.items() if count[i]}
            writers[i].write(number, lane.evaluated, split=self.setups[i].eval_split)
            if self.halving is not None:  # a metric that is missing should not come out at the first rung only
                rules.value_of(self.halving, lane.evaluated)
            if self._is_over(lane, number):
                ended.append(i)
            if probes is not None and probes[i] is not None:
                writers[i].write(number, stage_setup.probe_numbers(probes[i]), split="probe")
        return program.place(arrays.deactivate(population, ended)) if ended else population

    def _is_over(self, lane: Lane, number: int) -> bool:
        """Whether the rule stops this member, after the evaluation at update `number`."""
        rule = self.early_stop
        if rule is None:
            return False
        lane.watched = rule.watch(lane.watched, rules.value_of(rule, lane.evaluated))
        if lane.watched[1] < rule.patience or number >= self.total:
            return False
        lane.stopped = number
        self.console.print(f"{lane.setup.ctx.workdir.name}: {self.name} stopped at update {number}: {rule.metric} is "
                           f"no better than {lane.watched[0]:.6g} since {lane.watched[1]} evaluations", markup=False,
                           highlight=False, soft_wrap=True)
        return True

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
            "eval": [lane.evaluated for lane in self.lanes], "errors": [lane.error for lane in self.lanes],
            "stopped": [lane.stopped for lane in self.lanes], "watched": [lane.watched for lane in self.lanes],
            "windows": [self.windows[i].state() for i in real]})
