"""Pairs against a reference, opening with DPO. Cousins of one formula:

    loss = weight * link(r(chosen) - r(rejected) - offset) + extras

S = sum of the policy's log-probs over a completion, R the reference's, n its tokens; lr = S - R;
D = lr(chosen) - lr(rejected); sp = softplus. Every function takes [B, 2] sums, stops the gradient at the reference,
and returns [B] unless it says otherwise; the reduction is the mean over pairs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import (
    floats,
    log_ratios,
    pair,
    pair_log_ratios,
    pair_sums,
    per_token,
    sums,
    token_sum,
    valid_log_ratios,
)
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


@method(id="dpo", system="Direct Preference Optimization", arxiv="2305.18290", fidelity="official code", completions=2)
def dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, label_smoothing: Any = 0.0) -> jax.Array:
    """Direct Preference Optimization: (1 - e) sp(-beta D) + e sp(beta D), e = label_smoothing.

    logps, ref_logps: [B, 2] sums over tokens. Returns [B]. Gradient: -beta sigmoid(-beta D) on S(chosen), the
    opposite on S(rejected); none into the reference. label_smoothing > 0 is conservative DPO (cDPO).
    Source: arXiv 2305.18290 and the authors' trainers. Left out: the reference-free switch (pass ref_logps = 0).
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.smoothed(beta * (chosen - rejected), label_smoothing)


@method(id="cdpo", system="cDPO: conservative DPO (label smoothing)", arxiv="", fidelity="official code",
        completions=2)
def cdpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, label_smoothing: Any = 0.1) -> jax.Array:
    """Conservative DPO: `dpo` with a label flip rate assumed; gradient vanishes at beta D = log((1 - e) / e).

    Shapes, reduction and stops as `dpo`. Source: E. Mitchell's technical note (2023) and the DPO code.
    """
    return dpo(logps, ref_logps, beta=beta, label_smoothing=label_smoothing)


@method(id="robust_dpo", system="Robust DPO (debiased)", arxiv="2403.00409", fidelity="third-party code",
        completions=2, limits={"label_smoothing": (0.0, 0.499)})
