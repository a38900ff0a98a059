"""Offline reinforcement learning on given completions: values, soft Bellman residuals, advantage-weighted likelihood.

l_t = log pi(y_t) - log pi_ref(y_t); arrays [B, K, L] under `mask` (the action tokens), scores [B, K] the reward of the
completion. sg = no gradient; none flows into the reference, rewards or scores. Which parameters values and Q values
come from is the provider's affair: see `models.token_heads`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, sums, token_sum, valid_log_ratios
from alignax.losses.steps import Order, from_here, next_value, order, ratios, step_sums
from alignax.types import Array, ConfigError, Term, Terms


def _inside(x: Any, mask: jax.Array) -> jax.Array:
    """x [..., L] or [..., L, H] as floats, 0 outside the mask."""
    x = floats(x)
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)


def _oreo(token_logps: Any, ref_token_logps: Any, detached_values: Any, policy_ref_kl: Any, scores: Any, mask: Any,
          found: Order, beta: Any, alpha: Any, value_weight: Any) -> Terms:
    """One residual at the first token of every step of `found`; its gradient is that of all the step's tokens."""
    ratio = beta * ratios(token_logps, ref_token_logps, found.live)
    value = _inside(detached_values, found.live)
    target = jax.lax.stop_gradient(floats(scores))[..., None]
    later = jax.lax.stop_gradient(from_here(ratio))
    own = jnp.take_along_axis(step_sums(ratio, found.rank, found.live), found.rank, -1)
    # The step's own log-ratio with a gradient, the same sum without it for the value.
    policy = jax.lax.stop_gradient(value) - target + own + later - jax.lax.stop_gradient(own)
    critic = value - target + later
    where = found.opens
    return Terms({"policy": Term(jnp.square(policy), where, "seq_mean_token_mean"),
                  "value": Term(jnp.square(critic), where, "seq_mean_token_mean", value_weight),
                  "kl": Term(floats(policy_ref_kl), jnp.asarray(mask, bool), "seq_mean_token_mean", alpha)})


@method(id="oreo", system="OREO: offline reasoning optimisation", arxiv="2412.16145", fidelity="official code")
def oreo(token_logps: Array, ref_token_logps: Array, detached_values: Array, policy_ref_kl: Array, scores: Array,
         mask: Array, *, beta: Any = 0.03, alpha: Any = 0.01, value_weight: Any = 1.0) -> Terms:
    """Soft Bellman residuals per token, R = scores at every t (a terminal reward), beta inside l:

    policy: (sg[V_t] - R + beta l_t + sg[beta sum_{i>t} l_i])^2; value: (V_t - R + sg[beta sum_{i>=t} l_i])^2; kl:
    KL(pi || pi_ref) over the vocabulary. Each is the mean over the tokens of a sequence, then over sequences; scales 1,
    value_weight, alpha. No gradient of the policy term reaches V, none of the value term the policy's log-probs.
    Source: arXiv 2412.16145, jwhj/OREO. Left out: a separate value network (the head here reads the policy's states
    without a gradient into them), rescaled rewards, recollecting data, value-guided search.
    """
    live = jnp.asarray(mask, bool)
    place = jax.lax.broadcasted_iota(jnp.int32, live.shape, live.ndim - 1)
    each = order(place, live)
    return _oreo(token_logps, ref_token_logps, detached_values, policy_ref_kl, scores, mask, each, beta, alpha,
                 value_weight)


@method(id="oreo:step", system="OREO, step variant", arxiv="2412.16145", fidelity="official code")
def oreo_step(token_logps: Array, ref_token_logps: Array, detached_values: Array, policy_ref_kl: Array, scores: Array,
              steps: Array, mask: Array, *, beta: Any = 0.03, alpha: Any = 0.01, value_weight: Any = 1.0) -> Terms:
    """`oreo` with one residual per step: V at the step's first token, gradient through all its tokens, later steps as
    constants; the two residual terms are means over the steps of a sequence. Tokens outside steps enter the KL only.
    Source: as `oreo`."""
    return _oreo(token_logps, ref_token_logps, detached_values, policy_ref_kl, scores, mask, order(steps, mask), beta,
                 alpha, value_weight)


