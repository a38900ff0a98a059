"""Weights between files and parameters, one tensor of host memory at a time.

The decoder stacks its layers on a leading axis, files hold one tensor per layer (or several projections fused in one),
so a tensor is written into its place in an array that already lies on the devices with its sharding: the update takes
the array over (donation) and changes it in place. Peak host memory of `fill` is one tensor as it is stored, its copy in
the dtype asked for, and leaves of at most 16 MB; `drain` needs one tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from alignax.models.families.slots import Place, Slots
from alignax.models.files import TensorReader, list_names
from alignax.types import Array, ConfigError

Reporting = Callable[[int, int], None]
STORED = "stored"
# A leaf of a tiny model is put together on the host and moved whole, which compiles nothing.
_SMALL_LEAF_BYTES = 16_000_000


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at `path`."""
    for part in path:
        tree = tree[part]
    return tree


def _put_at(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def floating_dtype(dtype: Any, where: str) -> np.dtype | None:
    """None for `stored`, else the floating dtype that a name or a type stands for; ConfigError for another one."""
    if isinstance(dtype, str) and dtype == STORED:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise ConfigError(f"{where}: found {dtype!r}, allowed: stored, float32, bfloat16, float16 or float64")
    return found


@functools.lru_cache(maxsize=64)
def _update(sharding: Sharding | None):
    """leaf [layers, ...], part [...], layer -> leaf with the part in its place, in the same memory."""
    place = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def _on_device(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    # Every process holds the whole tensor and hands each of its devices the cut that the sharding asks for.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _without_layers(sharding: Sharding | None, where: str) -> Sharding | None:
    """The sharding of one layer of a stacked leaf."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return sharding
    raise ConfigError(f"load(shardings=): {where}: found {type(sharding).__name__}, allowed: a NamedSharding or a "
                      "SingleDeviceSharding")


class _Leaf:
    """One array of the parameters while its tensors come in."""

    def __init__(self, path: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None,
                 host: bool):
        self.path, self.shape, self.dtype, self.sharding, self.host = path, shape, dtype, sharding, host
        self.missing, self.value = 0, None
        self.gathers = host or int(np.prod(shape)) * dtype.itemsize <= _SMALL_LEAF_BYTES
        if not host and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ConfigError(f"load(dtype=): {'/'.join(path)}: found {dtype}, allowed: float32, bfloat16 or float16, "
                              "or host=True, while jax_enable_x64 is off")

    def take(self, layer: int | None, part: np.ndarray) -> None:
        """Puts the part of one layer (None: the whole leaf) in its place; the last one completes the leaf."""
        part = part.astype(self.dtype, copy=False)
        if self.gathers:
            if self.value is None:
                self.value = np.empty(self.shape, self.dtype)
            self.value[... if layer is None else layer] = part
        elif layer is None:
            self.value = _on_device(np.ascontiguousarray(part), self.sharding)
        else:
            if self.value is None:
                self.value = jnp.zeros(self.shape, self.dtype, device=self.sharding)
            cut = _on_device(np.ascontiguousarray(part), _without_layers(self.sharding, "/".join(self.path)))
            # Waiting keeps transfers from queueing up, each with its own tensor on the host.
            self.value = jax.block_until_ready(_update(self.sharding)(self.value, cut, jnp.int32(layer)))
        self.missing -= 1
        if not self.missing and self.gathers and not self.host:
            self.value = _on_device(self.value, self.sharding)


def fill(reader: TensorReader, slots: Slots, shapes: Any, *, dtype: Any, shardings: Any = None, host: bool = False,
         reporting: Reporting | None = None) -> dict[str, Any]:
    """The parameters that `slots` describes, read tensor by tensor; a nested dict shaped like `shapes`.

    shapes: abstract parameters. dtype: a floating dtype for every leaf, or `stored` (a leaf then has the widest type of
    its tensors). shardings: a tree of shardings like `shapes`, or None for the default device. host: numpy arrays and
    no device. reporting(done, total) is called after each tensor with bytes of the files. Every name of `slots` must be
    in the reader. Raises ConfigError, naming file and tensor, for a shape or a type that does not fit.
    """
    chosen = floating_dtype(dtype, "load(dtype=)")
    names: dict[tuple[str, ...], list[str]] = {}
    types: dict[tuple[str, ...], np.dtype] = {}
    for name, slot in slots.items():
        found, shape, place = reader.dtype(name), reader.shape(name), reader.file(name)
        if shape != slot.shape:
            raise ConfigError(f"{place}: {name}: found shape {shape}, allowed: {slot.shape} by config.json")
        if not jnp.issubdtype(found, jnp.floating):
            raise ConfigError(f"{place}: {name}: found dtype {found}, allowed: a floating type")
        names.setdefault(slot.places[0].path, []).append(name)
        for where in slot.places:
            types[where.path] = jnp.promote_types(types.get(where.path, found), found)
    leaves = {path: _Leaf(path, leaf_at(shapes, path).shape, types[path] if chosen is None else chosen,
                          None if shardings is None else leaf_at(shardings, path), host) for path in types}
    for slot in slots.values():
        for where in slot.places:
            leaves[where.path].missing += 1
    done, total = 0, sum(map(reader.nbytes, slots))
    for name in (name for held in names.values() for name in held):
        tensor = reader.read(name)
        for where in slots[name].places:
            leaves[where.path].take(where.layer, where.to_params(tensor))
        done += reader.nbytes(name)
        if reporting is not None:
            reporting(done, total)
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        _put_at(params, path, leaf.value)
    return params


def _narrowed(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`; a finite value that float16 cannot hold is an error and not an infinity."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.float16 and cast.dtype != array.dtype and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
        raise ConfigError(f"save(dtype=): {name}: found values beyond {np.finfo(np.float16).max}, allowed: bfloat16 or "
                          "float32 for this model")
    return cast


def drain(params: Mapping[str, Any], slots: Slots, *, dtype: np.dtype | None = None,
          reporting: Reporting | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every slot, fetched from the devices one at a time and cast to `dtype` (None: as it is).

    reporting(done, total) is called after each tensor is taken, with bytes of the file. All arrays must be reachable
    from this process.
    """
    size = lambda slot, width: int(np.prod(slot.shape, dtype=np.int64)) * width
    width = lambda slot: jnp.dtype(leaf_at(params, slot.places[0].path).dtype if dtype is None else dtype).itemsize
    done, total = 0, sum(size(slot, width(slot)) for slot in slots.values())
    for name, slot in slots.items():
        tensor = slot.from_params(*(_fetch(leaf_at(params, where.path), where) for where in slot.places))
        if tensor.shape != slot.shape:
            raise ConfigError(f"save(params=): {name}: found shape {tensor.shape}, allowed: {slot.shape}")
        yield name, _narrowed(name, tensor, tensor.dtype if dtype is None else dtype)
        done += size(slot, width(slot))
        if reporting is not None:
            reporting(done, total)


def _fetch(leaf: Array, where: Place) -> np.ndarray:
    """One place of the parameters on the host."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ConfigError(f"save(params=): {'/'.join(where.path)}: found an array spread over several processes, "
                          "allowed: one that this process can read (a run's checkpoint goes through alignax convert)")
    return np.asarray(leaf if where.layer is None else leaf[where.layer])


def fits(params: Any, shapes: Any) -> None:
    """Raises ConfigError, naming the leaves, where `params` does not have the leaves and shapes of `shapes`."""
    flat = lambda tree: {jax.tree_util.keystr(key): tuple(leaf.shape)
                         for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    found, wanted = flat(params), flat(shapes)
    if found.keys() != wanted.keys():
        raise ConfigError(f"save(params=): found parameters that do not fit the config: "
                          f"{list_names(found.keys() ^ wanted.keys())}, allowed: the leaves of abstract_params(config)")
    for key, shape in found.items():
        if shape != wanted[key]:
            raise ConfigError(f"save(params=): {key}: found shape {shape}, allowed: {wanted[key]}")