def robust_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, label_smoothing: Any = 0.1) -> jax.Array:
    """Provably robust DPO: [(1 - e) sp(-beta D) - e sp(beta D)] / (1 - 2 e), e < 1/2.

    [B, 2] sums -> [B]; unbounded below. (1 - e) L(w, l) + e L(l, w) equals DPO exactly. Source: arXiv 2403.00409,
    checked against TRL's `robust`.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.debiased(beta * (chosen - rejected), label_smoothing)


@method(id="ipo", system="IPO / PsiPO", arxiv="2310.12036", fidelity="third-party code", completions=2)
def ipo(logps: Array, ref_logps: Array, lengths: Array, *, tau: Any = 0.1, length_average: bool = False) -> jax.Array:
    """Identity preference optimisation: (D - 1 / (2 tau))^2.

    logps, ref_logps, lengths: [B, 2]; returns [B]. length_average (static): lr / n in place of lr, the form that
    TRL reports as the authors' own; the paper's formula, with token sums, is the default. Source: arXiv 2310.12036.
    """
    ratios = log_ratios(logps, ref_logps)
    if length_average:
        ratios = per_token(ratios, lengths)
    chosen, rejected = pair("logps", ratios)
    return links.square(chosen - rejected, 1 / (2 * tau))


@method(id="dpo:ln", system="LN-DPO: length-normalised DPO", arxiv="", fidelity="third-party code", completions=2)
def ln_dpo(logps: Array, ref_logps: Array, lengths: Array, *, beta: Any = 5.0) -> jax.Array:
    """Length-normalised DPO: sp(-beta (lr_w / n_w - lr_l / n_l)); [B, 2] -> [B].

    Source: open-instruct's `dpo_norm` (beta about 5) and TRL's `sigmoid_norm`.
    """
    chosen, rejected = pair("logps", per_token(log_ratios(logps, ref_logps), lengths))
    return links.logistic(beta * (chosen - rejected))


def log_score_gap(scores: Array, *, ratio: bool = False) -> tuple[jax.Array, jax.Array]:
    """(log(s_w - s_l), or log(s_w / s_l) with `ratio`; whether it exists), [B] each; 0 where it does not."""
    better, worse = pair("scores", jax.lax.stop_gradient(floats(scores)))
    kept = (better > worse) & (worse > 0) if ratio else better > worse
    gap = better / jnp.where(kept, worse, 1) if ratio else better - worse
    return jnp.log(jnp.where(kept, gap, 1)), kept


@method(id="odpo", system="DPO with an offset", arxiv="2402.10571", fidelity="official code", completions=2)
def odpo(logps: Array, ref_logps: Array, scores: Array, *, beta: Any = 0.1, alpha: Any = 1.0,
         offset: str = "difference") -> Terms:
    """DPO with an offset: sp(-(beta D - alpha f)), no gradient into the scores.

    offset (static): difference, f = log(s_w - s_l) (the official code); ratio, f = log(s_w / s_l), for positive
    scores. logps, ref_logps, scores: [B, 2]. One term `loss` by pairs; pairs whose score order is a tie or inverted
    (with ratio also those with s_l <= 0) have no offset: they have weight 0 and are counted in the metric `dropped`.
    Source: arXiv 2402.10571, rycolab/odpo.
    """
    if offset not in ("difference", "ratio"):
        raise ConfigError(f"odpo: offset = {offset!r}; allowed: 'difference', 'ratio'")
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    gap, kept = log_score_gap(scores, ratio=offset == "ratio")
    values = links.logistic(beta * (chosen - rejected) - alpha * gap)
    dropped = ((~kept).sum().astype(jnp.float32), jnp.float32(kept.size))
    return Terms({"loss": Term(values, kept)}, metrics={"dropped": dropped})


@method(id="h_dpo", system="H-DPO: entropy-controllable DPO", arxiv="2411.07595", fidelity="third-party code",
        completions=2)
def h_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.01, alpha: Any = 0.95) -> jax.Array:
    """Entropy-controllable DPO: sp(-(alpha beta (S_w - S_l) - beta (R_w - R_l))); [B, 2] -> [B].

    alpha < 1 sharpens. Source: arXiv 2411.07595 (abstract) and a third-party implementation; defaults by recall.
    """
    chosen, rejected = pair_sums("logps", logps)
    ref_chosen, ref_rejected = pair("ref_logps", jax.lax.stop_gradient(sums("ref_logps", ref_logps)))
    return links.logistic(alpha * beta * (chosen - rejected) - beta * (ref_chosen - ref_rejected))


@method(id="dpo_shift", system="DPO-Shift", arxiv="2502.07599", fidelity="official code", completions=2)
def dpo_shift(logps: Array, ref_logps: Array, *, beta: Any = 0.01, shift: Any = 0.95) -> jax.Array:
    """DPO-Shift: sp(-(beta lr_w - f beta lr_l)), f = shift in (0, 1]; [B, 2] -> [B].

    Source: arXiv 2502.07599 and the authors' trainer. Left out: the schedules of f (pass a traced `shift`).
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.logistic(beta * chosen - shift * beta * rejected)


@method(id="flex_dpo", system="Flex-DPO: separate strengths for chosen and rejected terms (3D-Properties)",
        arxiv="2406.07327", fidelity="paper", completions=2)
def flex_dpo(logps: Array, ref_logps: Array, *, beta_chosen: Any = 0.1, beta_rejected: Any = 0.08) -> jax.Array:
    """Flex-DPO: sp(-(beta+ lr_w - beta- lr_l)); [B, 2] -> [B]. Source: arXiv 2406.07327, section 3.3."""
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.logistic(beta_chosen * chosen - beta_rejected * rejected)


@method(id="sft_dpo", system="DPO with an SFT term (3D-Properties)", arxiv="2406.07327", fidelity="paper",
        completions=2)
def sft_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, gamma: Any = 0.01) -> Terms:
    """DPO plus gamma times the sequence NLL of the chosen completion, -S_w (a token sum).

    [B, 2] sums -> two terms by pairs: `dpo` and `nll` (scale gamma). Source: arXiv 2406.07327; the paper says only
    that gamma is small.
    """
    nll = -pair_sums("logps", logps)[0]
    return Terms({"dpo": Term(dpo(logps, ref_logps, beta=beta)), "nll": Term(nll, scale=gamma)})