@method(id="oreo:response", system="OREO, response variant", arxiv="2412.16145", fidelity="official code")
def oreo_response(token_logps: Array, ref_token_logps: Array, detached_values: Array, policy_ref_kl: Array,
                  scores: Array, mask: Array, *, beta: Any = 0.03, alpha: Any = 0.01, value_weight: Any = 1.0) -> Terms:
    """`oreo` with the single residual at the first token: V - R + beta l(y), gradient through all tokens.

    At zero loss V = R - beta l(y): for two responses of a prompt l_w - l_l = (R_w - R_l) / beta, DPO's identity.
    Source: as `oreo`.
    """
    one = order(jnp.zeros(jnp.shape(mask), jnp.int32), mask)
    return _oreo(token_logps, ref_token_logps, detached_values, policy_ref_kl, scores, mask, one, beta, alpha,
                 value_weight)


def _expectile(u: jax.Array, tau: Any) -> jax.Array:
    """|tau - 1(u < 0)| u^2."""
    return jnp.where(u < 0, jnp.abs(tau - 1), tau) * jnp.square(u)


@method(id="ilql", system="ILQL: implicit language Q-learning", arxiv="2206.11871", fidelity="official code",
        limits={"expectile": (0.0, 1.0)})
def ilql(token_logps: Array, values: Array, q_values: Array, target_q_values: Array, q_logps: Array,
         token_rewards: Array, mask: Array, *, expectile: Any = 0.7, gamma: Any = 0.99, value_weight: Any = 1.0,
         cql_weight: Any = 1.0, bc_weight: Any = 1.0) -> Terms:
    """Implicit language Q-learning, four means over action tokens:

    q: sum over both heads of (r_t + gamma sg[V(next action state)] - Q_j(s_t, a_t))^2, V = 0 after the last action;
    value: |tau - 1(u < 0)| u^2, u = sg[min_j Q'_j(s_t, a_t)] - V(s_t), tau = expectile; cql: -sum_j log softmax(Q_j)
    at a_t; cloning: -log pi(a_t). Scales 1, value_weight, cql_weight (1e-4 for word games, 1 for dialogue), bc_weight.
    token_logps, values, token_rewards, mask: [B, K, L]; q_values, target_q_values (Q'), q_logps: [B, K, L, 2].
    Acting: log pi + b (min_j Q'_j - V). Source: arXiv 2206.11871, Sea-Snell/Implicit-Language-Q-Learning. Left out:
    separate networks for policy and values, target copies that trail by 0.005 (Q' is whatever the provider gives).
    """
    mask = jnp.asarray(mask, bool)
    value, q = _inside(values, mask), _inside(q_values, mask)
    target = _inside(jax.lax.stop_gradient(token_rewards), mask) + gamma * next_value(
        jax.lax.stop_gradient(value), mask)
    u = _inside(jax.lax.stop_gradient(target_q_values), mask).min(-1) - value
    return Terms({
        "q": Term(jnp.square(target[..., None] - q).sum(-1), mask, "tokens"),
        "value": Term(_expectile(u, expectile), mask, "tokens", value_weight),
        "cql": Term(-floats(q_logps).sum(-1), mask, "tokens", cql_weight),
        "cloning": Term(-floats(token_logps), mask, "tokens", bc_weight),
    })


