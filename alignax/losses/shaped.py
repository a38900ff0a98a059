"""Pairs against a reference: further reward shapes, links, penalties and batch aggregations.

lr = S - R, D = lr(chosen) - lr(rejected), sp = softplus. Every function takes [B, 2] sums, stops the gradient at the
reference and at scores, and returns [B] unless it says otherwise; the reduction is the mean over pairs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, log_ratios, pair, pair_log_ratios, pair_sums, per_token
from alignax.losses.pointwise import bco_shift, bco_state
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _one_of(method_name: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{method_name}: {key} = {value!r}; allowed: {', '.join(allowed)}")


def _clipped(ratios: jax.Array, clip: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    over = links.exponential_clipped(ratios, clip)
    return {"clipped": (over.sum().astype(jnp.float32), jnp.float32(over.size))}


@method(id="chi_po", system="chiPO: chi-squared preference optimisation", arxiv="2407.13399",
        fidelity="third-party code", completions=2)
def chi_po(logps: Array, ref_logps: Array, *, beta: Any = 0.1, mix: Any = 1.0, reward_bound: Any = 1e6,
           clip: Any = 20.0) -> Terms:
    """chi-squared preference optimisation: sp(-m), m = beta (phi_w - phi_l) held in +-2 reward_bound.

    phi = e^lr + mix lr; the exponent is held at `clip` with zero gradient beyond, counted in the metric `clipped`; a
    pair whose m is out of bounds has zero gradient. [B, 2] -> one term `loss` by pairs. Source: arXiv 2407.13399
    (abstract) and oxRL's chipo; bound and mix by recall (bound off here).
    """
    ratios = log_ratios(logps, ref_logps)
    chosen, rejected = pair("logps", links.exponential(-ratios, clip) + mix * ratios)
    margin = jnp.clip(beta * (chosen - rejected), -2 * reward_bound, 2 * reward_bound)
    return Terms({"loss": Term(links.logistic(margin))}, metrics=_clipped(-ratios, clip))


@method(id="squared_po", system="SquaredPO: nonconvex f-divergence DPO", arxiv="2602.06788",
        fidelity="reconstruction", completions=2)
def squared_po(logps: Array, ref_logps: Array, *, beta: Any = 0.1, clip: Any = 20.0) -> Terms:
    """f-DPO with f = (log t)^2 / 2: sp(-beta (lr_w e^-lr_w - lr_l e^-lr_l)).

    The reward rises up to lr = 1 (at most beta / e) and falls beyond. The exponent -lr is held at `clip`, counted in
    the metric `clipped`. [B, 2] -> one term `loss` by pairs. Source: arXiv 2602.06788 through a summary; the loss
    follows by the f-DPO recipe.
    """
    ratios = log_ratios(logps, ref_logps)
    chosen, rejected = pair("logps", ratios * links.exponential(ratios, clip))
    return Terms({"loss": Term(links.logistic(beta * (chosen - rejected)))}, metrics=_clipped(ratios, clip))


@method(id="dr_dpo", system="Dr. DPO: distributionally robust aggregation", arxiv="2407.07880",
        fidelity="official code", couples_batch=True, completions=2)
def dr_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, beta_prime: Any = 1.0) -> jax.Array:
    """Distributionally robust aggregation of DPO: -b' log mean exp(-l / b') over the global batch, l the pair losses.

    Pairs with low loss get more weight, softmax(-l / b'). [B, 2] -> [B], the batch's value repeated, so that the
    mean is that value. Source: arXiv 2407.07880, junkangwu/Dr_DPO.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    losses = links.logistic(beta * (chosen - rejected))
    total = jax.nn.logsumexp(-losses / beta_prime) - jnp.log(jnp.asarray(losses.size, losses.dtype))
    return jnp.broadcast_to(-beta_prime * total, losses.shape)


@method(id="c2_dpo", system="C2-DPO (C-3DPO): constrained controlled DPO", arxiv="2502.17507",
        fidelity="third-party code", completions=2)
def c2_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, lam: Any = 2e-4, penalty: str = "l2") -> Terms:
    """Constrained controlled DPO: sp(-beta D) + lam c^2 (l2) or lam |c| (l1), c = lr_w + lr_l; penalty is static.

    [B, 2] -> two terms by pairs, `dpo` and `constraint` with scale lam. Source: arXiv 2502.17507 (abstract), oxRL; l1
    by recall. Left out: the constraint on probabilities, which underflow for sequences.
    """
    _one_of("c2_dpo", "penalty", penalty, ("l2", "l1"))
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    total = chosen + rejected
    values = jnp.square(total) if penalty == "l2" else jnp.abs(total)
    return Terms({"dpo": Term(links.logistic(beta * (chosen - rejected))), "constraint": Term(values, scale=lam)})