@method(id="rpo", system="Regularized preference optimization: SFT loss as adversarial regulariser",
        arxiv="2405.16436", fidelity="official code", completions=2)
def rpo(logps: Array, ref_logps: Array, lengths: Array, *, beta: Any = 0.5, eta: Any = 0.2,
        form: str = "average") -> Terms:
    """Regularised preference optimisation: DPO + c NLL(chosen).

    logps, ref_logps, lengths: [B, 2]. form (static): `average`, c = eta with -S_w / n_w (the code's default);
    `cumulative`, c = eta beta with -S_w (the paper). Returns two terms by pairs: `dpo`, and `nll` with scale c.
    Source: arXiv 2405.16436 and YSLIU627/Regularized-Preference-Optimization.
    """
    if form not in ("average", "cumulative"):
        raise ConfigError(f"rpo: form = {form!r}; allowed: 'average', 'cumulative'")
    chosen, _ = pair_sums("logps", logps)
    if form == "average":
        nll = Term(-per_token(chosen, pair("lengths", lengths)[0]), scale=eta)
    else:
        nll = Term(-chosen, scale=eta * beta)
    return Terms({"dpo": Term(dpo(logps, ref_logps, beta=beta)), "nll": nll})


@method(id="r_dpo", system="R-DPO: length-regularised DPO", arxiv="2403.19159", fidelity="reconstruction",
        completions=2)
def r_dpo(logps: Array, ref_logps: Array, lengths: Array, *, beta: Any = 0.1, alpha: Any = 0.02) -> jax.Array:
    """Length-regularised DPO: sp(-(beta D + alpha (n_w - n_l))); [B, 2] -> [B].

    The plus sign follows from the objective max E[r - alpha n] - beta KL (a longer chosen answer already explains
    part of the preference); some secondary sources print a minus. Source: arXiv 2403.19159, 2406.11817.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    longer, shorter = pair("lengths", floats(lengths))
    return links.logistic(beta * (chosen - rejected) + alpha * (longer - shorter))


@method(id="dpop", system="DPOP (DPO-Positive; Smaug)", arxiv="2402.13228", fidelity="third-party code",
        completions=2)
def dpop(logps: Array, ref_logps: Array, *, beta: Any = 0.3, penalty: Any = 50.0) -> jax.Array:
    """DPO-Positive: sp(-beta (D - lambda relu(-lr_w))), the penalty differentiated, its kink with gradient 0.

    [B, 2] -> [B]. Source: arXiv 2402.13228, two agreeing third-party implementations.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return links.logistic(beta * (chosen - rejected - penalty * jax.nn.relu(-chosen)))


_DIVERGENCES = {
    "reverse_kl": lambda lr, alpha, clip: lr,
    "forward_kl": lambda lr, alpha, clip: -links.exponential(lr, clip),
    "js": lambda lr, alpha, clip: -jax.nn.softplus(-lr),
    "alpha": lambda lr, alpha, clip: -links.exponential(alpha * lr, clip) / alpha,
}


@method(id="f_dpo", system="f-DPO", arxiv="2309.16240", fidelity="official code", completions=2)
def f_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, divergence: str = "forward_kl", alpha: Any = 0.5,
          clip: Any = links.EXP_CLIP) -> Terms:
    """f-divergence DPO: sp(-beta (f'(u_w) - f'(u_l))), u = e^lr, constants of f' dropped.

    divergence (static): reverse_kl lr | forward_kl -e^-lr | js -sp(-lr) | alpha -e^(-alpha lr) / alpha, alpha in
    (0, 1). clip: largest exponent; zero gradient beyond it, counted in the metric `clipped`. [B, 2] -> one term
    `loss` by pairs. Source: arXiv 2309.16240, alecwangcq/f-divergence-dpo.
    """
    if divergence not in _DIVERGENCES:
        raise ConfigError(f"f_dpo: divergence = {divergence!r}; allowed: {', '.join(_DIVERGENCES)}")
    ratios = log_ratios(logps, ref_logps)
    chosen, rejected = pair("logps", _DIVERGENCES[divergence](ratios, alpha, clip))
    scale = {"forward_kl": 1.0, "alpha": alpha}.get(divergence, 0.0)
    clipped = links.exponential_clipped(scale * ratios, clip)
    count = (clipped.sum().astype(jnp.float32), jnp.float32(clipped.size))
    return Terms({"loss": Term(links.logistic(beta * (chosen - rejected)))}, metrics={"clipped": count})