@method(id="ilql:mc_returns", system="ILQL with Monte-Carlo returns", arxiv="2206.11871", fidelity="third-party code")
def ilql_mc_returns(token_logps: Array, q_values: Array, q_logps: Array, token_rewards: Array, mask: Array, *,
                    gamma: Any = 0.99, cql_weight: Any = 1.0, bc_weight: Any = 1.0) -> Terms:
    """`ilql` with Q regressed on the discounted reward-to-go, without V: terms `q`, `cql`, `cloning`, as there.

    The return of an action is r_t + gamma (return of the next action). Source: abdulhaim/LMRL-Gym.
    """
    mask = jnp.asarray(mask, bool)
    rewards = _inside(jax.lax.stop_gradient(token_rewards), mask)
    gamma = jnp.asarray(gamma, rewards.dtype)

    def back(total, at):
        reward, live = at
        total = jnp.where(live, reward + gamma * total, total)
        return total, total

    first = lambda x: jnp.moveaxis(x, -1, 0)
    _, returns = jax.lax.scan(back, jnp.zeros(rewards.shape[:-1], rewards.dtype), (first(rewards), first(mask)),
                              reverse=True)
    error = jnp.square(jnp.moveaxis(returns, 0, -1)[..., None] - _inside(q_values, mask)).sum(-1)
    return Terms({"q": Term(error, mask, "tokens"), "cql": Term(-floats(q_logps).sum(-1), mask, "tokens", cql_weight),
                  "cloning": Term(-floats(token_logps), mask, "tokens", bc_weight)})


@method(id="imagined_conversations", system="Goal-directed dialogue by offline RL on imagined conversations (ILQL)",
        arxiv="2311.05584", fidelity="reconstruction")
def imagined_conversations(token_logps: Array, values: Array, q_values: Array, target_q_values: Array, q_logps: Array,
                           token_rewards: Array, mask: Array, *, expectile: Any = 0.7, gamma: Any = 0.99,
                           value_weight: Any = 1.0, cql_weight: Any = 1.0, bc_weight: Any = 1.0) -> Terms:
    """`ilql` on synthetic dialogues: the human's turns are observations, not in the mask; the reward is at the end.

    The method is in the data. Source: arXiv 2311.05584, which reuses `ilql`'s losses. Left out: imagining, criticising
    and revising the conversations.
    """
    return ilql(token_logps, values, q_values, target_q_values, q_logps, token_rewards, mask, expectile=expectile,
                gamma=gamma, value_weight=value_weight, cql_weight=cql_weight, bc_weight=bc_weight)


_ADVANTAGES = ("value", "reward")


def _advantage(scores: Any, prompt_values: Any, valid: jax.Array, advantage: str,
               value_weight: Any) -> tuple[jax.Array, Term]:
    """(max(0, A) [B, K] without gradient, the term that fits V to the scores)."""
    if advantage not in _ADVANTAGES:
        raise ConfigError(f"a_lol: advantage = {advantage!r}; allowed: {', '.join(_ADVANTAGES)}")
    score = jnp.where(valid, jax.lax.stop_gradient(floats(scores)), 0)
    value = floats(prompt_values)[:, None]
    base = 0 if advantage == "reward" else jax.lax.stop_gradient(value)
    return jnp.maximum(score - base, 0), Term(jnp.square(value - score), valid, "sequences", value_weight)


def _clipped(log_ratio: jax.Array, eps: Any) -> jax.Array:
    """clip(e^log_ratio, 1 - eps, 1 + eps) without gradient and without overflow."""
    ratio = jnp.exp(jnp.minimum(jax.lax.stop_gradient(log_ratio), jnp.log1p(jnp.asarray(eps, log_ratio.dtype))))
    return jnp.maximum(ratio, 1 - eps)


@method(id="a_lol", system="Advantage-leftover-lunch RL (A-LoL)", arxiv="2305.14718", fidelity="official code")
def a_lol(logps: Array, ref_logps: Array, scores: Array, prompt_values: Array, valid: Array, *, eps: Any = 0.9,
          value_weight: Any = 1.0, advantage: str = "value") -> Terms:
    """Advantage-weighted likelihood of whole responses: -A sg[w] log pi(y), w = clip(pi / pi_ref, 1 - eps, 1 + eps).

    A = max(0, sg[R - V(x)]), R = scores; advantage (static) = reward takes A = max(0, R), the paper's R-LoL. logps,
    ref_logps, scores, valid: [B, K]; prompt_values: [B]. Two terms by sequences over the completions that exist:
    `policy`, and `value` = (V - R)^2 with scale value_weight. The paper fits V before, on the reference's own samples;
    here its head learns beside the policy (0: V as given). Sums over tokens, no length normalisation. Source: arXiv
    2305.14718, abaheti95/LoL-RL. Left out: sampling of records in proportion to A.
    """
    valid = jnp.asarray(valid, bool)
    gain, value = _advantage(scores, prompt_values, valid, advantage, value_weight)
    weight = _clipped(valid_log_ratios(logps, ref_logps, valid), eps)
    values = -gain * weight * jnp.where(valid, sums("logps", logps), 0)
    return Terms({"policy": Term(values, valid, "sequences"), "value": value})


