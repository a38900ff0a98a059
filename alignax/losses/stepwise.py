"""Preferences about steps, turns and segments of a response.

l_t = log pi(y_t) - log pi_ref(y_t); l(..) = its sum over the tokens named; sp = softplus. Arrays [B, K, L] (pairs:
K = 2); steps: the step or turn of each token, -1 outside. Sums over tokens; no gradient into the reference. Functions
return [B], reduced by the mean over pairs, unless they say otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, pair_log_ratios, sums
from alignax.losses.listwise import _better, _constants, _lambda_weights
from alignax.losses.pointwise import kto
from alignax.losses.steps import Order, order, ratios, step_sums
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _logistic(beta: Any, sequences: jax.Array) -> jax.Array:
    chosen, rejected = pair("token_logps", sequences)
    return links.logistic(beta * (chosen - rejected))


def _shared_steps(found: Order, targets: Any) -> jax.Array:
    """int32 [B, 1, 1]: how many steps a pair begins with in common; all of them where nothing differs."""
    one, two = pair("steps", found.live)
    first, second = pair("targets", jnp.asarray(targets))
    differs = (one != two) | (one & two & (first != second))
    place = jnp.argmax(differs, -1)[:, None, None]
    at = jnp.where(found.live, found.rank, found.rank.shape[-1])
    # Where one text has ended, or lies outside its steps, the other says which step it is.
    shared = jnp.take_along_axis(at, jnp.broadcast_to(place, at.shape[:2] + (1,)), -1).min(1, keepdims=True)
    return jnp.where(differs.any(-1)[:, None, None], shared, found.rank.shape[-1])


@method(id="step_dpo", system="Step-DPO", arxiv="2406.18629", fidelity="official code", completions=2)
def step_dpo(token_logps: Array, ref_token_logps: Array, steps: Array, targets: Array, mask: Array, *,
             beta: Any = 0.4) -> jax.Array:
    """Step-wise DPO: sp(-beta (l(s_w) - l(s_l))), s the first step in which the two responses differ.

    Earlier steps are shared and later ones do not count, so that data whose prompt holds the correct steps and whose
    completions are one step each give the same. token_logps, ref_token_logps, steps, targets (ids), mask: [B, 2, L].
    Source: arXiv 2406.18629, dvlab-research/Step-DPO (scripts: 0.5 for 7B). Left out: that no end token follows a step,
    which is the data's affair; finding the wrong step and sampling its correction.
    """
    found = order(steps, mask)
    kept = found.live & (found.rank == _shared_steps(found, targets))
    return _logistic(beta, ratios(token_logps, ref_token_logps, kept).sum(-1))


@method(id="scdpo", system="Step-controlled DPO", arxiv="2407.00782", fidelity="official code", completions=2)
def scdpo(token_logps: Array, ref_token_logps: Array, steps: Array, targets: Array, mask: Array, *,
          beta: Any = 0.1) -> jax.Array:
    """Step-controlled DPO: sp(-beta (l(rest of y_w) - l(rest of y_l))), the rest all that follows the shared steps.

    A pair that shares no step is ordinary DPO, so that the step-controlled and the plain pairs may be shuffled
    together. Arrays as `step_dpo`. Source: arXiv 2407.00782, mathllm/Step-Controlled_DPO. Left out: sampling the wrong
    continuation at a rising temperature.
    """
    found = order(steps, mask)
    kept = found.live & (found.rank >= _shared_steps(found, targets))
    return _logistic(beta, ratios(token_logps, ref_token_logps, kept).sum(-1))


_MARGINS = ("hinge", "logistic")


@method(id="svpo", system="Step-level value preference optimisation", arxiv="2406.10858", fidelity="reconstruction",
        completions=2)
def svpo(logps: Array, ref_logps: Array, rewards: Array, scores: Array, *, beta: Any = 0.1, value_weight: Any = 1.0,
         margin_weight: Any = 1.0, margin: Any = 0.0, link: str = "hinge") -> Terms:
    """Step DPO on sibling steps with a value head: three terms by pairs.

    `preference` sp(-beta (lr_w - lr_l)); `value` mean over the two of (V - Q)^2, scale value_weight; `margin`
    max(0, margin - (V_w - V_l)) or, link (static) = logistic, sp(margin - (V_w - V_l)), scale margin_weight.
    V = tanh(rewards), the head at the last token of the step, Q = scores in [-1, 1] from the search, all [B, 2]; the
    siblings are the completions of a prompt that holds their parents. Gradients: the value terms reach the trunk.
    Source: arXiv 2406.10858; search and value regression from MARIO-Math-Reasoning/Super_MARIO. That the value is
    trained by a squared error and a margin is published; the margin's form and all weights are ours. Left out: the tree
    search, likelihood on correct paths. Raises ConfigError for another link.
    """
    if link not in _MARGINS:
        raise ConfigError(f"svpo: link = {link!r}; allowed: {', '.join(_MARGINS)}")
    ratio, other = pair_log_ratios(logps, ref_logps)
    value = jnp.tanh(floats(rewards))
    better, worse = pair("rewards", value)
    gap = better - worse
    ordering = links.hinge(gap, margin) if link == "hinge" else links.logistic(gap - margin)
    squared = jnp.square(value - jax.lax.stop_gradient(floats(scores))).mean(-1)
    return Terms({"preference": Term(links.logistic(beta * (ratio - other))),
                  "value": Term(squared, scale=value_weight), "margin": Term(ordering, scale=margin_weight)})


_UNEQUAL = ("drop", "truncate")


@method(id="sdpo", system="Segment-level DPO", arxiv="2501.01821", fidelity="official code", completions=2)
def sdpo(token_logps: Array, ref_token_logps: Array, steps: Array, mask: Array, *, beta: Any = 0.1,
         unequal: str = "drop") -> Terms:
    """Segment-level DPO for dialogues: sp(-beta sum over turns of (l of the turn in y_w - l of the turn in y_l)).

    The segment is the turns that `steps` names (>= 0); both sides must have equally many, since only then do the
    partition terms cancel. unequal (static): drop leaves a pair with unequal counts out of the mean; truncate keeps the
    leading turns that both have, as the released code does. Arrays [B, 2, L]. One term `loss` by pairs and the metric
    `equal_turns`, the share of pairs that need neither. Turns before the segment that both share cancel, masked or not.
    Source: arXiv 2501.01821, AlibabaResearch/DAMO-ConvAI. Left out: choosing the segment. Raises ConfigError for
    another value of unequal.
    """
    if unequal not in _UNEQUAL:
        raise ConfigError(f"sdpo: unequal = {unequal!r}; allowed: {', '.join(_UNEQUAL)}")
    found = order(steps, mask)
    one, two = pair("steps", found.count)
    equal = (one == two).astype(jnp.float32)
    kept = found.live & (found.rank < jnp.minimum(one, two)[:, None, None])
    values = _logistic(beta, ratios(token_logps, ref_token_logps, kept).sum(-1))
    metrics = {"equal_turns": (equal.sum(), jnp.asarray(equal.shape[0], jnp.float32))}
    return Terms({"loss": Term(values, equal if unequal == "drop" else 1.0)}, metrics=metrics)


@method(id="dmpo", system="Direct multi-turn preference optimisation", arxiv="2406.14868", fidelity="official code",
        completions=2, limits={"gamma": (0.0, 1.0)})
def dmpo(token_logps: Array, ref_token_logps: Array, steps: Array, mask: Array, *, beta: Any = 0.1, gamma: Any = 0.7,
         phi_leading_discount: bool = True) -> jax.Array:
    """Multi-turn DPO with discounted turns: sp(-beta (sum_t phi(t, T_w) l_t^w - sum_t phi(t, T_l) l_t^l)).

    l_t: sum over the tokens of turn t; T: turns of the trajectory; phi(t, T) = gamma^t (1 - gamma^(T-t)) / (1 -
    gamma^T), at gamma = 1 (T - t) / T. phi_leading_discount (static) = False drops gamma^t, the form printed in the
    paper as arXiv 2501.01821 restates it. T = 1 is DPO, gamma = 0 DPO on the first turn. Arrays [B, 2, L]; steps holds
    the agent's turns. Source: arXiv 2406.14868, swt-user/DMPO. Left out: the collection of trajectories.
    """
    found = order(steps, mask)
    ratio = ratios(token_logps, ref_token_logps, found.live)
    size = ratio.shape[-1]
    powers = jnp.asarray(gamma, ratio.dtype) ** jnp.arange(size, dtype=ratio.dtype)
    # 1 + gamma + ... + gamma^(n-1): (1 - gamma^n) / (1 - gamma) without the singularity at 1.
    series = jnp.concatenate([jnp.zeros((1,), ratio.dtype), jnp.cumsum(powers)])
    count = found.count[..., None]
    left = jnp.where(found.live, count - found.rank, 0)
    phi = series[left] / series[jnp.maximum(count, 1)]
    phi = phi * powers[found.rank] if phi_leading_discount else phi
    return _logistic(beta, (phi * ratio).sum(-1))


@method(id="multi_turn_dpo", system="Multi-turn iterative preference learning (M-DPO)", arxiv="2409.02392",
        fidelity="official code", completions=2)
def multi_turn_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, nll_weight: Any = 0.0) -> Terms:
    """Multi-turn DPO: sp(-beta (l(tau_w) - l(tau_l))), l over the agent's tokens of all turns.

    logps, ref_logps: [B, 2], sums over scored tokens: what tools and users wrote is not scored. Two terms by pairs:
    `preference`, and `nll` = -S of the chosen trajectory with scale nll_weight (0: full supervised tuning came first).
    Source: arXiv 2409.02392 and the authors' code. Left out: the iterations, whose reference is each one's start.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return Terms({"preference": Term(links.logistic(beta * (chosen - rejected))),
                  "nll": Term(-pair("logps", sums("logps", logps))[0], scale=nll_weight)})


