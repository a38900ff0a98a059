"""How a tensor of a file maps to places in the parameters and back.

One file tensor fills one or more places (a fused QKV fills three); the transforms are pure numpy functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Place(NamedTuple):
    """One destination: the leaf at `path` in the parameters, at index `layer` of its leading axis (None: the whole
    leaf), filled with to_params(file tensor)."""

    path: tuple[str, ...]
    layer: int | None
    to_params: Callable[[np.ndarray], np.ndarray]


class Slot(NamedTuple):
    """One tensor of a file: its shape there, its places, and the way back.

    from_params takes the arrays of the places (each the leaf, or leaf[layer]) in their order and returns the tensor.
    """

    shape: tuple[int, ...]
    places: tuple[Place, ...]
    from_params: Callable[..., np.ndarray]


Slots = dict[str, Slot]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _turned(array: np.ndarray) -> np.ndarray:
    return array.T


def leaf_shape(shapes: Any, path: Sequence[str], layer: int | None) -> tuple[int, ...]:
    """The shape of one place: of the leaf at `path` of abstract parameters, without its layer axis where layer is
    given."""
    for part in path:
        shapes = shapes[part]
    return tuple(shapes.shape if layer is None else shapes.shape[1:])


def has_leaf(shapes: Any, path: Sequence[str]) -> bool:
    """Whether abstract parameters hold a leaf at `path`."""
    for part in path:
        if not isinstance(shapes, dict) or part not in shapes:
            return False
        shapes = shapes[part]
    return isinstance(shapes, jax.ShapeDtypeStruct)


def single(shapes: Any, path: Sequence[str], layer: int | None = None, *, turned: bool = False) -> Slot:
    """A tensor that is one place; turned: the file keeps a matrix as [out, in], the decoder as [in, out]."""
    shape = leaf_shape(shapes, path, layer)
    transform = _turned if turned else _same
    return Slot(shape[::-1] if turned else shape, (Place(tuple(path), layer, transform),), transform)


def fused(shapes: Any, paths: Sequence[Sequence[str]], layer: int, *, turned: bool, heads: int | None = None) -> Slot:
    """A tensor that stacks the outputs of several projections (their matrices [in, out_i] or biases [out_i]).

    heads None: whole projections after each other. heads: the outputs of head 0 of every projection, then of head 1
    and so on (all projections then have the same width).
    """
    each = [leaf_shape(shapes, path, layer) for path in paths]
    widths = [shape[-1] for shape in each]
    starts = np.cumsum([0, *widths])
    rows = each[0][:-1]
    count = len(paths)

    def to_params(number):
        def transform(array):
            array = array.T if turned else array
            if heads is None:
                return array[..., starts[number]:starts[number + 1]]
            return array.reshape(*rows, heads, count, -1)[..., number, :].reshape(*rows, -1)
        return transform

    def from_params(*arrays):
        if heads is None:
            whole = np.concatenate(arrays, axis=-1)
        else:
            whole = np.stack([a.reshape(*rows, heads, -1) for a in arrays], axis=-2).reshape(*rows, -1)
        return whole.T if turned else whole

    shape = (*rows, sum(widths))
    places = tuple(Place(tuple(path), layer, to_params(number)) for number, path in enumerate(paths))
    return Slot(shape[::-1] if turned else shape, places, from_params)