@method(id="a_lol:seq", system="A-LoL with token ratios", arxiv="2305.14718", fidelity="official code")
def a_lol_seq(token_logps: Array, ref_token_logps: Array, scores: Array, prompt_values: Array, mask: Array, *,
              eps: Any = 0.9, value_weight: Any = 1.0, advantage: str = "value") -> Terms:
    """`a_lol` with clipped ratios per token: -A sum_t sg[w_t] log pi(y_t). Token arrays [B, K, L].

    The rest, and the source, as there.
    """
    mask = jnp.asarray(mask, bool)
    gain, value = _advantage(scores, prompt_values, mask.any(-1), advantage, value_weight)
    weight = _clipped(ratios(token_logps, ref_token_logps, mask), eps)
    values = -gain * (weight * _inside(token_logps, mask)).sum(-1)
    return Terms({"policy": Term(values, mask.any(-1), "sequences"), "value": value})


@method(id="a_lol:ref_free", system="A-LoL without a reference", arxiv="2305.14718", fidelity="official code")
def a_lol_ref_free(logps: Array, scores: Array, prompt_values: Array, valid: Array, *, value_weight: Any = 1.0,
                   advantage: str = "value") -> Terms:
    """`a_lol` with w = 1: -A log pi(y). With advantage = reward the paper's weighted behaviour cloning.

    The rest, and the source, as there.
    """
    valid = jnp.asarray(valid, bool)
    gain, value = _advantage(scores, prompt_values, valid, advantage, value_weight)
    values = -gain * jnp.where(valid, sums("logps", logps), 0)
    return Terms({"policy": Term(values, valid, "sequences"), "value": value})


@method(id="a_lol:kl", system="A-LoL with a KL", arxiv="2305.14718", fidelity="official code")
def a_lol_kl(logps: Array, ref_logps: Array, scores: Array, prompt_values: Array, valid: Array, *, kappa: Any = 0.1,
             value_weight: Any = 1.0, advantage: str = "value") -> Terms:
    """`a_lol` with w = 1 and kappa (log pi - log pi_ref) added: the gradient is -(A - kappa) grad log pi.

    Three terms by sequences: `policy`, `kl` with scale kappa (tunable in the paper; the default is ours), `value`.
    Source: as `a_lol`.
    """
    valid = jnp.asarray(valid, bool)
    gain, value = _advantage(scores, prompt_values, valid, advantage, value_weight)
    values = -gain * jnp.where(valid, sums("logps", logps), 0)
    return Terms({"policy": Term(values, valid, "sequences"),
                  "kl": Term(valid_log_ratios(logps, ref_logps, valid), valid, "sequences", kappa), "value": value})


@method(id="a_lol:gold", system="Reward-GOLD, the baseline of A-LoL", arxiv="2305.14718", fidelity="official code")
def a_lol_gold(token_logps: Array, scores: Array, mask: Array, *, floor: Any = 0.1) -> Terms:
    """Reward-weighted GOLD: -R sum_t sg[max(pi_t, floor)] log pi(y_t), R = scores; mean over sequences with tokens.

    token_logps, mask: [B, K, L]; scores: [B, K]. One term `policy`. Source: as `a_lol`.
    """
    mask = jnp.asarray(mask, bool)
    logps = _inside(token_logps, mask)
    weight = jnp.maximum(jnp.exp(jax.lax.stop_gradient(logps)), floor)
    some = mask.any(-1)
    reward = jnp.where(some, jax.lax.stop_gradient(floats(scores)), 0)
    return Terms({"policy": Term(-reward * token_sum(weight * logps, mask), some, "sequences")})
