"""Pointwise and scored-list losses: no difference of two rewards is needed. lr = log pi - log pi_ref, token sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, valid_log_ratios
from alignax.ops import links
from alignax.ops.reductions import masked_mean, weighted_sum_count
from alignax.types import Array, Term, Terms


@method(id="kto", system="KTO", arxiv="2402.01306", fidelity="official code", couples_batch=True)
def kto(logps: Array, ref_logps: Array, labels: Array, valid: Array, kl_logps: Array, kl_ref_logps: Array, *,
        beta: Any = 0.1, desirable_weight: Any = 1.0, undesirable_weight: Any = 1.0) -> Terms:
    """Kahneman-Tversky optimisation.

    z0 = max(0, mean of sg[log pi - log pi_ref] over the mismatched completions of the global batch).
    desirable: w_D (1 - sigmoid(beta (lr - z0))); undesirable: w_U (1 - sigmoid(beta (z0 - lr))).

    All arrays [B, K]; labels 1 or 0 (above 1/2 is desirable); valid: the completions that exist. Returns one term
    `loss` by sequences weighted by `valid` (a mean over examples, whatever their class), and the metric `z0`.
    No gradient through z0 or the reference. Source: arXiv 2402.01306, ContextualAI/HALOs. Left out: choosing the
    class weights from the class counts (keep w_D n_D / (w_U n_U) in [1, 4/3]).
    """
    ratios = valid_log_ratios(logps, ref_logps, valid)
    mismatched = jax.lax.stop_gradient(valid_log_ratios(kl_logps, kl_ref_logps, valid))
    total, count = weighted_sum_count(mismatched, valid)
    z0 = jnp.maximum(masked_mean(mismatched, valid), 0)
    good = desirable_weight * jax.nn.sigmoid(-beta * (ratios - z0))
    bad = undesirable_weight * jax.nn.sigmoid(-beta * (z0 - ratios))
    values = jnp.where(floats(labels) > 0.5, good, bad)
    return Terms({"loss": Term(values, valid, "sequences")}, metrics={"z0": (total, count)})


def _targets(scores: Array, valid: Array, alpha: Any) -> jax.Array:
    """softmax(scores / alpha) over the completions that exist; absent ones get 0."""
    scaled = jnp.where(valid, jax.lax.stop_gradient(floats(scores)), 0) / alpha
    return jax.nn.softmax(scaled, axis=-1, where=valid | ~valid.any(-1, keepdims=True))


@method(id="nca", system="NCA: noise contrastive alignment", arxiv="2402.05369", fidelity="official code")
def nca(logps: Array, ref_logps: Array, scores: Array, valid: Array, *, beta: Any = 0.01,
        alpha: Any = 1e-4) -> jax.Array:
    """Noise contrastive alignment on a scored list: sum_i [q_i sp(-r_i) + sp(r_i) / K], r = beta lr.

    q = softmax(scores / alpha), K the completions that exist. All arrays [B, K]; returns [B], mean over prompts. No
    gradient into scores or reference. Source: arXiv 2402.05369, thu-ml/Noise-Contrastive-Alignment. Left out: that
    code's 0.01 added to the first score to break ties.
    """
    valid = jnp.asarray(valid, bool)
    rewards = beta * valid_log_ratios(logps, ref_logps, valid)
    size = jnp.maximum(valid.sum(-1, keepdims=True), 1)
    values = _targets(scores, valid, alpha) * links.logistic(rewards) + links.logistic(-rewards) / size
    return jnp.where(valid, values, 0).sum(-1)


@method(id="nca:info", system="InfoNCA", arxiv="2402.05369", fidelity="official code")
def info_nca(logps: Array, ref_logps: Array, scores: Array, valid: Array, *, beta: Any = 0.01,
             alpha: Any = 1e-4) -> jax.Array:
    """InfoNCA on a scored list: -sum_i q_i log softmax(beta lr)_i, q = softmax(scores / alpha).

    Shapes, stops and source as `nca`; a one-hot q with K = 2 is DPO.
    """
    valid = jnp.asarray(valid, bool)
    rewards = beta * valid_log_ratios(logps, ref_logps, valid)
    some = valid | ~valid.any(-1, keepdims=True)
    log_softmax = rewards - jax.nn.logsumexp(rewards, axis=-1, keepdims=True, where=some)
    return -jnp.where(valid, _targets(scores, valid, alpha) * log_softmax, 0).sum(-1)


@method(id="npo", system="NPO: negative preference optimisation", arxiv="2404.05868", fidelity="official code",
        kind="loss")
def npo(logps: Array, ref_logps: Array, labels: Array, valid: Array, *, beta: Any = 0.1) -> Terms:
    """Negative preference optimisation: (2 / beta) sp(beta lr) on the completions to forget (label 0).

    All arrays [B, K]. Returns one term `loss` by sequences, weighted by (label 0 and valid); desirable completions
    get no gradient. Source: arXiv 2404.05868 and the authors' TOFU code. Left out: the retain term.
    """
    forget = jnp.asarray(valid, bool) & (floats(labels) <= 0.5)
    values = 2 / beta * links.logistic(-beta * valid_log_ratios(logps, ref_logps, valid))
    return Terms({"loss": Term(values, forget, "sequences")})
