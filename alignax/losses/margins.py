"""Pairs against a reference with a margin of their own: given, computed under another prompt, or of unsure labels.

lr = S - R, D = lr(chosen) - lr(rejected), sp = softplus. Every function takes [B, 2] sums, stops the gradient at the
reference and at the margin, and reduces by the mean over pairs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, pair_log_ratios, pair_sums, per_token, sums
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


@method(id="rso:hinge_norm", system="RSO: hinge on log-ratios", arxiv="2309.06657", fidelity="paper", completions=2)
def rso_hinge_norm(logps: Array, ref_logps: Array, *, gamma: Any = 0.05) -> jax.Array:
    """Statistical rejection sampling's hinge-norm: max(0, 1 - gamma D); [B, 2] -> [B].

    Source: arXiv 2309.06657 (TRL's `hinge`). Left out: the rejection sampling that makes the pairs; the paper's
    sigmoid-norm is `dpo` with beta = gamma.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.hinge(gamma * (chosen - rejected), 1)


@method(id="ilr_dpo", system="Iterative length-regularised DPO", arxiv="2406.11817", fidelity="reconstruction",
        completions=2)
def ilr_dpo(logps: Array, ref_logps: Array, lengths: Array, *, beta: Any = 0.1, alpha: Any = 0.02) -> jax.Array:
    """The loss of one iLR-DPO round: sp(-(beta D + alpha (n_w - n_l))); [B, 2] -> [B].

    `r_dpo` by another derivation; alpha by recall. Source: arXiv 2406.11817. Left out: the rounds (sample, take the
    best and the worst by a reward model, train with the previous policy as reference).
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    longer, shorter = pair("lengths", floats(lengths))
    return links.logistic(beta * (chosen - rejected) + alpha * (longer - shorter))


_FORMS = ("offset", "drop", "relabel")


@method(id="rdpo_refined", system="Refined DPO with synthetic data (rDPO)", arxiv="2402.08005",
        fidelity="reconstruction", completions=2)
def rdpo_refined(logps: Array, ref_logps: Array, scores: Array, *, beta: Any = 0.1, c: Any = 1.0,
                 form: str = "offset") -> Terms:
    """Refined DPO on (revision, first answer) with external scores: sp(-(beta D - c (s_r - s_o))).

    logps, ref_logps, scores: [B, 2], the revision first. form (static): offset, the formula; drop, plain DPO on
    the pairs with s_r > s_o only; relabel, plain DPO with the better-scored answer as chosen, ties dropped. Returns
    one term `loss` by pairs, weighted by the pairs that are kept.
    Source: arXiv 2402.08005; its training code was never released, and the place and sign of the score are our
    reading. Left out: critique and revision, which make the data.
    """
    if form not in _FORMS:
        raise ConfigError(f"rdpo_refined: form = {form!r}; allowed: {', '.join(_FORMS)}")
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    revised, first = pair("scores", jax.lax.stop_gradient(floats(scores)))
    margin, gain = beta * (chosen - rejected), revised - first
    if form == "offset":
        return Terms({"loss": Term(links.logistic(margin - c * gain))})
    if form == "drop":
        return Terms({"loss": Term(links.logistic(margin), gain > 0)})
    return Terms({"loss": Term(links.logistic(jnp.sign(gain) * margin), gain != 0)})


@method(id="sequential_po", system="Sequential Preference Optimization over preference dimensions",
        arxiv="2405.12739", fidelity="reconstruction", completions=2)
def sequential_po(logps: Array, ref_logps: Array, margins: Array, *, beta: Any = 0.1, lam: Any = 1.0) -> jax.Array:
    """One round of sequential preference optimisation: sp(-(beta D - lam m)); [B, 2], [B, 2], [B] -> [B].

    D against the previous stage's policy (the reference); m = margins, the earlier stages' implicit rewards of the
    pair: sum over i < n of beta_i [log pi_i / pi_(i-1)(y_w) - the same of y_l], weighted where there are several.
    m = 0 in the first round, which is DPO. Source: arXiv 2405.12739 through a summary; the authors' lambda could not
    be read (a re-implementation weighs the new term 0.5, the old 1). Left out: the rounds and the chain of policies.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    earlier = jax.lax.stop_gradient(floats(margins))
    return links.logistic(beta * (chosen - rejected) - lam * earlier)


def _quality_gap(aux_prompt_logps: Array, aux_prompt_ref_logps: Array, beta: Any) -> jax.Array:
    """sg[beta D] of the same pair under the augmented prompt, [B]."""
    chosen, rejected = pair("aux_prompt_logps", sums("aux_prompt_logps", aux_prompt_logps)
                            - sums("aux_prompt_ref_logps", aux_prompt_ref_logps))
    return jax.lax.stop_gradient(beta * (chosen - rejected))


@method(id="sr_dpo", system="Quality-aware self-refinement (Sr-DPO)", arxiv="2405.21040", fidelity="paper",
        completions=2)
def sr_dpo(logps: Array, ref_logps: Array, aux_prompt_logps: Array, aux_prompt_ref_logps: Array, *, beta: Any = 0.1,
           lam: Any = 0.5) -> jax.Array:
    """Self-refined DPO: sp(-(beta D - lam sg[beta D'])), D' = D of the same completions under a quality prompt.

    All arrays [B, 2]; returns [B]. The quality prompt goes before the record's own prompt and asks for an answer
    rated 100 of 100. lam was chosen from 0.1, 0.3, 0.5 and 1. Source: arXiv 2405.21040.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    gap = _quality_gap(aux_prompt_logps, aux_prompt_ref_logps, beta)
    return links.logistic(beta * (chosen - rejected) - lam * gap)


@method(id="sr_dpo:ipo", system="Quality-aware self-refinement (Sr-IPO)", arxiv="2405.21040", fidelity="paper",
        completions=2)
def sr_ipo(logps: Array, ref_logps: Array, aux_prompt_logps: Array, aux_prompt_ref_logps: Array, *, beta: Any = 0.1,
           lam: Any = 0.5) -> jax.Array:
    """Self-refined IPO: (D - lam sg[beta D'] - 1 / (2 beta))^2; shapes, D' and source as `sr_dpo`."""
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    gap = _quality_gap(aux_prompt_logps, aux_prompt_ref_logps, beta)
    return links.square(chosen - rejected - lam * gap, 1 / (2 * beta))


ANNOTATORS = 64
"""How many annotators `lcpo` keeps a reliability for."""


def lcpo_state() -> dict[str, jax.Array]:
    """The reliability of every annotator, float32 [ANNOTATORS]: 0.9 before the first update."""
    return {"eta": jnp.full((ANNOTATORS,), 0.9, jnp.float32)}


_BASES = ("dpo", "ipo", "simpo", "cpo")


def _both_ways(base: str, logps, ref_logps, lengths, beta, tau, gamma, lam) -> tuple[jax.Array, jax.Array]:
    """(loss as labelled, loss with the roles swapped) of a base loss, [B] each."""
    if base in ("dpo", "ipo"):
        chosen, rejected = pair_log_ratios(logps, ref_logps)
        margin = chosen - rejected
        if base == "ipo":
            return links.square(margin, 1 / (2 * tau)), links.square(-margin, 1 / (2 * tau))
        return links.logistic(beta * margin), links.logistic(-beta * margin)
    if base == "simpo":
        chosen, rejected = pair("logps", per_token(sums("logps", logps), lengths))
        margin = beta * (chosen - rejected)
        return links.logistic(margin - gamma), links.logistic(-margin - gamma)
    chosen, rejected = pair_sums("logps", logps)
    margin = beta * (chosen - rejected)
    return links.logistic(margin) - lam * chosen, links.logistic(-margin) - lam * rejected


@method(id="lcpo", system="Latent Collective Preference Optimization (EM reweighting)", arxiv="2509.24159",
        fidelity="paper", completions=2, init_state=lcpo_state, limits={"rate": (0.0, 1.0)})
def lcpo(logps: Array, ref_logps: Array, lengths: Array, annotator: Array, state: Any, *, beta: Any = 0.1,
         tau: Any = 0.1, gamma: Any = 0.5, lam: Any = 1.0, rate: Any = 0.1, base: str = "dpo",
         drop_normaliser: bool = False) -> Terms:
    """Latent collective preference optimisation (RE-PO): EM over which labels are right, around a pair loss.

    L(w), L(l): the base loss as labelled and with the roles swapped; p = sigmoid(L(l) - L(w)).
    E: w = sg[p eta / (p eta + (1 - p)(1 - eta))]. M: -[w log p + (1 - w) log(1 - p)]; drop_normaliser (static):
    w L(w) + (1 - w) L(l) instead, the same for a base whose two losses are -log of complementary probabilities.
    Then eta_k <- (1 - rate) eta_k + rate mean of w over annotator k in the global batch, where it has pairs.

    base (static): dpo (beta), ipo (tau), simpo (beta, gamma), cpo (beta, lam; sequence NLL). logps, ref_logps,
    lengths: [B, 2]; annotator: int [B], 0 where the data has none, below 64 (an id beyond gives NaN); state: eta [64].
    Returns one term `loss` by pairs, new_state, and the metric `reliability`, the mean of w.
    Source: arXiv 2509.24159. eta = 0 and eta = 1 are absorbing; the start is 0.9.
    """
    if base not in _BASES:
        raise ConfigError(f"lcpo: base = {base!r}; allowed: {', '.join(_BASES)}")
    right, wrong = _both_ways(base, logps, ref_logps, lengths, beta, tau, gamma, lam)
    odds = wrong - right
    ids = jnp.asarray(annotator)
    eta = state["eta"].at[ids].get(mode="fill", fill_value=jnp.nan).astype(odds.dtype)
    sure = jax.lax.stop_gradient(jax.nn.sigmoid(odds + jnp.log(eta) - jnp.log1p(-eta)))
    if drop_normaliser:
        values = sure * right + (1 - sure) * wrong
    else:
        values = sure * links.logistic(odds) + (1 - sure) * links.logistic(-odds)
    ones = jnp.ones_like(state["eta"]).at[ids].add(1.0) - 1
    total = jnp.zeros_like(state["eta"]).at[ids].add(sure.astype(state["eta"].dtype))
    seen = ones > 0
    moved = (1 - rate) * state["eta"] + rate * total / jnp.where(seen, ones, 1)
    new_state = {"eta": jnp.where(seen, moved, state["eta"]).astype(jnp.float32)}
    count = jnp.float32(sure.size)
    return Terms({"loss": Term(values)}, new_state, {"reliability": (sure.sum().astype(jnp.float32), count)})


_WEIGHTINGS = ("embedding", "uniform", "diagonal", "diagonal_loss")


@method(id="relative_po", system="Relative preference optimisation (contrast matrix)", arxiv="2402.10958",
        fidelity="official code", couples_batch=True, completions=2, limits={"alpha": (0.0, 1.0)})
def relative_po(logps: Array, ref_logps: Array, prompt_embedding: Array, *, beta: Any = 0.1, tau: Any = 0.5,
                alpha: Any = 0.8, weighting: str = "embedding") -> jax.Array:
    """Relative preference optimisation: mean over j of sp(-w_ij beta (lr_w,i - lr_l,j)), all pairs of the batch.

    weighting (static): embedding, w_i. = softmax over j of cos(e_i, e_j) / tau, so that rows sum to 1; uniform, 1/B;
    diagonal, alpha at i = j and (1 - alpha) / (B - 1) elsewhere; diagonal_loss, the official code's form of it: the
    losses of beta (lr_w,i - lr_l,j) averaged with those weights. No gradient through w.

    logps, ref_logps: [B, 2]; prompt_embedding: [B, E], any frozen encoder of the prompts; returns [B], one value per
    chosen answer, over the global batch. Source: arXiv 2402.10958, yinyueqin/relative-preference-optimization (which
    normalises per device batch, with a sentence encoder). Left out: unpaired data (there tau = 0.75).
    """
    if weighting not in _WEIGHTINGS:
        raise ConfigError(f"relative_po: weighting = {weighting!r}; allowed: {', '.join(_WEIGHTINGS)}")
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    margin = beta * (chosen[:, None] - rejected[None, :])
    size = margin.shape[0]
    if weighting == "uniform":
        return links.logistic(margin / size).mean(-1)
    if weighting == "embedding":
        e = jax.lax.stop_gradient(floats(prompt_embedding))
        square = jnp.square(e).sum(-1, keepdims=True)
        unit = jnp.where(square > 0, e / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        cosine = jnp.einsum("ie,je->ij", unit, unit, precision="highest")
        return links.logistic(jax.nn.softmax(cosine / tau, axis=-1) * margin).mean(-1)
    eye = jnp.eye(size, dtype=bool)
    weight = jnp.where(eye, alpha if size > 1 else 1.0, (1 - alpha) / max(size - 1, 1)).astype(margin.dtype)
    if weighting == "diagonal":
        return links.logistic(weight * margin).mean(-1)
    return (weight * links.logistic(margin)).sum(-1)
