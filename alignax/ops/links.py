"""Links: the scalar functions that turn a margin into a loss, and the log-space helpers around them.

All are elementwise, keep the shape and dtype of their input (float32 or float64), accept traced parameters, and have
finite values and gradients wherever the docstring does not say otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

EXP_CLIP = 80.0
"""Default largest exponent of an exponential link: e^80 is finite in float32 (the limit is e^88)."""


def logistic(m: jax.Array) -> jax.Array:
    """-log sigmoid(m) = softplus(-m); gradient -sigmoid(-m)."""
    return jax.nn.softplus(-m)


def smoothed(m: jax.Array, eps: Any) -> jax.Array:
    """(1 - eps) logistic(m) + eps logistic(-m): labels assumed flipped with probability eps (conservative DPO)."""
    return (1 - eps) * logistic(m) + eps * logistic(-m)


def debiased(m: jax.Array, eps: Any) -> jax.Array:
    """[(1 - eps) logistic(m) - eps logistic(-m)] / (1 - 2 eps): unbiased under flips; eps < 1/2; unbounded below."""
    return ((1 - eps) * logistic(m) - eps * logistic(-m)) / (1 - 2 * eps)


def hinge(m: jax.Array, delta: Any) -> jax.Array:
    """max(0, delta - m); gradient 0 at the kink."""
    return jax.nn.relu(delta - m)


def square(m: jax.Array, c: Any) -> jax.Array:
    """(m - c)^2."""
    return jnp.square(m - c)


def exponential(m: jax.Array, clip: Any = EXP_CLIP) -> jax.Array:
    """e^(-m) where -m <= clip; the constant e^clip with zero gradient where -m > clip."""
    return jnp.exp(jnp.where(-m <= clip, -m, jnp.asarray(clip, m.dtype)))


def exponential_clipped(m: jax.Array, clip: Any = EXP_CLIP) -> jax.Array:
    """bool: where `exponential` is outside its clip, to be counted."""
    return -m > clip


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0.

    log(-expm1(x)) above -log 2, log1p(-e^x) below; each branch sees a safe argument, so that the branch not taken
    leaks no NaN into the gradient. x = 0 gives -inf, x > 0 NaN.
    """
    near = x > -jnp.log(jnp.asarray(2.0, x.dtype))
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, close, far)


def log_odds_from_mean_logp(s: jax.Array) -> jax.Array:
    """log(p / (1 - p)) with p = e^s, s <= 0 a mean log-prob: s - log(1 - e^s); slope 1 / (1 - p).

    s closer to 0 than one machine epsilon of its dtype (1.2e-7 in float32) cannot be told from p = 1, whose odds are
    infinite: there the value is that at -epsilon (about 15.9 in float32) and the gradient 0. s = -1e-6 is inside.
    """
    limit = -jnp.finfo(s.dtype).eps
    inside = jnp.where(s < limit, s, limit)
    return inside - log1mexp(inside)
