"""Decoding rules: pure functions from logits to logits, in float32.

The distribution that is sampled is softmax of the result, so its log-probs are those of the kept set; whoever trains on
samples needs them (`behaviour_logps`) and the mass that was kept, because truncation multiplies every kept
probability by 1 / mass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alignax.types import Array, ConfigError


def _static_number(value) -> bool:
    """True for a Python number, which can be checked; a traced one cannot."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def apply_temperature(logits: Array, temperature) -> Array:
    """logits [..., V] / temperature in float32 (or wider). temperature: a number or traced scalar > 0; greedy
    decoding (0) is the sampler's own rule, not a division. ConfigError for a static temperature that is not > 0."""
    if _static_number(temperature) and not 0 < temperature < float("inf"):
        raise ConfigError(f"apply_temperature(temperature=): found {temperature}, allowed: a finite number > 0")
    return logits.astype(jnp.promote_types(jnp.float32, logits.dtype)) / temperature


def top_p_filter(logits: Array, p) -> tuple[Array, Array]:
    """Nucleus filter (arXiv 1904.09751): (filtered logits [..., V], kept mass [...]), in float32 (or wider).

    Keeps the smallest set of most probable tokens whose mass reaches p: token i stays iff the mass of those ranked
    before it is below p; equal logits rank by token id. The others become -inf; kept logits are unchanged, and the
    kept mass is the sum of their probabilities before renormalisation. The most probable token always stays. p: a
    number or traced scalar in (0, 1]; at 1 everything stays, exactly, whatever the rounding of the sum, and the mass
    is 1. ConfigError for a static p outside (0, 1].
    """
    if _static_number(p) and not 0 < p <= 1:
        raise ConfigError(f"top_p_filter(p=): found {p}, allowed: a number in (0, 1]")
    logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    if _static_number(p) and p == 1:
        return logits, jnp.ones(logits.shape[:-1], logits.dtype)
    probs = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probs, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(before[..., :1]), before[..., :-1]], axis=-1)
    keep_ranked = (before < p).at[..., 0].set(True) | jnp.asarray(p >= 1).reshape((1,) * logits.ndim)
    keep = jnp.take_along_axis(keep_ranked, jnp.argsort(order, axis=-1), axis=-1)
    mass = jnp.where(p >= 1, 1.0, jnp.minimum(jnp.sum(jnp.where(keep, probs, 0.0), axis=-1), 1.0))
    return jnp.where(keep, logits, -jnp.inf), mass.astype(logits.dtype)
