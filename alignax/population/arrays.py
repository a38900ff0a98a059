"""Many training runs as one program: an update mapped over a leading axis N of states, keys and hyper-parameters.

    run = make_steps(update)                                        # compiled once for N members and S steps
    population = start(states)                                      # states: every leaf [N, ...]
    population, metrics = run(population, ref, batches, hyper, keys)   # batches [S, ...], keys [S, N]; metrics [S, N]

A member that diverges is frozen at its last finite state and says at which update; the others go on. A member that
is not active costs its share of the arithmetic, but nothing of it changes; `take` leaves it out for good. Members
never exchange anything, so on several devices each holds its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignax.types import ConfigError

AXIS = "population"
OWN = ("ref", "batch", "frozen")


class Population(NamedTuple):
    """What the steps change. state: any tree, every leaf [N, ...]. active: bool [N], who is trained. diverged: int32
    [N], the update that was not finite, 0 where none was. updates: int32 [N], those that were done."""

    state: Any
    active: jax.Array
    diverged: jax.Array
    updates: jax.Array


def stack(trees: Sequence[Any]) -> Any:
    """One tree with leaves [N, ...] of N trees alike."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member(tree: Any, index: int) -> Any:
    """The tree of member `index`: every leaf [N, ...] -> [...]."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def start(state: Any, *, active: Any = None, mesh: Mesh | None = None) -> Population:
    """A population before its first update. state: every leaf [N, ...]. active: bool [N], all by default. mesh: cuts N
    over its devices (see `make_mesh`)."""
    count = jax.tree.leaves(state)[0].shape[0]
    # Two arrays: the steps are given both to reuse.
    fresh = lambda: jnp.zeros(count, jnp.int32)
    whole = jnp.ones(count, bool) if active is None else jnp.asarray(active, bool)
    out = Population(state, whole, fresh(), fresh())
    return out if mesh is None else place(out, mesh)


def take(population: Any, index: Sequence[int]) -> Any:
    """The members `index` of a population, or of any tree with leaves [N, ...]: halving, reordering, filling up."""
    index = np.asarray(index, np.int32)
    return jax.tree.map(lambda leaf: leaf[index], population)


def deactivate(population: Population, index: Sequence[int]) -> Population:
    """The members `index` are trained no further (early stopping); their states stay as they are."""
    mask = np.ones(population.active.shape, bool)
    mask[np.asarray(index, np.int32)] = False
    return population._replace(active=population.active & mask)


def make_update(update: Callable, *, own: Iterable[str] = ()) -> Callable:
    """`update(state, ref, batch, hyper, key, frozen) -> (state, metrics)` of one member, mapped over N of them.

    Returns step(population, ref, batch, hyper, key, frozen=None) -> (population, metrics [N, ...]). State, hyper and
    key have a leading axis N, and of OWN (`ref`, `batch`, `frozen`) those named in `own`; the others are shared. Any
    of them may be None. An update is finite when the entry `finite` of its metrics is not 0 (a (sum, count) pair or a
    scalar); where there is none, when every number of the new state is. Raises ConfigError for another name in `own`.
    """
    return _mapped(update, frozenset(own), guarded=True)


def _mapped(update: Callable, own: frozenset[str], *, guarded: bool) -> Callable:
    """make_update's step; unguarded, all states are new ones whatever became of them, and all members are counted."""
    if own - set(OWN):
        raise ConfigError(f"own={sorted(own)}; allowed: {', '.join(OWN)}")

    def one(population: Population, ref, batch, hyper, key, frozen):
        state, active, diverged, updates = population
        new, metrics = update(state, ref, batch, hyper, key, frozen)
        fine = _finite(new, metrics)
        keep = active & fine
        if not guarded:
            return Population(new, keep, diverged, updates + 1), metrics
        state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
        diverged = jnp.where(active & ~fine, updates + 1, diverged)
        return Population(state, keep, diverged, updates + keep), metrics

    axes = (0, *(0 if name in own else None for name in ("ref", "batch")), 0, 0, 0 if "frozen" in own else None)
    mapped = jax.vmap(one, axes)
    return lambda population, ref, batch, hyper, key, frozen=None: mapped(population, ref, batch, hyper, key, frozen)


def _where(mask: jax.Array, some: jax.Array, other: jax.Array) -> jax.Array:
    """jnp.where by a mask of the leading axis."""
    return jnp.where(mask.reshape(-1, *[1] * (some.ndim - 1)), some, other)


def _finite(state: Any, metrics: Any) -> jax.Array:
    if isinstance(metrics, dict) and "finite" in metrics:
        return jnp.asarray(jax.tree.leaves(metrics["finite"])[0]) != 0
    numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in numbers]).all()


