"""Loss landscapes: the line between two parameter trees, its barrier, curves that connect modes, and slices.

Sources: Goodfellow et al. 1412.6544 (lines), Garipov et al. 1802.10026 (Bezier curves), Li et al. 1712.09913
(filter-normalised directions). `loss(params)` closes over a fixed batch and returns a scalar, or a tree of scalars
(loss, reward, KL, margin) that are measured along together; batch statistics, where a model has any, are its business.
Interpolation runs in float32 or wider and returns to each leaf's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax.types import ConfigError, DataError


def _wide(x):
    """x in float32, or wider where it is."""
    return jnp.asarray(x, jnp.promote_types(jnp.float32, jnp.asarray(x).dtype))


def combine(trees: tuple[Any, ...], weights: tuple[Any, ...]) -> Any:
    """sum_i weights_i trees_i, leaf by leaf, in the first tree's dtypes; a weight of exactly 0 still spreads NaN."""
    def one(*leaves):
        return sum(w * _wide(leaf) for w, leaf in zip(weights, leaves, strict=True)).astype(leaves[0].dtype)

    return jax.tree.map(one, *trees)


def interpolate(start: Any, end: Any, alpha: Any) -> Any:
    """(1 - alpha) start + alpha end, all parameters alike; alpha may lie outside [0, 1]."""
    return combine((start, end), (1 - alpha, alpha))


def line(loss: Callable[[Any], Any], start: Any, end: Any, alphas: Any) -> Any:
    """loss at every alpha [k] of the line from start (0) to end (1): [k], or a tree of [k]. One point at a time."""
    return jax.lax.map(lambda alpha: loss(interpolate(start, end, alpha)), _wide(alphas))


class Barrier(NamedTuple):
    """The largest excess of L(alpha) over the chord of its ends, alpha in [0, 1], and where; 0 at an end at least."""

    height: float
    alpha: float


def barrier(alphas: Any, losses: Any) -> Barrier:
    """max over alpha in [0, 1] of L(alpha) - ((1 - alpha) L(0) + alpha L(1)).

    alphas, losses: [k]. Raises DataError where alphas lack 0 or 1, or shapes differ.
    """
    alphas, losses = np.asarray(alphas, np.float64), np.asarray(losses, np.float64)
    if alphas.ndim != 1 or alphas.shape != losses.shape:
        raise DataError(f"barrier: found shapes {list(alphas.shape)} and {list(losses.shape)}, allowed: one [k]")
    ends = [np.flatnonzero(np.isclose(alphas, at, rtol=0, atol=1e-6)) for at in (0, 1)]
    if not all(end.size for end in ends):
        raise DataError(f"barrier(alphas=): found {alphas.min():g} to {alphas.max():g}, allowed: 0 and 1 among them")
    first, last = (losses[end[0]] for end in ends)
    inside = (alphas > -1e-6) & (alphas < 1 + 1e-6)
    excess = (losses - ((1 - alphas) * first + alphas * last))[inside]
    best = int(excess.argmax())
    return Barrier(float(excess[best]), float(alphas[inside][best]))


def connected(found: Barrier, tolerance: float = 0.02) -> bool:
    """Whether two ends are linearly mode-connected: a barrier of at most `tolerance`, in the unit of what was measured
    (2% where it is an error rate)."""
    return found.height <= tolerance


class OnLine(NamedTuple):
    """Where parameters stand relative to the line start-end: the coordinate (0 at start, 1 at end) of their projection,
    and the norm of what remains across it."""

    alpha: jax.Array
    residual: jax.Array


def onto_line(params: Any, start: Any, end: Any) -> OnLine:
    """Projection of parameters on the line, over all leaves together; NaN where start equals end."""
    less = lambda a, b: jax.tree.map(lambda x, y: _wide(x) - _wide(y), a, b)
    along, here = less(end, start), less(params, start)
    alpha = optax.tree.vdot(here, along) / optax.tree.vdot(along, along)
    return OnLine(alpha, optax.tree.norm(jax.tree.map(lambda h, a: h - alpha * a, here, along)))


