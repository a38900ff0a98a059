"""Whether a policy ranks its pairs as labelled, whether it could, and whether it ranks by length.

Source of the idealised ranking: arXiv 2405.19534 (in log space, where the released code divides log-likelihoods).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ranking_accuracy(logps: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Share of pairs with log pi(chosen) >= log pi(rejected); logps [B,2]. lengths [B,2] divides both first.

    This is not the accuracy of the margin, which compares log-ratios to the reference.
    """
    values = logps if lengths is None else logps / jnp.maximum(lengths, 1)
    return (values[:, 0] >= values[:, 1]).mean()


def idealised_accuracy(ref_logps: jax.Array, beta: Any, agreement: Any = 0.999) -> jax.Array:
    """The ranking accuracy of the optimum of the regularised objective: the share of pairs with
    log ref(chosen) - log ref(rejected) + log(a / (1 - a)) / beta > 0.

    agreement: a, the share of raters that prefer the chosen one, [B] or a scalar; 1 is taken as 0.999.
    """
    agreement = jnp.minimum(jnp.asarray(agreement, ref_logps.dtype), 0.999)
    shift = (jnp.log(agreement) - jnp.log1p(-agreement)) / beta
    return (ref_logps[:, 0] - ref_logps[:, 1] + shift > 0).mean()


def correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    """Pearson's correlation of two [N]; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = jnp.sqrt((x * x).sum() * (y * y).sum())
    return jnp.where(size > 0, (x * y).sum() / jnp.where(size > 0, size, 1), 0.0)


def numbers(logps: jax.Array, ref_logps: jax.Array, lengths: jax.Array, beta: Any | None) -> dict[str, jax.Array]:
    """Scalars for a log from pairs [B,2]: ranking accuracies of policy and start, the idealised one and the gap to it
    (where the loss has a beta), and the correlation of the margin with the difference of lengths."""
    margin = (logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]
    out = {"ranking": ranking_accuracy(logps), "ranking_per_token": ranking_accuracy(logps, lengths),
           "ranking_at_start": ranking_accuracy(ref_logps), "margin_accuracy": (margin > 0).mean(),
           "length_correlation": correlation(margin, lengths[:, 0] - lengths[:, 1])}
    if beta is not None:
        out["ranking_idealised"] = idealised_accuracy(ref_logps, beta)
        out["alignment_gap"] = out["ranking_idealised"] - out["ranking"]
    return out
