"""The compiled program of a train stage of N members: what they share, what each has of its own, and how many fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import data, optim, step
from alignax.population import arrays, fit
from alignax.stage_setup import Setup
from alignax.types import Batch, ConfigError


class Program:
    """The compiled functions of a structure, and how members' trees become its arguments.

    own: which of arrays.OWN every member has for itself; the others are held once. same_data: whether all members
    train and are evaluated on the same records. varying: the optimiser's numbers that differ, which are traced; the
    others stay Python numbers, as they are in a run alone. length: the updates of one call.
    """

    def __init__(self, setups: Sequence[Setup], mesh: Mesh | None, steps_per_call: int):
        self.setups, self.mesh, first = setups, mesh, setups[0]
        self.section, self.total, self.loss = first.section, first.total, first.loss
        alike = lambda read: all(read(s) is read(first) for s in setups)
        seeds = len({s.ctx.seed for s in setups})
        base = alike(lambda s: s.start)
        heads = any(name.endswith("_head") for name in first.params)
        own = set()
        if not base:
            own.add("frozen")
        if first.has_reference and not (base and (first.adapters is not None or not heads or seeds == 1)):
            own.add("ref")
        self.same_data = alike(lambda s: s.train) and alike(lambda s: s.held_out) and alike(lambda s: s.cached)
        if not (self.same_data and seeds == 1):
            own.add("batch")
        self.own = own
        values = [optim.numbers(s.section["optim"]) for s in setups]
        self.varying = [name for name in values[0] if len({v[name] for v in values}) > 1]
        self.laid = _joint(setups)
        every = math.gcd(self.section["eval_every"], self.section["checkpoint_every"])
        self.length = max(d for d in range(1, max(min(steps_per_call, every, self.total), 1) + 1) if every % d == 0)
        self.compiled: dict[Any, Any] = {}
        self.kl = ("ref_policy_kl",) if first.has_reference else ()

    def spec(self, size: int) -> step.ModelSpec:
        """The forward pass's settings; all members on a device share the budget of its logits."""
        spec = self.setups[0].spec
        here = size // (1 if self.mesh is None else self.mesh.size)
        return dataclasses.replace(spec, byte_budget=max(spec.byte_budget // here, 1_000_000))

    def optimizer(self, traced: Mapping[str, Any]):
        """The stage's optimiser with a member's own numbers."""
        return optim.from_section(self.section["optim"], self.total, traced)

    def hyper(self, setups: Sequence[Setup]) -> dict[str, Any]:
        """Loss and optimiser numbers, [N] each."""
        hyper = [s.hyper for s in setups]
        values = [optim.numbers(s.section["optim"]) for s in setups]
        return {"loss": {k: np.stack([h[k] for h in hyper]) for k in hyper[0]},
                "optim": optim.traced({name: [v[name] for v in values] for name in self.varying})}

    def initial(self, params: Any, hyper: Any) -> arrays.Population:
        """The population before its first update; params: leaves [N, ...]."""
        opt_state = jax.vmap(lambda p, h: self.optimizer(h).init(p))(params, hyper["optim"])
        count = jax.tree.leaves(params)[0].shape[0]
        spread = lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (count, *np.shape(leaf)))
        state = step.TrainState(jnp.zeros(count, jnp.int32), params, opt_state,
                                jax.tree.map(spread, self.loss.init_state()))
        return arrays.start(state)

    def steps(self, size: int, *arguments) -> Any:
        """The compiled steps for arguments of these shapes (abstract or not)."""
        mark = size, str(jax.tree.map(jnp.shape, arguments)), jax.tree.structure(arguments)
        if mark not in self.compiled:
            done = sum(known[0] == size for known in self.compiled)  # other sizes are other rounds and rungs
            if done >= (budget := self.section["compile_budget"]):
                raise ConfigError(f"the steps of a population of {size} were compiled {done} times, "
                                  f"compile_budget={budget}; use shapes='global', a larger bucket_multiple or a larger "
                                  "compile_budget")
            spec = self.spec(size)

            def update(state, ref, batch, hyper, key, frozen):
                one = step.make_update(spec, self.loss, self.optimizer(hyper["optim"]),
                                       accumulation=self.section["accumulation"])
                return one(state, ref, batch, hyper["loss"], key, frozen)

            run = arrays.make_steps(update, own=self.own, mesh=self.mesh)
            self.compiled[mark] = run.lower(*arguments).compile()
        return self.compiled[mark]

    def sized(self, count: int, memory_limit: int | None) -> int:
        """How many of `count` members are trained at once; the program is compiled for them."""
        ways = 1 if self.mesh is None else self.mesh.size

        def compile_for(size: int):
            some = [self.setups[i] for i in np.minimum(np.arange(size), len(self.setups) - 1)]
            hyper = self.hyper(some)
            pop = jax.eval_shape(self.initial, jax.eval_shape(lambda: arrays.stack([s.params for s in some])), hyper)
            batches = self.batches(some, range(self.length))
            shape = lambda tree, **cut: arrays.abstract(tree, self.mesh, **cut)
            keys = jax.eval_shape(lambda: jax.vmap(lambda n: jax.vmap(jax.random.key)(n))(
                jnp.zeros((self.length, size), jnp.uint32)))
            return self.steps(size, shape(pop), self.common(some, "ref", shape),
                              shape(batches, axis=1 if "batch" in self.own else None), shape(hyper),
                              shape(keys, axis=1), self.common(some, "frozen", shape))

        return fit.largest(count, compile_for, limit=memory_limit, ways=ways)[0]

    def common(self, setups: Sequence[Setup], name: str, put) -> Any:
        """The reference (`ref`) or the frozen parameters (`frozen`), stacked where each member has its own, through
        `put`."""
        trees = [(s.frozen or s.params) if name == "ref" else s.frozen for s in setups]
        if name == "ref" and not setups[0].has_reference:
            return None
        if name in self.own:
            return put(arrays.stack(trees))
        return put(trees[0], axis=None)

    def stacked(self, trees: Sequence[Any]) -> Any:
        """Leaves [N, ...] on the devices; over several they go from the host, so that none has to hold all of them."""
        if self.mesh is None:
            return arrays.stack(trees)
        return self.place(jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(list(trees))))

    def place(self, tree: Any, *, axis: int | None = 0) -> Any:
        """On the devices, cut along the members' axis."""
        return arrays.place(tree, self.mesh, axis=axis)

    def batches(self, setups: Sequence[Setup], numbers: Sequence[int]) -> Batch:
        """The batches of updates `numbers` (from 0): leaves [S, ...], or [S, N, ...] where members have their own."""
        return _stacked([[s.rows(s.plan.batch_indices(n)) for s in self._distinct(setups)] for n in numbers],
                        self.laid, self._places(setups))

    def eval_batch(self, setups: Sequence[Setup], number: int) -> Batch:
        """Batch `number` of the evaluation: leaves [...], or [N, ...] where members have their own data."""
        some = setups[:1] if self.same_data else setups
        built = _stacked([[s.rows(s.eval_rows()[number]) for s in some]], self.laid,
                         None if self.same_data else np.arange(len(setups)))
        return jax.tree.map(lambda leaf: leaf[0], built)

    def _distinct(self, setups: Sequence[Setup]) -> list[Setup]:
        """One member for each order of each data."""
        return list({_order(s): s for s in setups}.values())

    def _places(self, setups: Sequence[Setup]) -> np.ndarray | None:
        if "batch" not in self.own:
            return None
        known = {mark: i for i, mark in enumerate(dict.fromkeys(map(_order, setups)))}
        return np.asarray([known[_order(s)] for s in setups])

    def mapped(self, function, *, own: Sequence[bool]):
        """`function` over the members, jitted; own: for each argument, whether every member has its own."""
        return arrays.mapped(function, own, self.mesh)


