"""Meshes and sharding rules: one global-array program on one device or many.

A mesh has the axes data, fsdp and tensor. Batches are cut over data and fsdp together; parameters follow ordered
(regex -> axes) rules on their path, first match wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignax.types import ConfigError

AXES = ("data", "fsdp", "tensor")

# Layers are stacked, so a layer's matrix has axes (layer, in, out).
DEFAULT_RULES: tuple[tuple[str, tuple], ...] = (
    (r"embedding|model/head", ("tensor", "fsdp")),
    (r"layers/(attention/output|mlp/down)$", (None, "tensor", "fsdp")),
    (r"layers/(attention/(query|key|value)|mlp/(gate|up))$", (None, "fsdp", "tensor")),
    (r".*", ()),
)


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor; missing axes have size 1, data takes the devices that are left.

    Raises ConfigError for an unknown axis or sizes whose product is not the number of devices.
    """
    sizes = dict(sizes or {})
    for axis in sizes:
        if axis not in AXES:
            raise ConfigError(f"mesh.{axis}: unknown axis; allowed: {', '.join(AXES)}")
    count = jax.device_count()
    given = math.prod(sizes.get(a, 1) for a in AXES if a != "data")
    sizes.setdefault("data", max(count // given, 1))
    shape = tuple(sizes.get(a, 1) for a in AXES)
    if math.prod(shape) != count:
        raise ConfigError(f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices; "
                          f"there are {count}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def path_name(path) -> str:
    """`model/layers/attention/query` for a key path of a parameter tree."""
    return "/".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path)


def param_shardings(params, mesh: Mesh, rules: Sequence[tuple[str, tuple]] = DEFAULT_RULES):
    """A tree of NamedSharding like `params`. An axis that does not divide its dimension is left whole."""

    def one(path, leaf):
        name = path_name(path)
        spec = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        spec = tuple(spec)[:leaf.ndim]
        # An axis of one device is no cut: leaving it out gives the sharding that a compiled program hands back.
        spec = tuple(a if a and mesh.shape[a] > 1 and leaf.shape[i] % mesh.shape[a] == 0 else None
                     for i, a in enumerate(spec))
        while spec and spec[-1] is None:
            spec = spec[:-1]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def shard_batch(batch, mesh: Mesh):
    """Puts every leaf of a batch on the devices, its leading axis cut over data and fsdp.

    Raises ConfigError where a leading axis does not divide: a silently replicated batch would hide the mistake.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(leaf):
        if leaf.shape[0] % ways:
            raise ConfigError(f"a batch axis of {leaf.shape[0]} does not divide over {ways} devices (data x fsdp)")
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    return jax.tree.map(one, batch)
