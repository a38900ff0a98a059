"""Pointwise and scored-list losses: no difference of two rewards is needed. lr = log pi - log pi_ref, token sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair_log_ratios, valid_log_ratios
from alignax.ops import links
from alignax.ops.reductions import masked_mean, weighted_sum_count
from alignax.types import Array, ConfigError, Term, Terms


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


@method(id="apo:zero_unpaired", system="APO-zero on unpaired data", arxiv="2408.06266", fidelity="official code")
def apo_zero_unpaired(logps: Array, ref_logps: Array, labels: Array, valid: Array, *, beta: Any = 0.1) -> Terms:
    """APO-zero by label: 1 - sigmoid(beta lr) where desirable, sigmoid(beta lr) where not.

    All arrays [B, K]. Returns one term `loss` by sequences over the completions that exist: on a pair half of
    `apo_zero`; KTO with a baseline of 0. Source: arXiv 2408.06266, TRL's `apo_zero_unpaired`.
    """
    ratios = beta * valid_log_ratios(logps, ref_logps, valid)
    values = jax.nn.sigmoid(jnp.where(floats(labels) > 0.5, -ratios, ratios))
    return Terms({"loss": Term(values, valid, "sequences")})


def bco_state() -> dict[str, jax.Array]:
    """Sum and count of BCO's rewards by class, float32 scalars, zero before the first update."""
    return {name: jnp.zeros((), jnp.float32) for name in ("good_sum", "good_count", "bad_sum", "bad_count")}


def bco_shift(rewards: jax.Array, good: jax.Array, valid: jax.Array, state: Any, *,
              pooled: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(delta, new state): the running mean reward, this batch included; a scalar without gradient.

    rewards, good, valid: [B, K]. The mean of the two classes' means, of one where the other was never seen, or with
    `pooled` the mean over all completions. state: as `bco_state`.
    """
    exact = {}  # the state is rounded to float32 when it is kept, not before it is used
    for name, kept in (("good", valid & good), ("bad", valid & ~good)):
        total, count = weighted_sum_count(jax.lax.stop_gradient(rewards), kept)
        exact[f"{name}_sum"], exact[f"{name}_count"] = state[f"{name}_sum"] + total, state[f"{name}_count"] + count
    new_state = {name: value.astype(jnp.float32) for name, value in exact.items()}
    totals = jnp.stack([exact["good_sum"], exact["bad_sum"]])
    counts = jnp.stack([exact["good_count"], exact["bad_count"]])
    seen = counts > 0
    means = jnp.where(seen, totals / jnp.where(seen, counts, 1), 0)
    return masked_mean(means, counts if pooled else seen).astype(rewards.dtype), new_state


@method(id="bco", system="BCO: binary classifier optimisation", arxiv="2404.04656", fidelity="third-party code",
        couples_batch=True, init_state=bco_state)
def bco(logps: Array, ref_logps: Array, labels: Array, valid: Array, weights: Array, state: Any, *, beta: Any = 0.01,
        low_weight: Any = 0.5, high_weight: Any = 10.0, pooled: bool = False) -> Terms:
    """Binary classifier optimisation: sp(-(r - delta)) where desirable, q sp(r - delta) where not, r = beta lr.

    delta = sg[mean of the two classes' running mean rewards], this global batch included; a class that has not been
    seen leaves delta to the other. pooled (static): one running mean over all completions, as TRL keeps it; the same
    where the classes are equally many. q = `weights` held in [low_weight, high_weight]: the ratio p(good | prompt) /
    p(bad | prompt) of underlying-distribution matching, 1 without it.

    logps, ref_logps, labels, valid: [B, K]; weights: [B]; state: four float32 scalars. Returns one term `loss` by
    sequences over the completions that exist, new_state, and the metric `delta`. No gradient through delta.
    Source: arXiv 2404.04656, checked against TRL (beta 0.1 there). Left out: the logistic regression on prompt
    embeddings that gives q.
    """
    valid, good = jnp.asarray(valid, bool), floats(labels) > 0.5
    rewards = beta * valid_log_ratios(logps, ref_logps, valid)
    delta, new_state = bco_shift(rewards, good, valid, state, pooled=pooled)
    ratio = jnp.clip(jax.lax.stop_gradient(floats(weights)), low_weight, high_weight)[:, None]
    values = jnp.where(good, links.logistic(rewards - delta), ratio * links.logistic(delta - rewards))
    one = jnp.ones((), jnp.float32)
    return Terms({"loss": Term(values, valid, "sequences")}, new_state, {"delta": (delta.astype(jnp.float32), one)})


_WIN_RATES = ("given", "list", "others")


@method(id="sppo", system="SPPO: self-play preference optimisation", arxiv="2405.00675", fidelity="official code")
def sppo(logps: Array, ref_logps: Array, scores: Array, valid: Array, *, beta: Any = 0.001,
         win_rates: str = "given") -> Terms:
    """Self-play preference optimisation: (lr - (P - 1/2) / beta)^2, P the win rate against the reference policy.

    win_rates (static): given, P = scores, in [0, 1]; list, P_i = mean over all j of the list, i included, of
    sigmoid(s_i - s_j), s = scores (the authors' estimate from a preference model's scores); others, the same without
    i itself (on a pair their `sppo_single`). All arrays [B, K]. Returns one term `loss` by sequences over the
    completions that exist: on a pair the official half sum. Source: arXiv 2405.00675, uclaml/SPPO. Left out: the
    rounds of sampling, in which the reference is the policy at the round's start.
    """
    if win_rates not in _WIN_RATES:
        raise ConfigError(f"sppo: win_rates = {win_rates!r}; allowed: {', '.join(_WIN_RATES)}")
    valid = jnp.asarray(valid, bool)
    score = jnp.where(valid, jax.lax.stop_gradient(floats(scores)), 0.5)
    if win_rates == "given":
        rate = score
    else:
        other = valid[:, None, :] & (~jnp.eye(score.shape[1], dtype=bool)[None] | (win_rates == "list"))
        count = other.sum(-1)
        wins = jnp.where(other, jax.nn.sigmoid(score[:, :, None] - score[:, None, :]), 0).sum(-1)
        rate = jnp.where(count > 0, wins / jnp.maximum(count, 1), 0.5)
    values = links.square(valid_log_ratios(logps, ref_logps, valid), (rate - 0.5) / beta)
    return Terms({"loss": Term(values, valid, "sequences")})


@method(id="sppo:hard", system="SPPO with hard labels", arxiv="2405.00675", fidelity="third-party code", completions=2)
def sppo_hard(logps: Array, ref_logps: Array, *, beta: Any = 0.001) -> jax.Array:
    """SPPO with win rates 1 and 0: (lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2; [B, 2] -> [B].

    The calibration part of Cal-DPO. Source: TRL's `sppo_hard`, which sums where the official code halves.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    target = 1 / (2 * beta)
    return links.square(chosen, target) + links.square(rejected, -target)
