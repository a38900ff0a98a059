"""Reward models of other forms: a log-ratio as reward, a head trained beside the policy, contrastive features.

lr = log pi - log pi_ref, token sums; sp = softplus. No gradient into the reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, pair_log_ratios, valid_log_ratios
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


@method(id="implicit_prm", system="Free process rewards from outcome labels, cross-entropy form", arxiv="2412.01981",
        fidelity="official code", kind="reward")
def implicit_prm(logps: Array, ref_logps: Array, labels: Array, valid: Array, *, beta: Any = 0.05) -> Terms:
    """Cross-entropy of the implicit reward r = beta lr on right (1) and wrong (0) responses: c sp(-r) + (1 - c) sp(r).

    All arrays [B, K]; one term `loss` by sequences over the completions that exist. dL/dr = sigmoid(r) - c. The
    trained model gives process rewards without process labels: a step's is beta times the sum of its tokens'
    log-ratios. Source: arXiv 2412.01981, PRIME-RL/ImplicitPRM.
    """
    reward = beta * valid_log_ratios(logps, ref_logps, valid)
    right = jnp.where(jnp.asarray(valid, bool), jax.lax.stop_gradient(floats(labels)), 0)
    values = right * links.logistic(reward) + (1 - right) * links.logistic(-reward)
    return Terms({"loss": Term(values, valid, "sequences")})


@method(id="implicit_prm:dpo", system="Free process rewards from outcome labels, DPO form", arxiv="2412.01981",
        fidelity="official code", kind="reward", completions=2)
def implicit_prm_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.05) -> jax.Array:
    """`implicit_prm` on pairs of a right and a wrong response: sp(-beta (lr_w - lr_l)); [B, 2] -> [B]. Source there."""
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.logistic(beta * (chosen - rejected))


_FORMS = ("separable", "contrastive")


@method(id="dph", system="Direct preference heads", arxiv="2405.20053", fidelity="official code", kind="reward",
        completions=2, limits={"label_smoothing": (0.0, 1.0), "head_smoothing": (0.0, 1.0)})
def dph(logps: Array, ref_logps: Array, rewards: Array, *, beta: Any = 0.1, label_smoothing: Any = 0.1,
        head_smoothing: Any = 0.1, head_weight: Any = 1.0, policy_weight: Any = 1.0, form: str = "separable") -> Terms:
    """A reward head and label-smoothed DPO together, e = head_smoothing:

    separable: (1 - e) sp(-r_w) + e sp(r_w) + (1 - e) sp(r_l) + e sp(-r_l); contrastive (form, static):
    (1 - e) sp(-(r_w - r_l)) + e sp(r_w - r_l). All arrays [B, 2]. Two terms by pairs: `head` with scale head_weight and
    `policy`, conservative DPO with label_smoothing, with scale policy_weight. The head's gradient reaches the trunk.
    Source: arXiv 2405.20053, Avelina9X/direct-preference-heads. Left out: the pooling layers before the head (its
    identity pooler is used), decay of the trunk towards its start. Raises ConfigError for another form.
    """
    if form not in _FORMS:
        raise ConfigError(f"dph: form = {form!r}; allowed: {', '.join(_FORMS)}")
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    better, worse = pair("rewards", floats(rewards))
    if form == "separable":
        head = links.smoothed(better, head_smoothing) + links.smoothed(-worse, head_smoothing)
    else:
        head = links.smoothed(better - worse, head_smoothing)
    policy = links.smoothed(beta * (chosen - rejected), label_smoothing)
    return Terms({"head": Term(head, scale=head_weight), "policy": Term(policy, scale=policy_weight)})


def _cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    """[B, n, D], [B, m, D] -> [B, n, m]; 0 beside a zero vector."""
    square = jnp.square(a).sum(-1)[:, :, None] * jnp.square(b).sum(-1)[:, None, :]
    some = square > 0
    return jnp.where(some, jnp.einsum("bnd,bmd->bnm", a, b) / jnp.sqrt(jnp.where(some, square, 1)), 0)


@method(id="goal_conditioned_rm", system="Goal-conditioned contrastive reward representations", arxiv="2407.13887",
        fidelity="official code", kind="reward", completions=2)
def goal_conditioned_rm(rewards: Array, hidden: Array, mask: Array, ids: Array, key: jax.Array, *,
                        contrast_weight: Any = 0.5, samples: int = 16, mean_goal: bool = False) -> Terms:
    """Bradley-Terry with contrastive states: sp(-(r_w - r_l)) + w (-log p - log(1 - q)).

    p: mean of sigmoid(cos(h_source, h_goal)) over the n x n grid of n = samples pairs of places in the chosen response,
    the source before the goal in each pair; q: the same of n places in the chosen and n in the rejected response. As in
    the code the logarithm is that of the mean. mean_goal (static): one goal, the goals' mean. rewards: [B, 2]; hidden:
    [B, 2, L, D], the state that predicts each token; mask: [B, 2, L]; draws are folded from key and ids [B]. Two terms
    by pairs, `preference` and `contrast` with scale w = contrast_weight; a pair with an empty response adds nothing to
    the latter. Source: arXiv 2407.13887, vaskarnathscale/goal-conditioned-rm. Left out: bounds on the places, filtering
    and re-ranking by the mean goal.
    """
    chosen, rejected = pair("rewards", floats(rewards))
    mask = jnp.asarray(mask, bool)
    state, worse = pair("hidden", jnp.where(mask[..., None], floats(hidden), 0))
    good, bad = pair("mask", mask)

    def draw(number: jax.Array, good: jax.Array, bad: jax.Array) -> tuple[jax.Array, ...]:
        """Places of sources, goals, further sources, and places in the rejected response, [n] each."""
        u = jax.random.uniform(jax.random.fold_in(key, number), (4, samples))
        spread = lambda u, count: jnp.minimum((u * count).astype(jnp.int32), jnp.maximum(count - 1, 0))
        n, m = good.sum(), bad.sum()
        one = spread(u[0], n)
        two = spread(u[1], n - 1)
        two = jnp.minimum(jnp.where(two >= one, two + 1, two), jnp.maximum(n - 1, 0))  # another place, if there is one
        slots, other = jnp.argsort(~good, stable=True), jnp.argsort(~bad, stable=True)
        return (slots[jnp.minimum(one, two)], slots[jnp.maximum(one, two)], slots[spread(u[2], n)],
                other[spread(u[3], m)])

    sources, goals, further, negatives = jax.vmap(draw)(jnp.asarray(ids), good, bad)
    take = lambda x, places: jnp.take_along_axis(x, places[..., None], 1)
    goal = take(state, goals)
    goal = goal.mean(1, keepdims=True) if mean_goal else goal
    p = jax.nn.sigmoid(_cosines(take(state, sources), goal)).mean((1, 2))
    q = jax.nn.sigmoid(_cosines(take(state, further), take(worse, negatives))).mean((1, 2))
    both = good.any(-1) & bad.any(-1)
    return Terms({"preference": Term(links.logistic(chosen - rejected)),
                  "contrast": Term(-jnp.log(p) - jnp.log1p(-q), both, scale=contrast_weight)})