@method(id="focal_po", system="FocalPO", arxiv="2501.06645", fidelity="third-party code", completions=2)
def focal_po(logps: Array, ref_logps: Array, *, beta: Any = 0.01, gamma: Any = 0.05, detach: bool = False) -> jax.Array:
    """Focal preference optimisation: -p^gamma log p, p = sigmoid(beta D): misranked pairs weigh less than in DPO.

    detach (static): the factor p^gamma as a constant, as oxRL has it. [B, 2] -> [B]. The full gradient changes its
    sign below p = e^(-1 / gamma). Source: arXiv 2501.06645 (abstract), and its factor p^gamma as others restate it; the
    authors' repository (TongLiu-github/focalpo) has a readme alone, no code and no settings. Whether the factor is
    differentiated, and both defaults, by recall; oxRL has detach=True and gamma=1, a summary of the paper gamma=2
    beside scores that are not the authors'.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    nll = links.logistic(beta * (chosen - rejected))
    factor = jnp.exp(-gamma * nll)
    return (jax.lax.stop_gradient(factor) if detach else factor) * nll


@method(id="minor_dpo", system="MinorDPO: one-sided reject penalty", arxiv="2408.09834",
        fidelity="third-party code", completions=2)
def minor_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1) -> jax.Array:
    """MinorDPO: sp(-beta (lr_w - relu(lr_l))); no push on a rejected answer below the reference, kink included.

    [B, 2] -> [B]. Source: arXiv 2408.09834 (summary), oxRL.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.logistic(beta * (chosen - jax.nn.relu(rejected)))


@method(id="bpo_balanced", system="BPO: balanced preference optimisation", arxiv="2506.03557",
        fidelity="third-party code", completions=2)