@method(id="cal_dpo", system="Cal-DPO", arxiv="2412.14516", fidelity="official code", completions=2)
def cal_dpo(logps: Array, ref_logps: Array, *, beta: Any = 0.001, calibration_weight: Any = 1.0) -> jax.Array:
    """Calibrated DPO: sp(-D) + c [(lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2]; no beta in the first part.

    [B, 2] -> [B]. Source: arXiv 2412.14516, Cal-DPO/Cal-DPO (c = 1; a second official repository uses 0.5).
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    target = 1 / (2 * beta)
    calibration = links.square(chosen, target) + links.square(rejected, -target)
    return links.logistic(chosen - rejected) + calibration_weight * calibration


@method(id="apo:zero", system="APO-zero", arxiv="2408.06266", fidelity="official code", completions=2)
def apo_zero(logps: Array, ref_logps: Array, *, beta: Any = 0.1) -> jax.Array:
    """Anchored preference optimisation, zero: 1 - sigmoid(beta lr_w) + sigmoid(beta lr_l); [B, 2] -> [B].

    For chosen answers better than the model's own. Source: arXiv 2408.06266, TRL (contributed by the authors' lab).
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@method(id="apo:down", system="APO-down", arxiv="2408.06266", fidelity="official code", completions=2)
def apo_down(logps: Array, ref_logps: Array, *, beta: Any = 0.1) -> jax.Array:
    """Anchored preference optimisation, down: sigmoid(beta lr_w) + 1 - sigmoid(beta D); [B, 2] -> [B].

    For chosen answers worse than the model's own. Source as `apo_zero`.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


@method(id="exo", system="EXO: efficient exact optimisation", arxiv="2402.00856", fidelity="third-party code",
        completions=2, limits={"label_smoothing": (1e-12, 0.5)})
def exo(logps: Array, ref_logps: Array, *, beta: Any = 0.1, label_smoothing: Any = 1e-3) -> jax.Array:
    """Exact optimisation on a pair: KL((sigmoid(m), sigmoid(-m)) || (1 - e, e)), m = beta D, e > 0.

    [B, 2] -> [B]. Source: arXiv 2402.00856 (the official code leaves the target unnormalised; the formula is
    followed). Left out: lists scored by a reward model.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    margin = beta * (chosen - rejected)
    right = jax.nn.sigmoid(margin) * (-links.logistic(margin) - jnp.log1p(-label_smoothing))
    wrong = jax.nn.sigmoid(-margin) * (-links.logistic(-margin) - jnp.log(label_smoothing))
    return right + wrong


