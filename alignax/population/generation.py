"""Sample and evaluate stages of several members as one program: what they draw and score, mapped over a leading axis N.

Only the devices' part is mapped. Prompts, texts, rewards and files are each member's own, by the functions that a run
alone goes through. The keys of a draw are those of the run alone; logits differ by the rounding of batched products, so
that a completion differs where a draw lies within that rounding of two tokens, which is rare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from alignax import context, evaluate, memory, rollout, sample, sources
from alignax.population import arrays, fit
from alignax.types import ConfigError

MODES = ("auto", "together", "apart")


def check_mode(mode: str) -> None:
    """Raises ConfigError for a mode that is none of MODES."""
    if mode not in MODES:
        raise ConfigError(f"generation={mode!r}; allowed: {', '.join(MODES)}")


def is_together(mode: str, platform: str) -> bool:
    """Whether stages that draw run as one program. auto: where devices are no CPUs, whose cores members keep busy one
    by one (docs/sweeps.md has times)."""
    return mode == "together" or mode == "auto" and platform != "cpu"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sample or evaluate stage of a member. kind: one of them; section: its settings (train.settled); jobs: what it
    draws, of an evaluation the baseline first."""

    ctx: context.Context
    name: str
    kind: str
    section: Mapping[str, Any]
    jobs: Sequence[sample.Job]

    def finish(self, found: Sequence[evaluate.Drawn]) -> dict[str, Any]:
        """Scores and writes what the jobs came to; the stage's result."""
        if self.kind == "sample":
            return sample.tell(self.ctx, self.name, self.jobs[0], found[0].out, found[0].texts, **self.section)
        return evaluate.tell(self.ctx, self.jobs, found, **self.section)


def opened(ctx: context.Context, name: str, kind: str, section: Mapping[str, Any]) -> Stage:
    """The stage, with its prompts read. Raises ConfigError or DataError as the stage would alone."""
    jobs = [sample.ask(ctx, name, **section)] if kind == "sample" else evaluate.ask(ctx, name, **section)
    return Stage(ctx, name, kind, section, jobs)


def key_of(stage: Stage) -> tuple | None:
    """What has to be equal for stages to share a program: model, end tokens, settings of the draws, sizes of the
    prompts. None for a stage that has to run alone: its rows are refilled."""
    ctx = stage.ctx
    if any(job.settings.get("lanes") for job in stage.jobs):
        return None
    width = lambda job: sources.columns(ctx.spec.config, [ids for _, ids in job.prompts],
                                        job.settings["max_new_tokens"])
    return (stage.kind, ctx.spec, str(ctx.initial["model"]["embedding"].dtype), tuple(sorted(ctx.text.eos_ids)),
            ctx.text.pad_id, tuple((tuple(sorted(job.settings.items())), len(job.prompts), width(job))
                                   for job in stage.jobs))


