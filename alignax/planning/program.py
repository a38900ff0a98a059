"""The update of a train stage on devices that need not exist: traced, lowered, and where possible compiled.

Parameters are shapes only. Up to MOST_DEVICES devices are simulated by the CPU backend, whose partitioner is the one
that every backend uses, and the compiled program tells memory and collectives. Beyond, the update is traced and
lowered for an abstract mesh: bytes of the arguments and FLOPs are then exact, temporaries and collectives unknown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from alignax import data, models, sharding, step
from alignax.data.layouts.shapes import packs
from alignax.losses import Loss
from alignax.models.adapters import AdapterConfig
from alignax.planning import arithmetic, hlo
from alignax.types import REQUESTS, Batch, ConfigError, Passes, passes

MOST_DEVICES = 2048  # of one process of the CPU backend


class Size(NamedTuple):
    """A batch: prompts over all devices, and the static shape of data.plan_shape (K, T, L, rows of a group)."""

    prompts: int
    shape: data.Shape
    layout: str = "padded"


@dataclasses.dataclass(frozen=True)
class Setup:
    """A train stage as plain arguments. params: what the update changes, as shapes. frozen: the policy's parameters
    that it does not ({} without adapters). ref: the reference's, or None; under adapters the same arrays as frozen."""

    spec: step.ModelSpec
    loss: Loss
    optimizer: optax.GradientTransformation
    params: Any
    frozen: Any
    ref: Any
    accumulation: int = 1
    rules: sharding.Rules = sharding.DEFAULT_RULES


def make_setup(spec: step.ModelSpec, loss: Loss, optimizer: optax.GradientTransformation, *, dtype: str = "float32",
               adapters: AdapterConfig | None = None, reference: str = "none", accumulation: int = 1,
               rules: sharding.Rules = sharding.DEFAULT_RULES) -> Setup:
    """The stage that `alignax train` would run, with shapes in place of arrays; nothing is computed.

    reference: a rule of alignax.reference; `precomputed` keeps no copy. Raises ConfigError for adapters that do not
    fit.
    """
    model = {"model": models.abstract_params(spec.config, dtype)}
    params, frozen = model, {}
    if adapters is not None:
        made = jax.eval_shape(lambda m: models.init_adapters(m, adapters, jax.random.key(0)), model["model"])
        params, frozen = {"adapters": made}, model
    heads = jax.eval_shape(lambda: models.init_heads(loss.requests, spec.config.hidden_size, spec.config.vocab_size,
                                                     jax.random.key(0)))
    params = {**params, **heads}
    ref = model if reference in ("frozen", "adapter_off") else None
    return Setup(dataclasses.replace(spec, adapters=adapters), loss, optimizer, params, frozen, ref, accumulation,
                 rules)


def simulated_mesh(sizes: Mapping[str, int]) -> Mesh | AbstractMesh:
    """A mesh of simulated CPU devices, or an abstract one beyond MOST_DEVICES; missing axes have size 1.

    The number of simulated devices is fixed when JAX starts: this has to come before its first computation, or find
    enough devices. Raises ConfigError where it does not.
    """
    count = math.prod(sizes.values())
    if count > MOST_DEVICES:
        return sharding.abstract_mesh(sizes)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started; what it started with is looked at below
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"a mesh of {dict(sizes)} needs {count} simulated devices; this process has started JAX with "
                          f"{len(devices)}. Ask before the first computation, or set XLA_FLAGS="
                          f"--xla_force_host_platform_device_count={count}")
    return sharding.make_mesh(dict(sizes), devices[:count])


def _batch(setup: Setup, size: Size, mesh: Mesh | AbstractMesh) -> Batch:
    """A batch as shapes: full records of the layout, with every stream and array that the loss asks for."""
    ways = sharding.batch_ways(mesh)
    if size.prompts % (ways * setup.accumulation):
        raise ConfigError(f"a batch of {size.prompts} prompts does not divide over {ways} devices (data x fsdp) and "
                          f"{setup.accumulation} micro-batches")
    packed = packs(size.layout)
    groups = ways * setup.accumulation if packed else 1
    # A few short records of the right static shape; their arrays are then taken as those of `prompts` records.
    few = groups if packed else 1
    record = data.token_record("r", [1], [[1]] * size.shape.K, scores=list(range(size.shape.K)))
    streams = {REQUESTS[n].stream for n in setup.loss.requests} - {"pair"}
    example = data.fill([record] * few, size.shape, size.layout, pad_id=0, groups=groups,
                        extra=dict.fromkeys(streams, [record] * few))
    times = size.prompts // few

    def grown(leaf, times):
        shape = (leaf.shape[0] * times, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding.over_batch(mesh))

    def stream(one):
        # The rows of a packed layout belong to its groups, whose number is given; others have a group for each prompt.
        rows = 1 if packed else times
        out = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        for name in ("tokens", "segment", "prefix", "position"):
            out[name] = grown(out[name], rows)
        for name in ("row", "col", "targets", "mask", "valid"):
            out[name] = grown(out[name], times)
        return type(one)(**out | {"groups": one.groups * rows})

    arrays = {name: grown(leaf, times) for name, leaf in example.data.items()}
    if setup.ref is None and any(n == "ref_logps" for n in setup.loss.requests):
        arrays["ref_logps"] = grown(jax.ShapeDtypeStruct((few, size.shape.K), jnp.float32), times)
    return Batch({n: stream(s) for n, s in example.streams.items()}, arrays, grown(example.ids, times))