@method(id="multi_turn_dpo:kto", system="Multi-turn iterative preference learning (M-KTO)", arxiv="2409.02392",
        fidelity="official code", couples_batch=True)
def m_kto(logps: Array, ref_logps: Array, labels: Array, valid: Array, kl_logps: Array, kl_ref_logps: Array, *,
          beta: Any = 0.1, desirable_weight: Any = 1.0, undesirable_weight: Any = 1.0) -> Terms:
    """Multi-turn KTO: `kto` on sums over the agent's tokens, labels by the final answer; terms and shapes there.

    beta enters once, as in the code (the print has it inside and outside); z0 is that code's batch estimate, the
    paper's is the expected KL over turns of the policy's own trajectories. Source: arXiv 2409.02392.
    """
    return kto(logps, ref_logps, labels, valid, kl_logps, kl_ref_logps, beta=beta, desirable_weight=desirable_weight,
               undesirable_weight=undesirable_weight)


@method(id="per_step_advantage", system="RL on incorrect synthetic data: per-step advantage weighting",
        arxiv="2406.14532", fidelity="reconstruction")
def per_step_advantage(token_logps: Array, advantages: Array, mask: Array, *, beta: Any = 1.0,
                       max_log_weight: Any = 10.0) -> Terms:
    """Per-step advantage-weighted likelihood: -sum_t exp(A_t / beta) log pi(y_t), A_t that of the step of token t.

    All arrays [B, K, L]. One term `loss`, the sum over tokens, mean over sequences that have tokens. The exponent is
    held at max_log_weight (ours), counted in the metric `clipped`. A = 0 or beta to infinity: likelihood of the
    samples. No gradient into A. Source: arXiv 2406.14532 through notes of its Eq. 4; the exponential weight by recall;
    beta is ours. Left out: the rollouts that estimate A; their other form is DPO on pairs with a shared prefix
    (`scdpo`, `step_dpo`).
    """
    mask = jnp.asarray(mask, bool)
    exponent = jnp.where(mask, jax.lax.stop_gradient(floats(advantages)), 0) / beta
    weight = jnp.exp(jnp.minimum(exponent, max_log_weight))
    values = -(weight * jnp.where(mask, floats(token_logps), 0)).sum(-1)
    clipped = ((exponent > max_log_weight) & mask).sum().astype(jnp.float32)
    return Terms({"loss": Term(values, mask.any(-1), "sequences")},
                 metrics={"clipped": (clipped, mask.sum().astype(jnp.float32))})


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis; 0 with no gradient for a zero vector."""
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, x / jnp.sqrt(jnp.where(some, square, 1)), 0)


@method(id="tpo_tree", system="TPO: tree preference optimisation with adaptive step reward", arxiv="2410.12854",
        fidelity="paper")
def tpo_tree(token_logps: Array, ref_token_logps: Array, hidden: Array, steps: Array, scores: Array, mask: Array,
             valid: Array, *, beta: Any = 0.5) -> Terms:
    """Tree preference optimisation: sum over v_i > v_j of lam_ij sp(-RM_ij), mean over prompts.

    lam_ij = |2^v_i - 2^v_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|, tau the rank by beta l (1 best), v = scores in
    [0, 1]; RM_ij = sum_k (1 + cos(e_ik, e_jk)) beta (l(s_ik) - l(s_jk)), steps paired by their number, e the mean of
    `hidden` over a step's tokens. Steps that only one of the two has enter with factor 1. No gradient through lam or e.
    token_logps, ref_token_logps, steps, mask: [B, K, L]; hidden: [B, K, L, D]; scores, valid: [B, K]. One term `loss`.
    Source: arXiv 2410.12854 (the published code does not compute it). The print lacks the brackets around the
    difference; the text requires them. The leftover steps are ours. Left out: the tree and the judge that scores it.
    """
    valid = jnp.asarray(valid, bool)
    found = order(steps, jnp.asarray(mask, bool) & valid[..., None])
    ratio = beta * ratios(token_logps, ref_token_logps, found.live)
    rewards = step_sums(ratio, found.rank, found.live)
    # The direction of a mean is that of the sum.
    places = _unit(step_sums(jax.lax.stop_gradient(floats(hidden)), found.rank, found.live))
    cosine = jnp.einsum("bisd,bjsd->bijs", places, places)
    gap = rewards[:, :, None, :] - rewards[:, None, :, :]
    margin = ((1 + cosine) * gap).sum(-1)
    score = _constants(scores, valid)
    weight = _lambda_weights(ratio.sum(-1), score, valid)
    values = jnp.where(_better(score, valid), weight * links.logistic(margin), 0)
    return Terms({"loss": Term(values.sum((1, 2)))})
