"""Penalties on the size of logits, unreduced: they keep a softmax from drifting, since adding a constant to all logits
changes no probability."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def max_z(max_logit: jax.Array, *, weight: Any = 2e-4) -> jax.Array:
    """weight * (max_v logit_v)^2, any shape; Baichuan 2 (arXiv 2309.10305), with its weight.

    max_logit: the statistic `max_logit` of the head, [B,K,L]. The caller takes the mean over scored tokens (the
    published code takes it over all positions, padding included).
    """
    return weight * jnp.square(_wide(max_logit))


def z_loss(log_z: jax.Array, *, weight: Any = 1e-4) -> jax.Array:
    """weight * (log sum_v exp logit_v)^2, any shape; PaLM (arXiv 2204.02311), with its weight.

    log_z: the statistic `log_z` of the head, [B,K,L]. The caller takes the mean over scored tokens.
    """
    return weight * jnp.square(_wide(log_z))