def bpo_balanced(logps: Array, ref_logps: Array, *, beta: Any = 0.1, alpha: Any = 0.3) -> jax.Array:
    """Balanced preference optimisation: sp(-beta min(lr_w, -alpha lr_l)); gradient through the smaller only.

    [B, 2] -> [B]; where both are equal each gets half. Source: arXiv 2506.03557 as oxRL has it (alpha its value).
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.logistic(beta * jnp.minimum(chosen, -alpha * rejected))


_GPO_LINKS = {
    "logistic": lambda m, clip: links.logistic(m),
    "hinge": lambda m, clip: links.hinge(m, 1),
    "square": lambda m, clip: links.square(m, 1),
    "exponential": links.exponential,
    "truncated_square": lambda m, clip: jnp.square(links.hinge(m, 1)),
    "savage": lambda m, clip: jnp.square(jax.nn.sigmoid(-m)),
}


@method(id="gpo", system="GPO: generalised preference optimisation links", arxiv="2402.05749",
        fidelity="third-party code", completions=2)
def gpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, link: str = "truncated_square",
        clip: Any = links.EXP_CLIP) -> jax.Array:
    """Generalised preference optimisation: f(beta D), f by `link` (static).

    logistic sp(-m) (DPO); hinge relu(1 - m); square (m - 1)^2 (IPO up to scale); exponential e^-m, its exponent
    held at `clip` with zero gradient beyond; truncated_square relu(1 - m)^2; savage 1 / (1 + e^m)^2, not convex.
    [B, 2] -> [B]. Source: arXiv 2402.05749, oxRL. The paper names no default link.
    """
    _one_of("gpo", "link", link, tuple(_GPO_LINKS))
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return _GPO_LINKS[link](beta * (chosen - rejected), clip)


def _bernoulli_kl(a: jax.Array, b: jax.Array) -> jax.Array:
    """KL between coins with logits a and b."""
    return (jax.nn.sigmoid(a) * (links.logistic(b) - links.logistic(a))
            + jax.nn.sigmoid(-a) * (links.logistic(-b) - links.logistic(-a)))


@method(id="rpo_reward_aware", system="RPO: reward-aware preference optimisation (sq, bwd KL, fwd KL)",
        arxiv="2406.11704", fidelity="official code", completions=2)
def rpo_reward_aware(logps: Array, ref_logps: Array, scores: Array, *, beta: Any = 1e-3, eta: Any = 1.0,
                     sft_weight: Any = 0.0, distance: str = "bwd_kl") -> Terms:
    """Reward-aware preference optimisation: the distance of m = beta D from d = eta (s_w - s_l).

    distance (static): sq (m - d)^2; bwd_kl KL(coin(sigmoid d) || coin(sigmoid m)); fwd_kl the other way round.
    logps, ref_logps, scores: [B, 2]. Two terms by pairs: `distance`, and `nll` = -S_w with scale sft_weight (1e-5 in
    the paper, by recall). Source: arXiv 2406.11704, 2502.00203, NVIDIA/NeMo-Aligner (scores 1 and 0 where missing).
    """
    _one_of("rpo_reward_aware", "distance", distance, ("sq", "bwd_kl", "fwd_kl"))
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    better, worse = pair("scores", jax.lax.stop_gradient(floats(scores)))
    margin, target = beta * (chosen - rejected), eta * (better - worse)
    if distance == "sq":
        values = links.square(margin, target)
    else:
        values = _bernoulli_kl(target, margin) if distance == "bwd_kl" else _bernoulli_kl(margin, target)
    return Terms({"distance": Term(values), "nll": Term(-pair_sums("logps", logps)[0], scale=sft_weight)})


@method(id="rebel", system="REBEL: regressing relative rewards", arxiv="2404.16767", fidelity="reconstruction",
        completions=2)
def rebel(logps: Array, ref_logps: Array, scores: Array, *, eta: Any = 1.0) -> jax.Array:
    """Regression to relative rewards: ((lr_0 - lr_1) / eta - (r_0 - r_1))^2, r = scores; [B, 2] -> [B].

    The reference is the policy at the round's start, from which the two answers come. Source: arXiv 2404.16767 by
    recall (identities checked). Left out: the rounds.
    """
    first, second = pair_log_ratios(logps, ref_logps)
    one, two = pair("scores", jax.lax.stop_gradient(floats(scores)))
    return links.square((first - second) / eta, one - two)


@method(id="kto_pair", system="KTO-pair: batch-halves KTO", arxiv="2402.01306", fidelity="third-party code",
        couples_batch=True, completions=2)
def kto_pair(logps: Array, ref_logps: Array, *, beta: Any = 0.1) -> jax.Array:
    """The old pair form of KTO: {1 - sigmoid(beta (lr_w - k_l)), 1 - sigmoid(beta (k_w - lr_l))}, [B, 2] -> [B, 2].

    k_w and k_l: max(0, mean of lr over the chosen, the rejected) of the global batch, no gradient. Mean over both
    halves. Not the paper's KTO (see `kto`); kept for comparison. Source: a copy of TRL's former trainer, which did
    not stop the gradient of k.
    """
    ratios = log_ratios(logps, ref_logps)
    chosen, rejected = pair("logps", ratios)
    k_chosen, k_rejected = (jax.nn.relu(jax.lax.stop_gradient(x).mean()) for x in (chosen, rejected))
    return jnp.stack([jax.nn.sigmoid(-beta * (chosen - k_rejected)), jax.nn.sigmoid(-beta * (k_chosen - rejected))], 1)


@method(id="mpo_mixed_loss", system="MPO: mixed (multi-loss) preference optimisation", arxiv="2411.10442",
        fidelity="third-party code", couples_batch=True, completions=2, init_state=bco_state)
def mpo_mixed_loss(logps: Array, ref_logps: Array, lengths: Array, state: Any, *, beta: Any = 0.1,
                   preference_weight: Any = 0.8, quality_weight: Any = 0.2, generation_weight: Any = 1.0,
                   shift: str = "running", nll: str = "average") -> Terms:
    """Mixed preference optimisation: w_p DPO + w_q BCO (the pair's sum) + w_g NLL(chosen).

    shift (static): running, BCO's running mean reward (see `bco`, both classes equally); zero, as TRL's `bco_pair`.
    nll (static): average, -S_w / n_w by pairs (the paper); tokens, the token mean over the batch (TRL).
    logps, ref_logps, lengths: [B, 2]; state: BCO's. Three terms: `preference`, `quality`, `generation`, with their
    weights as scales; new_state; the metric `delta`. Source: arXiv 2411.10442 through TRL.
    """
    _one_of("mpo_mixed_loss", "shift", shift, ("running", "zero"))
    _one_of("mpo_mixed_loss", "nll", nll, ("average", "tokens"))
    ratios = log_ratios(logps, ref_logps)
    chosen, rejected = pair("logps", beta * ratios)
    good = jnp.broadcast_to(jnp.array([[True, False]]), ratios.shape)
    delta, new_state = bco_shift(beta * ratios, good, jnp.ones_like(good), state, pooled=False)
    delta = delta if shift == "running" else jnp.zeros_like(delta)
    quality = links.logistic(chosen - delta) + links.logistic(delta - rejected)
    tokens = pair("lengths", floats(lengths))[0]
    mean = -per_token(pair_sums("logps", logps)[0], tokens)
    generation = (Term(mean, scale=generation_weight) if nll == "average"
                  else Term(mean, tokens, "tokens", generation_weight))
    return Terms({"preference": Term(links.logistic(chosen - rejected), scale=preference_weight),
                  "quality": Term(quality, scale=quality_weight), "generation": generation},
                 new_state, {"delta": (delta.astype(jnp.float32), jnp.ones((), jnp.float32))})