@method(id="discopop", system="DiscoPOP", arxiv="2406.08414", fidelity="official code", completions=2)
def discopop(logps: Array, ref_logps: Array, *, beta: Any = 0.05, tau: Any = 0.05,
             clip: Any = links.EXP_CLIP) -> jax.Array:
    """Log-ratio modulated loss: (1 - sigmoid(rho / tau)) sp(-rho) + sigmoid(rho / tau) e^-rho, rho = beta D.

    All differentiated. The second part is exp(-(rho + sp(-rho / tau))), as the product is 0 * inf; its exponent is
    clipped at `clip` with zero gradient beyond (reached for tau > 1 only). [B, 2] -> [B]. Source: arXiv 2406.08414.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    rho = beta * (chosen - rejected)
    blend = jax.nn.sigmoid(-rho / tau) * links.logistic(rho)
    return blend + links.exponential(rho + jax.nn.softplus(-rho / tau), clip)


def wpo_weight(token_logps: Array, log_sum_sq: Array, mask: Array) -> jax.Array:
    """sg[min(1, w_w w_l)] of `wpo`, [B]."""
    count = jnp.asarray(mask, bool).sum(-1)
    log_weight = per_token(token_sum(floats(token_logps) - floats(log_sum_sq), mask), count).sum(-1)
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_weight, 0)))


@method(id="wpo", system="WPO: weighted preference optimisation", arxiv="2406.11827", fidelity="official code",
        completions=2)
def wpo(token_logps: Array, ref_token_logps: Array, log_sum_sq: Array, mask: Array, *, beta: Any = 0.01) -> jax.Array:
    """Weighted DPO: sg[min(1, w_w w_l)] sp(-beta D), w = exp(mean_t(log pi(y_t) - log sum_v pi(v)^2)).

    token_logps, ref_token_logps, log_sum_sq, mask: [B, 2, L]; returns [B]. The weight carries no gradient; an empty
    completion has w = 1. Source: arXiv 2406.11827 and wzhouad/WPO.
    """
    ratio = token_sum(floats(token_logps) - jax.lax.stop_gradient(floats(ref_token_logps)), mask)
    chosen, rejected = pair("token_logps", ratio)
    return wpo_weight(token_logps, log_sum_sq, mask) * links.logistic(beta * (chosen - rejected))


@method(id="aot", system="AOT: alignment via optimal transport", arxiv="2406.05882", fidelity="third-party code",
        couples_batch=True, completions=2)
def aot(logps: Array, ref_logps: Array, *, beta: Any = 0.01, label_smoothing: Any = 0.0,
        paired: bool = True) -> jax.Array:
    """Optimal transport alignment: smoothed logistic of beta (u_i - v_i), u and v sorted over the global batch.

    paired (static): u = sort(S_w - S_l), v = sort(R_w - R_l); else u = sort(lr_w), v = sort(lr_l). Gradients pass
    through the sort. logps, ref_logps: [B, 2]; returns [B] in sorted order, not the batch's.
    Source: arXiv 2406.05882, TRL's `aot` and `aot_unpaired`. Left out: hinge links.
    """
    if paired:
        chosen, rejected = pair_sums("logps", logps)
        ref_chosen, ref_rejected = pair("ref_logps", jax.lax.stop_gradient(sums("ref_logps", ref_logps)))
        high, low = chosen - rejected, ref_chosen - ref_rejected
    else:
        high, low = pair_log_ratios(logps, ref_logps)
    return links.smoothed(beta * (jnp.sort(high) - jnp.sort(low)), label_smoothing)


def beta_dpo_state() -> dict[str, jax.Array]:
    """The running mean and deviation of beta-DPO's gap: float32 scalars, zero before the first update."""
    return {"mean": jnp.zeros((), jnp.float32), "std": jnp.zeros((), jnp.float32)}


@method(id="beta_dpo", system="beta-DPO: dynamic beta and filtering", arxiv="2407.08639", fidelity="official code",
        couples_batch=True, completions=2, init_state=beta_dpo_state, limits={"drop": (0.0, 1.0)})
def beta_dpo(logps: Array, ref_logps: Array, state: Any, key: jax.Array, *, beta: Any = 0.1, a: Any = 0.6,
             drop: Any = 0.2, momentum: Any = 0.9) -> Terms:
    """DPO with one dynamic beta per batch and a sampled filter.

    gap = sg[D] over the global batch (not times beta). State first: M <- momentum M + (1 - momentum) mean(gap), the
    same for s with the sample deviation. floor(B (1 - drop)) pairs, at least one, are drawn without replacement with
    probabilities proportional to exp(-(gap - M)^2 / (2 s^2)) (Gumbel noise and ranks; uniform while s = 0). Then
    beta_b = max(1e-3, beta (1 + a (mean gap of the kept - M))), no gradient, and sp(-beta_b D) on the kept.

    logps, ref_logps: [B, 2]; state: {mean, std} float32 scalars; key: a PRNG key. Returns one term `loss` by pairs
    weighted by the kept (their mean), new_state, and the metrics `beta` and `kept`.
    Source: arXiv 2407.08639 and junkangwu/beta-DPO. Left out: its update of the state per micro-batch and during
    evaluation.
    """
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    delta = chosen - rejected
    gap = jax.lax.stop_gradient(delta)
    size = gap.shape[0]
    deviation = jnp.std(gap, ddof=1) if size > 1 else jnp.zeros((), gap.dtype)
    mean = momentum * state["mean"] + (1 - momentum) * gap.mean()
    std = momentum * state["std"] + (1 - momentum) * deviation
    spread = std > 0
    log_p = jnp.where(spread, -0.5 * jnp.square((gap - mean) / jnp.where(spread, std, 1)), 0)
    noisy = log_p + jax.random.gumbel(key, (size,), gap.dtype)
    rank = jnp.argsort(jnp.argsort(-noisy))
    # The small number undoes rounding of B (1 - drop) just below a whole number.
    count = jnp.maximum(jnp.floor(size * (1 - jnp.asarray(drop, gap.dtype)) + 1e-4), 1)
    kept = (rank < count).astype(gap.dtype)
    kept_gap = jnp.sum(kept * gap) / kept.sum()
    batch_beta = jax.lax.stop_gradient(jnp.maximum(1e-3, beta * (1 + a * (kept_gap - mean))))
    new_state = jax.tree.map(lambda x: x.astype(jnp.float32), {"mean": mean, "std": std})
    one = jnp.ones((), jnp.float32)
    metrics = {"beta": (batch_beta, one), "kept": (kept.sum(), one * size)}
    return Terms({"loss": Term(links.logistic(batch_beta * delta), kept, "pairs")}, new_state, metrics)