def _order(setup: Setup) -> tuple:
    return id(setup.train), id(setup.cached), setup.plan.seed


def _largest(shapes: Sequence[data.Shape]) -> data.Shape:
    return data.Shape(*map(max, zip(*shapes, strict=True)))


def _joint(setups: Sequence[Setup]):
    """The layout that holds every member's batches."""
    laid = [s.laid for s in setups]
    shape = None if laid[0].shape is None else _largest([one.shape for one in laid])
    others = {name: _largest([one.other_shapes[name] for one in laid]) for name in laid[0].other_shapes}
    return dataclasses.replace(laid[0], shape=shape, other_shapes=others, width=max(one.width for one in laid))


def _stacked(rows: Sequence[Sequence[tuple]], laid, places: np.ndarray | None) -> Batch:
    """rows: [S][members' (records, extra, others)] -> one batch with leaves [S, ...] or, with `places` (which of the
    members each of N takes its data from), [S, N, ...]."""
    found = [laid.sizes(records, others) for several in rows for records, _, others in several]
    sizes = _largest([shape for shape, _ in found]), {name: _largest([own[name] for _, own in found])
                                                      for name in found[0][1]}
    filled = [[laid.fill(*one, sizes) for one in several] for several in rows]
    flat = [batch for several in filled for batch in several]
    if len({jax.tree.structure(batch) for batch in flat}) > 1:
        raise ConfigError("the batches hold different columns ("
                          + "; ".join(sorted({", ".join(sorted(b.data)) for b in flat}))
                          + "), so that they cannot be trained on in one program; give every record the same ones")
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *flat)
    shaped = lambda leaf: leaf.reshape((len(rows), -1, *leaf.shape[1:]))
    return jax.tree.map(lambda leaf: shaped(leaf)[:, 0] if places is None else shaped(leaf)[:, places], stacked)