def bezier(start: Any, control: Any, end: Any, t: Any) -> Any:
    """(1 - t)^2 start + 2 t (1 - t) control + t^2 end."""
    return combine((start, control, end), ((1 - t) ** 2, 2 * t * (1 - t), t ** 2))


class Curve(NamedTuple):
    """The control point that `connect` found, and the loss at the t it drew, [steps]."""

    control: Any
    losses: jax.Array


def connect(loss: Callable[[Any], jax.Array], start: Any, end: Any, key: jax.Array, *, steps: int = 500,
            optimiser: optax.GradientTransformation | None = None) -> Curve:
    """Trains the control point of a quadratic Bezier curve to lower E over t ~ U(0, 1) of loss(curve(t)); ends fixed.

    loss(params) -> scalar. Starts at the middle of the line, where the curve is the line. optimiser: Adam at 1e-2 by
    default. Raises ConfigError for steps < 1. Measure the result with `along`.
    """
    if steps < 1:
        raise ConfigError(f"connect(steps=): found {steps}, allowed: 1 or more")
    rule = optax.adam(1e-2) if optimiser is None else optimiser

    def update(carry, number):
        control, memory = carry
        t = jax.random.uniform(jax.random.fold_in(key, number))
        value, gradient = jax.value_and_grad(lambda c: loss(bezier(start, c, end, t)))(control)
        updates, memory = rule.update(gradient, memory, control)
        return (optax.apply_updates(control, updates), memory), value

    control = interpolate(start, end, 0.5)
    (control, _), losses = jax.lax.scan(update, (control, rule.init(control)), jnp.arange(steps))
    return Curve(control, losses)


def along(loss: Callable[[Any], Any], start: Any, control: Any, end: Any, ts: Any) -> Any:
    """loss at every t [k] of the Bezier curve; `barrier(ts, losses)` reads it as it reads a line."""
    return jax.lax.map(lambda t: loss(bezier(start, control, end, t)), _wide(ts))


def filter_direction(key: jax.Array, params: Any, filters: Callable[[tuple, Any], tuple[int, ...]]
                     | tuple[int, ...] = (-1,)) -> Any:
    """A random normal direction in which every filter has the norm of the filter of the weights it stands beside.

    filters: the axes that number a leaf's filters, all others being the filter's own: (-1,) are the columns of kernels
    [in, out]; (0, -1) of layers stacked on a leading axis; a function of (path, leaf) where leaves differ. Leaves of
    fewer than 2 axes (biases, norms) stay 0, and so do filters whose weights are 0. Same dtypes as params.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)

    def one(number, path, leaf):
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        kept = {axis % leaf.ndim for axis in (filters(path, leaf) if callable(filters) else filters)}
        others = tuple(axis for axis in range(leaf.ndim) if axis not in kept)
        weights = _wide(leaf)
        drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, weights.dtype)
        norm = lambda x: jnp.sqrt((x ** 2).sum(others, keepdims=True))
        return (drawn * norm(weights) / norm(drawn)).astype(leaf.dtype)

    return jax.tree.unflatten(treedef, [one(i, path, jnp.asarray(leaf)) for i, (path, leaf) in enumerate(paths)])


def slice_1d(loss: Callable[[Any], Any], params: Any, direction: Any, alphas: Any) -> Any:
    """loss(params + alpha direction) at every alpha [k]: [k], or a tree of [k]."""
    return jax.lax.map(lambda alpha: loss(combine((params, direction), (1.0, alpha))), _wide(alphas))


def slice_2d(loss: Callable[[Any], Any], params: Any, first: Any, second: Any, a: Any, b: Any) -> Any:
    """loss(params + a first + b second) on the grid of a [j] and b [k]: [j, k], or a tree of them."""
    row = lambda x: jax.lax.map(lambda y: loss(combine((params, first, second), (1.0, x, y))), _wide(b))
    return jax.lax.map(row, _wide(a))
