"""KL divergences: estimators from samples with their standard error, the exact categorical one.

Sample estimators take log_ratio = log p(x) - log q(x) with x drawn from p, and estimate KL(p || q) in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.ops.reductions import masked_mean, weighted_sum_count


class Estimate(NamedTuple):
    """A mean with its standard error and the number of samples behind it; all scalars."""

    mean: jax.Array
    stderr: jax.Array
    count: jax.Array


def k1(log_ratio: jax.Array) -> jax.Array:
    """log p - log q: unbiased, high variance, may be negative. Elementwise."""
    return log_ratio


def k2(log_ratio: jax.Array) -> jax.Array:
    """(log p - log q)^2 / 2: biased, non-negative, low variance. Elementwise."""
    return 0.5 * jnp.square(log_ratio)


def k3(log_ratio: jax.Array) -> jax.Array:
    """q/p - 1 - log(q/p) = expm1(-log_ratio) + log_ratio: unbiased and non-negative. Elementwise.

    Overflows to infinity for log_ratio below about -88 in float32: such a sample carries infinite weight and shows.
    """
    return jnp.expm1(-log_ratio) + log_ratio


def mean_and_stderr(values: jax.Array, weight: Any = 1.0) -> Estimate:
    """Mean over the entries of weight 1, standard error s / sqrt(n) with the sample deviation (n - 1), and n.

    values: any shape. weight: 0 or 1, broadcastable. n < 2 gives a NaN standard error (unknown, not zero).
    """
    mean = masked_mean(values, weight)
    squares, count = weighted_sum_count(jnp.square(values - mean), weight)
    enough = count > 1
    variance = squares / jnp.where(enough, count - 1, 1)
    return Estimate(mean, jnp.where(enough, jnp.sqrt(variance / jnp.where(enough, count, 1)), jnp.nan), count)


def categorical_kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p (log p - log q) over the last axis, exact, nats.

    logp, logq: [..., V] normalised log-probs. Entries with p = 0 (-inf) contribute 0; q = 0 where p > 0 gives inf.
    """
    live = logp > -jnp.inf
    safe = jnp.where(live, logp, 0)
    return jnp.sum(jnp.where(live, jnp.exp(safe) * (safe - jnp.where(live, logq, 0)), 0), -1)