def abstract_arguments(setup: Setup, size: Size, mesh: Mesh | AbstractMesh) -> tuple:
    """(state, ref_params, batch, hyper, key, frozen) of the update, as ShapeDtypeStructs with their shardings."""
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree):
        shardings = sharding.param_shardings(tree, mesh, setup.rules)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

    state = step.TrainState(jax.ShapeDtypeStruct((), jnp.int32), setup.params,
                            jax.eval_shape(setup.optimizer.init, setup.params), jax.eval_shape(setup.loss.init_state))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    hyper = {k: number for k, v in setup.loss.hyper.items() if isinstance(v, float)}
    return (placed(state), None if setup.ref is None else placed(setup.ref), _batch(setup, size, mesh), hyper,
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole), placed(setup.frozen))


def per_device(tree: Any, dtype: Any = None) -> int:
    """Bytes of one device's part of a tree of arrays or ShapeDtypeStructs with shardings; dtype: as if in that."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(dtype or a.dtype).itemsize
               for a in jax.tree.leaves(tree) if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key))


def traced_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a traced program over the whole batch: loops of known length multiplied, the
    dearer branch of a condition; a loop of unknown length counts once."""
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[d] for d in left)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
        elif name == "cond":
            total += max(traced_flops(branch) for branch in params["branches"])
        else:
            inner = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))
                     if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # what stands inside is one device's part
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += sum(map(traced_flops, inner)) * times
    return total


def _reads(needed: Collection[Passes], accumulation: int, again: bool) -> dict[str, int]:
    """How often an update reads the weights of policy and reference: once for a pass of a micro-batch, and where layers
    are computed again (`again`) once more in a backward pass."""
    policy = sum(one.policy_forward + one.policy_backward * (1 + again) for one in needed)
    return {"policy": accumulation * policy, "reference": accumulation * sum(one.reference_forward for one in needed)}


def measure(setup: Setup, size: Size, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Traces, lowers and (on a mesh with devices) compiles the update; every number is of one device and one update.

    bytes: parameters (trained), frozen, reference (0 where it is the frozen base), optimizer, gradients, batch,
    temporaries (activations, gradients, logits: what the program holds beyond its arguments; None without devices)
    and total. flops: analytic, traced and compiled (None without devices), `xla` (XLA's own number, loop bodies once);
    partial: whether attention is loops of unknown length, so that all but the first lack most of it.
    collectives: {kind: {count, bytes, wire}} or None. passes: {stream: types.Passes as a dict}. reads: how often the
    parameters of policy and reference are read. donated: outputs that reuse an input's memory, of `donatable` leaves of
    the state. Raises ConfigError for sizes that do not divide.
    """
    over = sharding.over_activations(mesh)
    setup = dataclasses.replace(setup, spec=dataclasses.replace(setup.spec, activations=over))
    arguments = abstract_arguments(setup, size, mesh)
    state, ref, batch, _, _, frozen = arguments
    update = jax.jit(step.make_update(setup.spec, setup.loss, setup.optimizer, accumulation=setup.accumulation),
                     donate_argnums=0, out_shardings=(jax.tree.map(lambda a: a.sharding, state), None))
    traced = update.trace(*arguments)
    devices = mesh.size
    pair = batch.streams["pair"]
    rows, columns = pair.tokens.shape
    rule = {"reference": "none" if ref is None else "frozen", "accumulation": setup.accumulation}
    needed = passes(setup.loss.requests, **rule)
    analytic = arithmetic.update_flops(setup.spec.config, rows, columns, math.prod(pair.targets.shape),
                                       setup.loss.requests, remat=setup.spec.remat, lora=bool(setup.frozen), **rule)
    wide = jnp.float32 if setup.accumulation > 1 else None
    parts = {"parameters": per_device(state.params), "frozen": per_device(frozen),
             "reference": 0 if setup.frozen or ref is None else per_device(ref),
             "optimizer": per_device(state.opt_state), "gradients": per_device(state.params, wide),
             "batch": per_device(batch), "temporaries": None, "total": None}
    out = {"devices": devices, "mesh": dict(mesh.shape), "rows": rows, "columns": columns,
           "slots": pair.targets.shape[2], "prompts": size.prompts, "bytes": parts,
           "flops": {"analytic": analytic / devices, "traced": traced_flops(traced.jaxpr) / devices, "compiled": None,
                     "xla": None, "partial": models.in_loops(setup.spec.attention, setup.spec.config, columns, over)},
           "collectives": None, "donated": None, "donatable": len(jax.tree.leaves(state)),
           "passes": {stream: one._asdict() for stream, one in needed.items()},
           "reads": _reads(needed.values(), setup.accumulation, again=setup.spec.remat != "none"),
           "hlo_bytes": None}
    if isinstance(mesh, AbstractMesh):
        traced.lower(lowering_platforms=("cpu",))  # whether it lowers at all is worth knowing
        return out
    compiled = traced.lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    doubled = per_device(frozen) if setup.frozen and ref is not None else 0  # one tree, given twice
    kept = memory.argument_size_in_bytes - doubled + memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts["temporaries"] = memory.temp_size_in_bytes
    parts["total"] = kept + memory.temp_size_in_bytes
    out["flops"] |= {"compiled": hlo.dot_flops(text), "xla": (compiled.cost_analysis() or {}).get("flops")}
    out["collectives"] = {k: c._asdict() for k, c in hlo.collectives(text, devices).items()}
    out["donated"], out["hlo_bytes"] = hlo.aliased(text), len(text)
    return out
