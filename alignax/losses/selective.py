"""Pairs whose log-probs run over some of the tokens, or over tokens with a weight or a bound. [B, 2, L] arrays.

lr_t = log pi(y_t) - log pi_ref(y_t); n = scored tokens; sp = softplus. No gradient into the reference or through a
choice of tokens; every function returns [B] unless it says otherwise, reduced by the mean over pairs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, per_token, token_sum
from alignax.ops import links
from alignax.types import Array, Term, Terms


def _ratios(token_logps: Any, ref_token_logps: Any, mask: jax.Array) -> jax.Array:
    """lr_t, 0 outside the mask."""
    reference = jax.lax.stop_gradient(jnp.where(mask, floats(ref_token_logps), 0))
    return jnp.where(mask, floats(token_logps), 0) - reference


def _shorter(mask: jax.Array) -> jax.Array:
    """Tokens of the shorter completion of each pair, [B, 1, 1]."""
    return mask.sum(-1).min(-1)[:, None, None]


def _logistic(beta: Any, sequences: jax.Array) -> jax.Array:
    chosen, rejected = pair("token_logps", sequences)
    return links.logistic(beta * (chosen - rejected))


@method(id="ld_dpo", system="LD-DPO: length-desensitised DPO", arxiv="2409.06411", fidelity="third-party code",
        completions=2)
def ld_dpo(token_logps: Array, ref_token_logps: Array, mask: Array, *, beta: Any = 0.1, alpha: Any = 0.5) -> jax.Array:
    """Length-desensitised DPO: tokens beyond the shorter answer's length count alpha in [0, 1] instead of 1.

    sp(-beta (lr'_w - lr'_l)), lr' = sum of lr_t over the first min(n_w, n_l) tokens + alpha times the rest.
    Source: arXiv 2409.06411, TRL's `ld_alpha` (the paper tunes alpha in 0.1 to 0.9).
    """
    mask = jnp.asarray(mask, bool)
    head = jnp.cumsum(mask, -1) <= _shorter(mask)
    ratios = _ratios(token_logps, ref_token_logps, mask)
    return _logistic(beta, jnp.where(head, ratios, alpha * ratios).sum(-1))


@method(id="sampo", system="SamPO: down-sampled KL", arxiv="2406.10957", fidelity="official code", completions=2)
def sampo(token_logps: Array, ref_token_logps: Array, mask: Array, ids: Array, key: jax.Array, *, beta: Any = 0.1,
          independent: bool = False) -> jax.Array:
    """Down-sampled DPO: sp(-beta (lr'_w - lr'_l)), lr' over min(n_w, n_l) positions drawn without replacement.

    The shorter answer keeps all its tokens. Policy and reference use the same positions; independent (static): each
    draws its own, as the official code does. Draws are folded from key and ids [B], so that they do not depend on the
    place in the batch. Source: arXiv 2406.10957, LuJunru/SamPO. Left out: the refreshed reference of Iterative SamPO.
    """
    mask = jnp.asarray(mask, bool)

    def drawn(number):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), number))(jnp.asarray(ids))
        noise = jax.vmap(lambda k: jax.random.uniform(k, mask.shape[1:]))(keys)
        order = jnp.argsort(jnp.where(mask, noise, jnp.inf), axis=-1)
        return mask & (jnp.argsort(order, axis=-1) < _shorter(mask))

    ours = drawn(0)
    theirs = drawn(1) if independent else ours
    sequences = token_sum(token_logps, ours) - jax.lax.stop_gradient(token_sum(ref_token_logps, theirs))
    return _logistic(beta, sequences)


def _unsure(token_logps: Any, mask: jax.Array) -> jax.Array:
    """bool [B, 2, L]: tokens less likely than the mean probability of their completion."""
    logps = jax.lax.stop_gradient(jnp.where(mask, floats(token_logps), 0))
    some = mask | ~mask.any(-1, keepdims=True)
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(logps.dtype)
    threshold = jax.nn.logsumexp(logps, axis=-1, where=some, keepdims=True) - jnp.log(count)
    # Equal probabilities must not fall below their own mean by rounding.
    slack = 8 * jnp.finfo(logps.dtype).eps * (1 + jnp.abs(threshold))
    return mask & (logps < threshold - slack)


@method(id="conf_po", system="ConfPO: confidence-critical tokens", arxiv="2506.08712", fidelity="official code",
        completions=2)
def conf_po(token_logps: Array, mask: Array, *, beta: Any = 2.0, gamma: Any = 0.5) -> jax.Array:
    """SimPO over unsure tokens: sp(-(beta (C_w - C_l) - gamma)), C the mean log-prob of the tokens below a threshold.

    The threshold of a completion is its mean token probability. No gradient through the choice; a pair with a
    completion where no token is below costs 0 and stays in the mean. token_logps, mask: [B, 2, L].
    Source: arXiv 2506.08712, hee-suk-yoon/ConfPO.
    """
    mask = jnp.asarray(mask, bool)
    unsure = _unsure(token_logps, mask)
    chosen, rejected = pair("token_logps", per_token(token_sum(token_logps, unsure), unsure.sum(-1)))
    values = links.logistic(beta * (chosen - rejected) - gamma)
    return jnp.where(unsure.any(-1).all(-1), values, 0)


@method(id="conf_po:dpo", system="ConfPO on DPO", arxiv="2506.08712", fidelity="official code", completions=2)
def conf_po_dpo(token_logps: Array, ref_token_logps: Array, mask: Array, *, beta: Any = 0.1) -> jax.Array:
    """DPO over unsure tokens: the sums of policy and reference over the tokens that `conf_po` keeps; source there."""
    mask = jnp.asarray(mask, bool)
    unsure = _unsure(token_logps, mask)
    values = _logistic(beta, token_sum(_ratios(token_logps, ref_token_logps, mask), unsure))
    return jnp.where(unsure.any(-1).all(-1), values, 0)


@method(id="humanline", system="Humanline: token clipping and reference syncing", arxiv="2509.24207",
        fidelity="official code", completions=2)
def humanline(token_logps: Array, ref_token_logps: Array, mask: Array, *, beta: Any = 0.1, log_low: Any = -1.0,
              log_high: Any = 1.5) -> Terms:
    """Humanline DPO: lr_t clipped to [log_low, log_high] per token, gradient 0 outside, then DPO on the sums.

    token_logps, ref_token_logps, mask: [B, 2, L]. One term `loss` by pairs, and the metric `unclipped`: the share of
    tokens with lr_t other than 0 inside the bounds. Source: arXiv 2509.24207, ContextualAI/HALOs. Left out: syncing
    the reference one step behind the policy; the other losses that the clipping goes with.
    """
    mask = jnp.asarray(mask, bool)
    ratios = _ratios(token_logps, ref_token_logps, mask)
    inside = mask & (ratios > log_low) & (ratios < log_high) & (ratios != 0)
    values = _logistic(beta, jnp.clip(ratios, log_low, log_high).sum(-1))
    count = (inside.sum().astype(jnp.float32), mask.sum().astype(jnp.float32))
    return Terms({"loss": Term(values)}, metrics={"unclipped": count})


@method(id="prior_exam_suppression",
        system="Suppressing unwanted spans by DPO (hallucinated prior exams; weighted-token variant)",
        arxiv="2406.06496", fidelity="reconstruction", completions=2)
def span_dpo(token_logps: Array, ref_token_logps: Array, diff: Array, mask: Array, *, beta: Any = 0.1,
             gamma: Any = 0.5) -> jax.Array:
    """DPO with edited spans at full weight and the other tokens at gamma in [0, 1].

    sp(-beta (lr'_w - lr'_l)), lr' = sum_t [u_t + gamma (1 - u_t)] lr_t, u = diff: tokens of the unwanted span in the
    rejected text, inserted ones in the chosen. All arrays [B, 2, L]. Source: arXiv 2406.06496 (abstract); the
    weighting is our statement, gamma one of the values by recall (1, 0.5, 0). Left out: finding and editing spans.
    """
    mask = jnp.asarray(mask, bool)
    ratios = _ratios(token_logps, ref_token_logps, mask)
    return _logistic(beta, jnp.where(jnp.asarray(diff, bool), ratios, gamma * ratios).sum(-1))


@method(id="dft", system="DFT: dynamic fine-tuning (probability-weighted SFT)", arxiv="2508.05629",
        fidelity="third-party code", chosen_only=True)
def dft(token_logps: Array, mask: Array) -> Terms:
    """Dynamic fine-tuning: -sg[pi(y_t)] log pi(y_t), token mean; the gradient is that of -pi(y_t).

    token_logps, mask: [B, K, L]. One term `nll` by tokens. Source: arXiv 2508.05629, TRL.
    """
    logps = jnp.where(jnp.asarray(mask, bool), floats(token_logps), 0)
    return Terms({"nll": Term(-jax.lax.stop_gradient(jnp.exp(logps)) * logps, mask, "tokens")})