def answers(stages: Sequence[Stage], *, mesh: Mesh | None, memory_limit: int | None, known: dict[Any, evaluate.Drawn],
            console: Console) -> Iterator[list[tuple[Stage, list[evaluate.Drawn]]]]:
    """Of stages of one `key_of`, (stage, what each of its jobs came to), in rounds that fit into memory; a round that
    runs out of it all the same begins again with half as many.

    known: the baselines' completions by evaluate.mark_of, which are drawn once; filled up. mesh: devices that the
    members are divided over. memory_limit: bytes on a device, by default a share of what is free.
    Raises ConfigError where one member on each device takes more, context.Preempted between two batches.
    """
    work, name = _Work(stages, mesh, known), stages[0].name
    size, done = fit.largest(len(stages), work.compile_for, limit=memory_limit, ways=work.ways)[0], 0
    if size < len(stages):
        console.print(f"{name}: {len(stages)} members in {-(-len(stages) // size)} rounds of {size}, which fit into "
                      "memory", markup=False, highlight=False)
    while done < len(stages):
        some = stages[done:done + size]
        try:
            found = work.round(some, size)
        except Exception as error:
            if not memory.exhausted(error) or size <= work.ways:
                raise
            size = max(size // 2 // work.ways * work.ways, work.ways)
            console.print(f"{name}: out of memory; those that are not done begin again with {size} members at a time",
                          markup=False, highlight=False)
            continue
        yield list(zip(some, found, strict=True))
        done += len(some)


class _Work:
    """The compiled programs of a group. own_*: whether every member has its own parameters, baseline, prompts; what all
    have in common is held once."""

    def __init__(self, stages: Sequence[Stage], mesh: Mesh | None, known: dict[Any, evaluate.Drawn]):
        self.stages, self.mesh, self.known, self.first = stages, mesh, known, stages[0]
        self.ways = 1 if mesh is None else mesh.size
        self.scores = self.first.kind == "evaluate"
        apart = lambda read: len({read(stage) for stage in stages}) > 1
        self.own_prompts = apart(lambda s: tuple((name, ids.tobytes()) for name, ids in s.jobs[0].prompts))
        self.own_params = [apart(lambda s, n=n: evaluate.place_of(s.ctx, s.jobs[n].policy))
                           for n in range(len(self.first.jobs))]
        self._compiled: dict[Any, Any] = {}

    def round(self, some: Sequence[Stage], size: int) -> list[list[evaluate.Drawn]]:
        """What every job of each stage came to."""
        out: list[list[evaluate.Drawn]] = [[] for _ in some]
        for number in range(len(self.first.jobs)):
            # Members that share the baseline, its prompts and the seed share its completions.
            marks = [evaluate.mark_of(s.ctx, s.jobs[0], s.section) if self.scores and not number else i
                     for i, s in enumerate(some)]
            todo = {mark: s for mark, s in zip(marks, some, strict=True) if mark not in self.known}
            fresh = dict(zip(todo, self._answers(list(todo.values()), number, size), strict=True)) if todo else {}
            if self.scores and not number:
                self.known |= fresh
            for held, mark in zip(out, marks, strict=True):
                held.append(fresh[mark] if mark in fresh else self.known[mark])
        return out

    def _answers(self, some: Sequence[Stage], number: int, size: int) -> list[evaluate.Drawn]:
        """Draws job `number` of each stage, and scores it where the stage evaluates."""
        if self.scores and len(some) == 1 and not number:
            stage = some[0]
            return [evaluate.answer(stage.ctx, stage.jobs[0], stage.section)]
        if len(some) <= size // 2:
            size = -(-len(some) // self.ways) * self.ways
        stages = [*some, *[some[-1]] * (size - len(some))]
        params = self._params(stages, number)
        rolled = self._draw(stages, number, params)[:len(some)]
        texts = [sample.decoded(s.ctx, s.jobs[number].prompts, out) for s, out in zip(some, rolled, strict=True)]
        sums = self._score(stages, number, params, rolled) if self.scores else [(None, None)] * len(some)
        return [evaluate.Drawn(*one, *both) for *one, both in zip(rolled, texts, sums, strict=True)]

    def _params(self, stages: Sequence[Stage], number: int) -> Any:
        """The parameters of the stages' policies: leaves [N, ...], or [...] where all have the same."""
        load = lambda s: jax.device_get(context.stage_params(s.ctx.workdir, s.jobs[number].policy, s.ctx.initial))
        if not self.own_params[number]:
            return self._place(load(stages[0]), False)
        known: dict[int, Any] = {id(s): load(s) for s in {id(s): s for s in stages}.values()}
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *(known[id(s)] for s in stages)), True)

    def _draw(self, stages: Sequence[Stage], number: int, params: Any) -> list[sources.Rollouts]:
        keys = self._place(jnp.stack([sample.key_of(s.ctx, s.jobs[number].salt) for s in stages]), True)
        run, parts = self._drawer(len(stages), number), [[] for _ in stages]
        label = self.first.jobs[number].label
        for batch in zip(*(self._prompts(s) for s in (stages if self.own_prompts else stages[:1])), strict=True):
            grids = self._place([np.stack(x) if self.own_prompts else x[0] for x in list(zip(*batch, strict=True))[:3]],
                                self.own_prompts)
            found, real = jax.device_get(run(params, *grids, keys)), batch[0][-1]
            for i, held in enumerate(parts):
                held.append(jax.tree.map(lambda a, i=i, real=real: a[i, :real], found))
            sample.stop_here(self.first.ctx, label)
        return [sources.joined(held) for held in parts]

    def _prompts(self, stage: Stage) -> Iterator[tuple]:
        job = stage.jobs[0]
        ids = [ids for _, ids in job.prompts]
        width = sources.columns(stage.ctx.spec.config, ids, job.settings["max_new_tokens"])
        return sources.batches(ids, sample.numbers_of(job.prompts), width=width, pad_id=stage.ctx.text.pad_id,
                               size=min(job.settings["batch_size"], len(ids)))

    def _score(self, stages: Sequence[Stage], number: int, params: Any, rolled: Sequence[sources.Rollouts]
               ) -> list[np.ndarray]:
        """Of each stage float32 [2,n], the sums of log-probs under policy and baseline."""
        base = params if number == 0 else self._params(stages, 0)
        run, shape, out = self._scorer(len(stages), number), self._score_shape(), []
        drawn = [*rolled, *[rolled[-1]] * (len(stages) - len(rolled))]
        each = [evaluate.score_batches(s.ctx, evaluate.records_of(s.ctx, s.jobs[number].prompts,
                                                                  [row[0] for row in one.tokens]), shape,
                                       s.section["batch_size"]) for s, one in zip(stages, drawn, strict=True)]
        for batch in zip(*each, strict=True):
            stacked = self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *batch), True)
            out.append(jax.device_get(run(params, base, stacked)))
        whole = np.concatenate(out, axis=2)[:, :, :len(self.first.jobs[number].prompts)]
        return list(whole[:len(rolled)])

    # Programs

    def compile_for(self, size: int) -> Any:
        """The compiled program of `size` members that takes the most memory."""
        numbers = range(len(self.first.jobs))
        return max((make(size, n) for n in numbers for make in
                    ((self._drawer, self._scorer) if self.scores else (self._drawer,))), key=fit.needed)

    def _drawer(self, size: int, number: int) -> Any:
        """(params, prompts, their mask, record numbers, keys [N]) -> rollout.Samples, leaves [N, ...]."""
        ctx, job, own = self.first.ctx, self.first.jobs[number], self.own_prompts
        settings = {k: v for k, v in job.settings.items() if k not in ("batch_size", "lanes")}

        def draw(params, grid, mask, ids, key):
            return rollout.generate(ctx.spec.config, params["model"], grid, mask, ids, key, pad_id=ctx.text.pad_id,
                                    eos_ids=tuple(sorted(ctx.text.eos_ids)), **settings)

        owns = (self.own_params[number], own, own, own, True)
        grids = self._stack_shape(next(self._prompts(self.first))[:3], size, own)
        keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(size, jnp.uint32)))
        return self._program("draw", size, draw, owns, lambda: (self._shape_of(size, owns[0]), *grids, keys))

    def _scorer(self, size: int, number: int) -> Any:
        """(params, baseline, batch) -> float32 [N,2,B], the sums of log-probs under policy and baseline."""
        ctx, shape = self.first.ctx, self._score_shape()
        budget = max(ctx.spec.byte_budget // (size // self.ways), 1_000_000)
        score = evaluate.make_score(dataclasses.replace(ctx.spec, byte_budget=budget))

        def sums(params, base, batch):
            found = score(params, base, batch, {}, None, None)[1]
            return jnp.stack([found["logps"][:, 0], found["ref_logps"][:, 0]])

        def arguments():
            prompts = self.first.jobs[number].prompts
            records = evaluate.records_of(ctx, prompts, [np.asarray(sorted(ctx.text.eos_ids)[:1])] * len(prompts))
            batch = next(evaluate.score_batches(ctx, records, shape, self.first.section["batch_size"]))
            return self._shape_of(size, owns[0]), self._shape_of(size, owns[1]), self._stack_shape(batch, size, True)

        owns = (self.own_params[number], self.own_params[0], True)
        return self._program("score", size, sums, owns, arguments)

    def _program(self, what: str, size: int, function, owns: tuple[bool, ...], arguments) -> Any:
        mark = what, size, owns
        if mark not in self._compiled:
            shapes = [arrays.abstract(tree, self.mesh, axis=0 if own else None)
                      for tree, own in zip(arguments(), owns, strict=True)]
            self._compiled[mark] = arrays.mapped(function, owns, self.mesh).lower(*shapes).compile()
        return self._compiled[mark]

    def _score_shape(self) -> tuple[int, int]:
        """Columns and slots that hold every completion there can be, so that all members and rounds have one shape."""
        job, longest = self.first.jobs[0], max(len(ids) for s in self.stages for _, ids in s.jobs[0].prompts)
        new, up = job.settings["max_new_tokens"], lambda n: -(-n // 8) * 8
        return up(longest + new), up(new)

    def _shape_of(self, size: int, own: bool) -> Any:
        return self._stack_shape({"model": self.first.ctx.initial["model"]}, size, own)

    def _stack_shape(self, tree: Any, size: int, own: bool) -> Any:
        lead = (size,) if own else ()
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, *np.shape(a)), a.dtype), tree)

    def _place(self, tree: Any, own: bool) -> Any:
        return arrays.place(tree, self.mesh, axis=0 if own else None)