@method(id="pl_dpo", system="PL-DPO: Plackett-Luce DPO", arxiv="2305.18290", fidelity="reconstruction")
def plackett_luce(logps: Array, ref_logps: Array, valid: Array, *, beta: Any = 0.1) -> jax.Array:
    """Plackett-Luce DPO on a ranked list, best first: -sum_k [r_k - log sum_{j >= k} e^{r_j}], r = beta lr.

    logps, ref_logps: [B, K] sums; valid: bool [B, K], the completions that exist (anywhere in the list). Returns
    [B]; a list of fewer than two gives 0. K = 2 is DPO; pi = pi_ref gives log K!. Source: appendix of arXiv
    2305.18290 (formula by recall; ListMLE is the same). Left out: partial rankings.
    """
    valid = jnp.asarray(valid, bool)
    rewards = beta * valid_log_ratios(logps, ref_logps, valid)
    size = rewards.shape[1]
    at_or_after = jnp.arange(size)[None, :] >= jnp.arange(size)[:, None]
    # An absent completion keeps its own diagonal entry, so that no row is empty; its term is cut off below.
    remaining = at_or_after[None] & (valid[:, None, :] | jnp.eye(size, dtype=bool)[None])
    rest = jax.nn.logsumexp(jnp.broadcast_to(rewards[:, None, :], remaining.shape), axis=-1, where=remaining)
    return jnp.where(valid, rest - rewards, 0).sum(-1)


@method(id="self_supervised_po", system="Self-supervised preference optimization with preference degree",
        arxiv="2409.17791", fidelity="reconstruction", completions=2)
def self_supervised_po(logps: Array, ref_logps: Array, degree_logits: Array, *, beta: Any = 0.1,
                       gamma: Any = 0.1) -> Terms:
    """DPO plus gamma times the cross-entropy of telling how much of an answer's key content was removed.

    degree_logits: [B, N, C], a classifier's logits on N worsening versions of the answers (0: untouched), the
    version's index being its class; N = C, or 2 N' where the chosen and the rejected answer have N' versions each.
    logps, ref_logps: [B, 2]. Two terms: `dpo` by pairs, `degree` by sequences with scale gamma; the gradient of
    `degree` reaches classifier and policy. Source: arXiv 2409.17791 through summaries; pooling, the number of
    versions and gamma are ours. Left out: the key phrases (RAKE) and their removal, which make the versions.
    Raises ConfigError where there are more versions than classes.
    """
    logits = floats(degree_logits)
    if logits.ndim != 3 or logits.shape[1] > logits.shape[2]:
        raise ConfigError(f"degree_logits: found shape {logits.shape}; allowed: [B, N, C] with N <= C")
    entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.diagonal(logits, axis1=1, axis2=2)
    return Terms({"dpo": Term(dpo(logps, ref_logps, beta=beta)),
                  "degree": Term(entropy, scale=gamma, reduction="sequences")})
