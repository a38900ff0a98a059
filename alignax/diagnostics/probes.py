"""Linear probes, directions, and what of a model's change lies along them: pure functions on arrays of activations.

Sources: the toxicity case study 2401.01967 (probe, value vectors, steering, un-aligning), neuron groups 2411.06424
(projection decomposition, patching), cognitive against expressive capability 2405.16964 (first principal direction of
differences), model extrapolation 2404.16792. An MLP writes sum_i m_i v_i + bias: m_i [..., N] what enters its last
matrix, v_i its rows [N, D]. Directions need not have norm 1. Fits run on the host in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import ConfigError, DataError


class Probe(NamedTuple):
    """p(y = 1 | x) = sigma(x weight + bias); weight float64 [D]."""

    weight: np.ndarray
    bias: float

    def logits(self, x) -> np.ndarray:
        """Log-odds [...] of states [..., D]."""
        return np.asarray(x, np.float64) @ self.weight + self.bias

    def accuracy(self, x, y) -> float:
        """Share of labels y [n] (0 or 1) that the sign of the log-odds tells."""
        return float(np.mean((self.logits(x) > 0) == (np.asarray(y) > 0.5)))


def fit_probe(x, y, *, decay: float = 1e-3) -> Probe:
    """Logistic regression: the minimum of mean log(1 + exp(-(2y - 1) logit)) + decay / 2 |weight|^2, by L-BFGS.

    x: [n, D], standardise it first where scales differ; y: [n], 0 or 1, both present. Raises DataError otherwise or
    where the solver does not converge, ConfigError for decay <= 0 (separable data would have no minimum).
    """
    from scipy import optimize, special

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or set(np.unique(y)) != {0.0, 1.0}:
        raise DataError(f"fit_probe: found x {list(x.shape)}, y {list(y.shape)} of values {np.unique(y)[:4]}, allowed: "
                        "[n, D] and [n] of 0 and 1, both present")
    if not np.isfinite(x).all():
        raise DataError(f"fit_probe(x=): found {x.size - np.isfinite(x).sum()} values that are not finite")
    if decay <= 0:
        raise ConfigError(f"fit_probe(decay=): found {decay}, allowed: above 0")
    sign = 2 * y - 1

    def objective(point):
        weight, logits = point[:-1], x @ point[:-1] + point[-1]
        pull = -sign * special.expit(-sign * logits) / len(y)
        value = np.logaddexp(0, -sign * logits).mean() + decay / 2 * weight @ weight
        return value, np.append(pull @ x + decay * weight, pull.sum())

    found = optimize.minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B",
                              options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-8})
    steep = np.abs(objective(found.x)[1]).max()
    if steep > 1e-4:
        raise DataError(f"fit_probe: found a gradient of {steep:g} where the solver stopped ({found.message}), "
                        "allowed: convergence; standardise x or raise decay")
    return Probe(found.x[:-1], float(found.x[-1]))


def principal_direction(right, wrong) -> np.ndarray:
    """[D], norm 1: first principal direction of the differences right - wrong [n, D] of candidates' hidden states.

    The mean of the differences is not taken out, since it is the signal; the sign makes their mean projection positive.
    Differences inside a question: a constant added to all of its candidates changes nothing.
    """
    gaps = np.asarray(right, np.float64) - np.asarray(wrong, np.float64)
    if gaps.ndim != 2 or not gaps.any():
        raise DataError(f"principal_direction: found differences {list(gaps.shape)}, allowed: [n, D], not all 0")
    direction = np.linalg.svd(gaps, full_matrices=False)[2][0]
    return direction * (1.0 if (gaps @ direction).mean() >= 0 else -1.0)


def choice_accuracy(states, direction, answers) -> float:
    """Cognitive accuracy: share of questions whose answer has the largest projection; states [Q, C, D], answers [Q]."""
    chosen = (np.asarray(states, np.float64) @ np.asarray(direction, np.float64)).argmax(-1)
    return float(np.mean(chosen == np.asarray(answers)))


def _along_last(vector, like):
    """vector [N] along the last axis of an array [..., N], explicitly: rank promotion may be an error."""
    return jnp.broadcast_to(vector, jnp.shape(like))


class Split(NamedTuple):
    """A change along a unit direction: coordinate [...], what remains across [..., D], share of the square [...]."""

    along: jax.Array
    across: jax.Array
    share: jax.Array


def decompose(change: jax.Array, direction: jax.Array) -> Split:
    """change [..., D] = along * u + across with u = direction / |direction|; share 0 where nothing changed."""
    unit = direction / jnp.linalg.norm(direction)
    along = change @ unit
    square = (change ** 2).sum(-1)
    share = jnp.where(square > 0, along ** 2 / jnp.where(square > 0, square, 1), 0)
    return Split(along, change - along[..., None] * _along_last(unit, change), share)


def cosines(vectors: jax.Array, direction: jax.Array) -> jax.Array:
    """[...]: cosine of vectors [..., D] with a direction [D]; 0 for a zero vector."""
    size = jnp.linalg.norm(vectors, axis=-1)
    return jnp.where(size > 0, vectors @ direction / (jnp.where(size > 0, size, 1) * jnp.linalg.norm(direction)), 0)


def top_values(values: jax.Array, direction: jax.Array, count: int = 128) -> jax.Array:
    """Indices into values [N, D] of the `count` largest cosines with the direction, best first; all layers joined."""
    return jnp.argsort(-cosines(values, direction))[:count]


def value_directions(values: jax.Array) -> jax.Array:
    """[min(N, D), D]: right singular vectors of the rows [N, D] scaled to norm 1, by falling singular value."""
    units = values / jnp.linalg.norm(values, axis=-1, keepdims=True)
    return jnp.linalg.svd(units, full_matrices=False)[2]


def steer(states: jax.Array, direction: jax.Array, amount: Any) -> jax.Array:
    """states [..., D] - amount * direction."""
    return states - amount * _along_last(direction, states)


def neuron_projections(activations: jax.Array, values: jax.Array, direction: jax.Array) -> jax.Array:
    """p_i = m_i <v_i, W> / |W|: what each neuron writes along W; activations [..., N] (means, or per position)."""
    return activations * _along_last(values @ direction / jnp.linalg.norm(direction), activations)


GROUPS = ("TP-", "TN+", "AP+", "AN-")


def neuron_groups(before: jax.Array, after: jax.Array, values: jax.Array, direction: jax.Array) -> dict[str, jax.Array]:
    """The four groups of neurons that lower the projection, each bool [N], disjoint.

    before, after: mean activations m [N] of the two models; values [N, D] of one of them. With c = cos(v_i, W), m that
    before and d = before - after: TP- (c > 0, m >= 0, d > 0), TN+ (c > 0, m < 0, d > 0), AP+ (c < 0, m >= 0, d < 0),
    AN- (c < 0, m < 0, d < 0). A member's reduction p_i(before) - p_i(after) is positive.
    """
    towards, fell = cosines(values, direction), before - after
    toxic, anti = (towards > 0) & (fell > 0), (towards < 0) & (fell < 0)
    return dict(zip(GROUPS, (toxic & (before >= 0), toxic & (before < 0), anti & (before >= 0), anti & (before < 0)),
                    strict=True))


def patch(activations: jax.Array, chosen: jax.Array, means: jax.Array) -> jax.Array:
    """activations [..., N] with the chosen neurons (bool [N]) set to means [N] or [..., N] at every position."""
    return jnp.where(_along_last(chosen, activations), _along_last(means, activations), activations)


def scale_keys(keys: jax.Array, chosen: jax.Array, factor: Any) -> jax.Array:
    """The in-projection [D, N] with the chosen neurons' key vectors (its columns, bool [N]) multiplied; not biases."""
    return jnp.where(_along_last(chosen, keys), factor * keys, keys)


def extrapolate(start: Any, aligned: Any, alpha: Any) -> Any:
    """aligned + alpha (aligned - start), every leaf alike, in float32 or wider, back in the leaf's dtype.

    alpha 0 is `aligned`, above 0 extrapolates (ExPO; .1 to .5), -1 is `start`; between -1 and 0 un-aligns by keeping
    the share 1 + alpha of the difference: a soup of the weights -alpha and 1 + alpha.
    """
    def one(s, a):
        wide = lambda x: jnp.asarray(x, jnp.promote_types(jnp.float32, jnp.asarray(x).dtype))
        return (wide(a) + alpha * (wide(a) - wide(s))).astype(jnp.asarray(a).dtype)

    return jax.tree.map(one, start, aligned)