def make_steps(update: Callable, *, own: Iterable[str] = (), length: int | None = None, mesh: Mesh | None = None,
               check_every: int = 1) -> Callable:
    """Several updates in one call, jitted: run(population, ref, batches, hyper, keys, frozen=None).

    `update` and `own`: as for `make_update`. Without `length`, batches have a leading axis S (then N where a member has
    its own) and keys are [S, N] (or None). With `length`, all S = length updates see the same batch, and keys [N] are
    folded with the number of the member's update, from 0. Returns (population, metrics [S, N, ...]); the population
    that is given is used up (its buffers are reused). mesh: N is cut over its devices and has to be a multiple of them
    (see `filled`); every device then runs its own members, and nothing travels.

    check_every: after how many updates it is seen to that what diverged stays where it was. Above 1 a stretch of so
    many runs through, and where an active member turned out not to be finite in it, the stretch is done again one by
    one: the same population comes out. Worth a quarter of the time for members of a few thousand parameters, whose old
    and new states cost what the arithmetic does; it holds a second state and compiles both loops. The metrics of
    members that are not active mean nothing then. Raises ConfigError below 1.
    """
    if check_every < 1:
        raise ConfigError(f"check_every={check_every}; allowed: 1 or more updates")
    own = frozenset(own)
    careful, quick = (_mapped(update, own, guarded=guarded) for guarded in (True, False))

    def run(population, ref, batches, hyper, keys, frozen):
        def body(step):
            def one(carry, item):
                if length is None:
                    batch, key = item
                else:
                    batch, key = batches, None if keys is None else jax.vmap(jax.random.fold_in)(keys, carry.updates)
                return step(carry, ref, batch, hyper, key, frozen)
            return one

        def stretch(before, items):
            after, metrics = jax.lax.scan(body(quick), before, items, length=check_every)
            kept = lambda: (before._replace(
                state=jax.tree.map(functools.partial(_where, before.active), after.state, before.state),
                updates=jnp.where(before.active, after.updates, before.updates)), metrics)
            return jax.lax.cond((after.active == before.active).all(), kept,
                                lambda: jax.lax.scan(body(careful), before, items, length=check_every))

        items = (batches, keys) if length is None else None
        count = len(jax.tree.leaves(items)[0]) if length is None else length
        whole = count // check_every if check_every > 1 else 0
        done, found = whole * check_every, []
        if whole:
            some = jax.tree.map(lambda a: a[:done].reshape(whole, check_every, *a.shape[1:]), items)
            population, metrics = jax.lax.scan(stretch, population, some, length=whole)
            found.append(jax.tree.map(lambda a: a.reshape(done, *a.shape[2:]), metrics))
        if done < count:
            some = jax.tree.map(lambda a: a[done:], items)
            population, metrics = jax.lax.scan(body(careful), population, some, length=count - done)
            found.append(metrics)
        return population, jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *found)

    if mesh is not None:
        lead, whole = PartitionSpec(AXIS), PartitionSpec()
        later = PartitionSpec(None, AXIS)
        cut = lambda name, spec: spec if name in own else whole
        per_step = lead if length is not None else later
        specs = (lead, cut("ref", lead), cut("batch", per_step), lead, per_step, cut("frozen", lead))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(lead, later), check_vma=False)
    jitted = jax.jit(lambda population, ref, batches, hyper, keys, frozen: run(population, ref, batches, hyper, keys,
                                                                               frozen), donate_argnums=0)

    def call(population, ref, batches, hyper, keys, frozen=None):
        return jitted(population, ref, batches, hyper, keys, frozen)

    call.lower = lambda population, ref, batches, hyper, keys, frozen=None: jitted.lower(population, ref, batches,
                                                                                         hyper, keys, frozen)
    return call


def device_per_core() -> int:
    """Lets JAX see one CPU device for each core that this process may use, over which `make_mesh` then divides the
    members; returns how many. An accelerator's devices are not touched.

    Has to be called before JAX is first used; RuntimeError (of JAX) afterwards.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)
    return cores


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """A mesh of one axis, `population`, over the devices (all by default); None where there is only one."""
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None


def filled(count: int, mesh: Mesh | None) -> np.ndarray:
    """Indices into `count` members, the last one repeated up to a multiple of the mesh's devices."""
    ways = 1 if mesh is None else mesh.size
    return np.minimum(np.arange(-(-count // ways) * ways), count - 1)


def place(tree: Any, mesh: Mesh | None, *, axis: int | None = 0) -> Any:
    """Puts a tree on the mesh, its axis number `axis` cut over the members' devices (None: whole on each)."""
    if mesh is None:
        return jax.device_put(tree)
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
    return jax.device_put(tree, NamedSharding(mesh, spec))


def abstract(tree: Any, mesh: Mesh | None, *, axis: int | None = 0) -> Any:
    """Shapes and dtypes of a tree (arrays, or shapes themselves), on the devices where `place` would put them."""
    def one(leaf):
        if mesh is None:
            return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def mapped(function: Callable, own: Sequence[bool], mesh: Mesh | None) -> Callable:
    """`function` over N members, jitted; own: for each argument, whether every member has its own, with leaves
    [N, ...]. Results are [N, ...]; mesh: N is cut over its devices."""
    run = jax.vmap(function, [0 if mine else None for mine in own])
    if mesh is not None:
        lead, whole = PartitionSpec(AXIS), PartitionSpec()
        run = jax.shard_map(run, mesh=mesh, in_specs=tuple(lead if mine else whole for mine in own), out_specs=lead,
                            check_vma=False)
    return jax.jit(run)
