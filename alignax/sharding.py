"""Meshes and sharding rules: one global-array program on one device or many.

A mesh has the axes data, fsdp, sequence and tensor. Batches are cut over data and fsdp together, the columns of long
rows over sequence; parameters follow ordered (regex -> axes) rules on their path, first match wins. Optimiser state,
master weights and reference end in the same paths as the parameters, so the same rules cut them alike. `data` of 2 and
`fsdp` of 4 is hybrid sharding: two replicas, each cut over four devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from alignax.types import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor")

Rules = Sequence[tuple[str, Sequence]]

# Layers are stacked, so a layer's matrix has axes (layer, in, out). The adapters of a matrix are cut as the matrix is:
# `a` on its input, `b` on its output; the rank stays whole.
DEFAULT_RULES: tuple[tuple[str, tuple], ...] = (
    (r"embedding|model/head", ("tensor", "fsdp")),
    (r"layers/(attention/output|mlp/down)$", (None, "tensor", "fsdp")),
    (r"layers/(attention/(query|key|value)|mlp/(gate|up))$", (None, "fsdp", "tensor")),
    (r"(attention/output|mlp/down)/a$", (None, "tensor")),
    (r"(attention/output|mlp/down)/b$", (None, None, "fsdp")),
    (r"(attention/(query|key|value)|mlp/(gate|up))/a$", (None, "fsdp")),
    (r"(attention/(query|key|value)|mlp/(gate|up))/b$", (None, None, "tensor")),
    (r".*", ()),
)


def check_rules(rules: Rules, where: str = "mesh.rules") -> tuple[tuple[str, tuple], ...]:
    """The rules as tuples. Raises ConfigError, naming the rule, for a broken regex or an entry that is no axis.

    An entry of the axes is one of AXES, None (that dimension stays whole), or several of AXES that share a dimension.
    """
    out = []
    for number, rule in enumerate(rules):
        here = f"{where}[{number}]={rule!r}"
        if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str) or isinstance(rule[1], str):
            raise ConfigError(f"{here}: expected (regex, axes), like {DEFAULT_RULES[0]!r}")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ConfigError(f"{here}: the regular expression does not compile: {error}") from error
        axes = tuple(a if a is None or isinstance(a, str) else tuple(a) for a in rule[1])
        named = [a for entry in axes for a in _names(entry)]
        wrong = [a for a in named if a not in AXES]
        if wrong or len(set(named)) != len(named):
            raise ConfigError(f"{here}: {f'unknown axis {wrong[0]!r}' if wrong else 'an axis stands twice'}; allowed: "
                              f"each of {', '.join(AXES)} once, and None")
        out.append((rule[0], axes))
    return tuple(out)


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def mesh_shape(sizes: Mapping[str, int] | None, count: int) -> tuple[int, ...]:
    """Sizes of AXES on `count` devices: missing axes have size 1, data takes the devices that are left.

    Raises ConfigError for an unknown axis or sizes whose product is not `count`.
    """
    sizes = dict(sizes or {})
    for axis in sizes:
        if axis not in AXES:
            raise ConfigError(f"mesh.{axis}: unknown axis; allowed: {', '.join(AXES)}")
    given = math.prod(sizes.get(a, 1) for a in AXES if a != "data")
    sizes.setdefault("data", max(count // given, 1))
    shape = tuple(sizes.get(a, 1) for a in AXES)
    if math.prod(shape) != count:
        raise ConfigError(f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices; "
                          f"there are {count}")
    return shape


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes AXES over `devices` (all by default); see mesh_shape for sizes and errors."""
    shape = mesh_shape(sizes, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """The same mesh without devices, for tracing and lowering; missing axes have size 1."""
    shape = mesh_shape(sizes, math.prod(sizes.values()))
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path) -> str:
    """`model/layers/attention/query` for a key path of a parameter tree."""
    return "/".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path)


def param_shardings(params, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES):
    """A tree of NamedSharding like `params`. An axis that does not divide its dimension is left whole."""

    def one(path, leaf):
        name = path_name(path)
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        spec = []
        for size, entry in zip(leaf.shape, axes, strict=False):
            # An axis of one device is no cut: leaving it out gives the sharding that a compiled program hands back.
            cut = tuple(a for a in _names(entry) if mesh.shape[a] > 1)
            divides = cut and size % math.prod(mesh.shape[a] for a in cut) == 0
            spec.append((cut[0] if len(cut) == 1 else cut) if divides else None)
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def over_batch(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis cut over data and fsdp together, everything else whole: batches."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def over_activations(mesh: Mesh | AbstractMesh) -> NamedSharding | None:
    """How activations [R,T,...] lie: rows as in over_batch, columns over `sequence`; None on one device."""
    if mesh.size == 1:
        return None
    if mesh.shape["sequence"] == 1:
        return over_batch(mesh)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces a batch is cut: the devices along data and fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(batch, mesh: Mesh):
    """Puts every leaf of a batch on the devices, its leading axis cut over data and fsdp.

    Raises ConfigError where a leading axis does not divide: a silently replicated batch would hide the mistake.
    """
    ways = batch_ways(mesh)

    def one(leaf):
        if leaf.shape[0] % ways:
            raise ConfigError(f"a batch axis of {leaf.shape[0]} does not divide over {ways} devices (data x fsdp)")
        return jax.device_put(leaf, over_batch(mesh))

    return jax.tree.map(one, batch)
