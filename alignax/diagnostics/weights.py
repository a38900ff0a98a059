"""Weight-space distance between two parameter trees, per layer group, in float64 on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.types import ConfigError


class Distance(NamedTuple):
    """How far a group of weights moved.

    l2: |after - before|. relative: l2 / |before|; 0 where nothing moved, infinite where weights of norm 0 did. cosine:
    between the two, NaN where either is 0. spectral: the largest singular value of the change over the group's
    matrices (last two axes), NaN where it has none.
    """

    l2: float
    relative: float
    cosine: float
    spectral: float


def by_layer(path: tuple[str, ...]) -> str:
    """The group of a stacked layer's number, layers/3; of the first name elsewhere."""
    return "/".join(path[:2] if path[0] == "layers" else path[:1])


def _leaves(tree, place: str) -> dict[tuple[str, ...], np.ndarray]:
    """Path -> float64 array; leaves below `layers` are cut along their leading axis, whose number joins the path."""
    name = lambda key: str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path, array = tuple(name(key) for key in keys) or (place,), np.asarray(leaf, np.float64)
        if path[0] == "layers" and array.ndim:
            found |= {("layers", str(i), *path[1:]): part for i, part in enumerate(array)}
        else:
            found[path] = array
    return found


def distances(before: Any, after: Any, *, group: Callable[[tuple[str, ...]], str] = "/".join) -> dict[str, Distance]:
    """Group -> Distance, in the trees' order; every matrix of every layer is a group of its own by default.

    Leaves below a top-level `layers` are stacked on their leading axis, as in alignax.models, and are cut into layers:
    layers/3/attention/query. group(path) names the group of a path (`by_layer`; lambda path: "all").
    Raises ConfigError where the trees differ in names or shapes.
    """
    first, second = _leaves(before, "params"), _leaves(after, "params")
    if lacking := sorted("/".join(path) for path in first.keys() ^ second.keys()):
        raise ConfigError(f"distances: found {', '.join(lacking[:5])} in one tree only, allowed: one structure")
    members: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for path, x in first.items():
        y = second[path]
        if x.shape != y.shape:
            raise ConfigError(f"distances: {'/'.join(path)}: found shapes {list(x.shape)} and {list(y.shape)}, allowed:"
                              " one shape")
        members.setdefault(group(path), []).append((x, y))
    return {name: _distance(pairs) for name, pairs in members.items()}


def _distance(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Distance:
    """Of all members of a group together."""
    total = lambda f: float(sum(np.sum(f(x, y)) for x, y in pairs))
    moved = np.sqrt(total(lambda x, y: (y - x) ** 2))
    size, other = np.sqrt(total(lambda x, y: x * x)), np.sqrt(total(lambda x, y: y * y))
    relative = moved / size if size else (np.inf if moved else 0.0)
    cosine = total(lambda x, y: x * y) / (size * other) if size and other else np.nan
    tops = [np.linalg.norm(y - x, 2, axis=(-2, -1)).max() for x, y in pairs if x.ndim >= 2 and x.size]
    return Distance(float(moved), float(relative), float(cosine), float(max(tops, default=np.nan)))
