"""Reference-free pairs; in alpha-DPO the reference enters the margin only.

S = token sum of the policy's log-probs, n tokens, [B, 2] each; sp = softplus.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, pair_sums, per_token, sums
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _token_nll(logps: Array, lengths: Array, scale: Any = 1.0) -> Term:
    """NLL of the chosen as a token mean over the batch: -sum S_w / sum n_w."""
    chosen, _ = pair_sums("logps", logps)
    tokens = pair("lengths", floats(lengths))[0]
    return Term(-per_token(chosen, tokens), tokens, "tokens", scale)


@method(id="simpo", system="SimPO", arxiv="2405.14734", fidelity="official code", completions=2)
def simpo(logps: Array, lengths: Array, *, beta: Any = 2.0, gamma: Any = 0.5) -> jax.Array:
    """Simple preference optimisation: sp(-(beta S_w / n_w - beta S_l / n_l - gamma)).

    logps, lengths: [B, 2]; returns [B], mean over pairs. gamma is the target margin itself, not its ratio to beta
    (the paper's code: gamma = ratio * beta; 0.25 * 2.0 = 0.5). Source: arXiv 2405.14734, princeton-nlp/SimPO.
    Left out: label smoothing, hinge link, SFT term.
    """
    chosen, rejected = pair("logps", per_token(sums("logps", logps), lengths))
    return links.logistic(beta * (chosen - rejected) - gamma)


def shaped_reward(mean: jax.Array, alpha: Any, clip: Any) -> jax.Array:
    """(1 - exp(-alpha mean)) / alpha, its limit `mean` where |alpha| < 1e-6; the exponent is held at `clip`."""
    alpha = jnp.asarray(alpha, mean.dtype)
    tiny = jnp.abs(alpha) < 1e-6
    safe = jnp.where(tiny, 1, alpha)
    exponent = -safe * mean
    exponent = jnp.where(exponent <= clip, exponent, jnp.asarray(clip, mean.dtype))
    return jnp.where(tiny, mean, -jnp.expm1(exponent) / safe)


@method(id="alpha_po", system="AlphaPO", arxiv="2501.03884", fidelity="third-party code", completions=2)
def alpha_po(logps: Array, lengths: Array, *, beta: Any = 2.5, gamma: Any = 0.25, alpha: Any = 0.25,
             clip: Any = links.EXP_CLIP) -> jax.Array:
    """Reward-shaped SimPO: sp(-(beta (r_w - r_l) - gamma)), r = (1 - exp(-alpha S/n)) / alpha.

    alpha may be negative; |alpha| < 1e-6 uses the limit r = S/n (SimPO). The exponent is clipped at `clip` with zero
    gradient beyond. logps, lengths: [B, 2]; returns [B]. Source: arXiv 2501.03884 via TRL and oxRL.
    """
    chosen, rejected = pair("logps", shaped_reward(per_token(sums("logps", logps), lengths), alpha, clip))
    return links.logistic(beta * (chosen - rejected) - gamma)


@method(id="orpo", system="ORPO", arxiv="2403.07691", fidelity="official code", completions=2)
def orpo(logps: Array, lengths: Array, *, lam: Any = 0.1) -> Terms:
    """Odds-ratio preference optimisation: NLL(chosen) + lam sp(-(o_w - o_l)), o = log(p / (1 - p)), p = e^(S/n).

    logps, lengths: [B, 2]. Two terms: `nll`, token mean over the batch (-S_w / n_w weighted by n_w), and
    `odds_ratio` by pairs with scale lam. Mean log-probs within one float epsilon of 0 are clipped there with zero
    gradient (`links.log_odds_from_mean_logp`). Source: arXiv 2403.07691, xfactlab/orpo; the NLL over completion
    tokens only, which that code offers as an option.
    """
    odds = links.log_odds_from_mean_logp(per_token(sums("logps", logps), lengths))
    chosen, rejected = pair("logps", odds)
    return Terms({
        "nll": _token_nll(logps, lengths),
        "odds_ratio": Term(links.logistic(chosen - rejected), 1.0, "pairs", lam),
    })


@method(id="asft", system="ASFT: aligned supervised fine-tuning", arxiv="2409.10571", fidelity="third-party code",
        completions=2)
def asft(logps: Array, lengths: Array, *, lam: Any = 0.1) -> jax.Array:
    """Aligned SFT: -log p_w + lam (sp(-o_w) + sp(o_l)), which is -(1 + lam) log p_w - lam log(1 - p_l).

    p = e^(S/n), o its log-odds (clipped as in `orpo`). logps, lengths: [B, 2]; returns [B]. Source: arXiv 2409.10571
    as restated in 2502.01237, and turbo-alignment.
    """
    mean = per_token(sums("logps", logps), lengths)
    chosen, rejected = pair("logps", links.log_odds_from_mean_logp(mean))
    return -mean[:, 0] + lam * (links.logistic(chosen) + links.logistic(-rejected))


@method(id="cpo", system="CPO: contrastive preference optimisation", arxiv="2401.08417", fidelity="official code",
        completions=2)
def cpo(logps: Array, lengths: Array, *, beta: Any = 0.1, lam: Any = 1.0, nll: str = "tokens") -> Terms:
    """Contrastive preference optimisation: sp(-beta (S_w - S_l)) + lam NLL(chosen).

    logps, lengths: [B, 2]. Two terms: `preference` by pairs and `nll` with scale lam: nll (static) = `tokens`, token
    mean over the batch (the code), or `sequences`, mean of -S_w (the paper). Source: arXiv 2401.08417, fe1ixxu/ALMA.
    """
    if nll not in ("tokens", "sequences"):
        raise ConfigError(f"cpo: nll = {nll!r}; allowed: 'tokens', 'sequences'")
    chosen, rejected = pair_sums("logps", logps)
    term = _token_nll(logps, lengths, lam) if nll == "tokens" else Term(-chosen, scale=lam)
    return Terms({"preference": Term(links.logistic(beta * (chosen - rejected))), "nll": term})


@method(id="slic_hf", system="SLiC-HF", arxiv="2305.10425", fidelity="third-party code", completions=2)
def slic_hf(logps: Array, *, delta: Any = 1.0, lam: Any = 0.1) -> Terms:
    """Sequence likelihood calibration: relu(delta - S_w + S_l) - lam S_w, the chosen as the SFT target.

    logps: [B, 2] sums. Two terms by pairs: `calibration` and `nll` (scale lam). Source: arXiv 2305.10425 as restated
    by the RSO paper, ContextualAI/HALOs. Left out: a separate SFT target, the sample-rank recipe.
    """
    chosen, rejected = pair_sums("logps", logps)
    return Terms({"calibration": Term(links.hinge(chosen - rejected, delta)), "nll": Term(-chosen, scale=lam)})


@method(id="new_desiderata", system="New desiderata for DPO (proposed loss)", arxiv="2407.09072",
        fidelity="reconstruction", completions=2)
def typo(logps: Array, reference_sample_logps: Array, *, lam: Any = 0.1) -> Terms:
    """TYPO: sp(-(S_w - S_l)) + lam mean of -S(y'), y' sampled from the reference, log-probs instead of log-ratios.

    logps: [B, 2]; reference_sample_logps: [B, K'] sums of the policy on the samples, which may belong to other
    prompts. Two terms: `preference` by pairs, `reference` by sequences with scale lam; lam moves the optimum from the
    Bradley-Terry policy (0) to the reference (infinity). Source: arXiv 2407.09072 by recall and summaries; the
    weighting of the two parts could not be read, and the default of lam is ours. Left out: soft labels.
    """
    chosen, rejected = pair_sums("logps", logps)
    samples = -sums("reference_sample_logps", reference_sample_logps)
    return Terms({"preference": Term(links.logistic(chosen - rejected)),
                  "reference": Term(samples, scale=lam, reduction="sequences")})


def alpha_dpo_state() -> dict[str, jax.Array]:
    """The running mean and deviation of alpha-DPO's gap: float32 scalars, zero before the first update."""
    return {"mean": jnp.zeros((), jnp.float32), "std": jnp.zeros((), jnp.float32)}


def adaptive_margin(logps: Array, ref_logps: Array, lengths: Array, state: Any, gamma_ratio: Any, alpha: Any,
                    momentum: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sg[gamma_ratio + alpha z] of `alpha_dpo`, [B]; the new running mean and deviation)."""
    chosen, rejected = pair("logps", per_token(sums("logps", logps), lengths))
    ref_chosen, ref_rejected = pair("ref_logps", per_token(sums("ref_logps", ref_logps), lengths))
    gap = jax.lax.stop_gradient(chosen - rejected - (ref_chosen - ref_rejected))
    deviation = jnp.std(gap, ddof=1) if gap.shape[0] > 1 else jnp.zeros((), gap.dtype)
    mean = momentum * state["mean"] + (1 - momentum) * gap.mean()
    std = momentum * state["std"] + (1 - momentum) * deviation
    spread = std > 1e-8
    z = jnp.where(spread, (gap - mean) / jnp.where(spread, std, 1), 0)
    target = jax.lax.stop_gradient(gamma_ratio + alpha * z)
    return target, jax.tree.map(lambda x: x.astype(jnp.float32), {"mean": mean, "std": std})


@method(id="alpha_dpo", system="alpha-DPO: adaptive reward margin", arxiv="2410.10148", fidelity="official code",
        couples_batch=True, completions=2, init_state=alpha_dpo_state)
def alpha_dpo(logps: Array, ref_logps: Array, lengths: Array, state: Any, *, beta: Any = 2.5, gamma_ratio: Any = 0.6,
              alpha: Any = 0.2, momentum: Any = 0.9, label_smoothing: Any = 0.0) -> Terms:
    """SimPO with an adaptive margin: smoothed logistic of beta (u - sg[gamma_ratio + alpha z]), u = S_w/n_w - S_l/n_l.

    gap = u - u_ref over the global batch. State first: M <- momentum M + (1 - momentum) mean(gap), the same for s with
    the sample deviation; z = (gap - M) / s, 0 while s is 0 (below 1e-8). logps, ref_logps, lengths: [B, 2]; state:
    {mean, std}. One term `loss` by pairs, new_state, and the metric `margin_target`. Defaults: Llama-3-8B-Instruct.
    Source: arXiv 2410.10148, junkangwu/alpha-DPO.
    """
    chosen, rejected = pair("logps", per_token(sums("logps", logps), lengths))
    target, new_state = adaptive_margin(logps, ref_logps, lengths, state, gamma_ratio, alpha, momentum)
    metric = (target.sum().astype(jnp.float32), jnp.float32(target.size))
    return Terms({"loss": Term(links.smoothed(beta * (chosen - rejected - target), label_smoothing))}, new_state,
                 {"margin_target": metric})


@method(id="simper", system="SimPER: inverse perplexity", arxiv="2502.00883", fidelity="official code", completions=2)
def simper(logps: Array, lengths: Array) -> jax.Array:
    """SimPER: -exp(S_w / n_w) + exp(S_l / n_l), without hyper-parameters; [B, 2] -> [B], bounded by 1.

    Source: arXiv 2502.00883, tengxiao1/SimPER.
    """
    chosen, rejected = pair("logps", jnp.exp(per_token(sums("logps", logps), lengths)))
    return rejected - chosen


def _error_score(x: jax.Array) -> jax.Array:
    """x / (e^x - 1) for x >= 0, 1 at 0."""
    tiny = x < 1e-4
    safe = jnp.where(tiny, 1, x)
    return jnp.where(tiny, 1 - x / 2, safe * jnp.exp(-safe) / -jnp.expm1(-safe))


@method(id="mapo_margin", system="MaPO: margin-aware preference optimisation without reference", arxiv="2406.06424",
        fidelity="official code", completions=2)
def mapo_margin(logps: Array, lengths: Array, *, beta: Any = 0.1, snr: Any = 0.5, steps: Any = 1.0) -> Terms:
    """Margin-aware preference optimisation: e_w + beta sp(-T (F(e_w) - F(e_l))), F(e) = s e / (e^(s e) - 1).

    e = -S / n here (the denoising error in the paper, with T = 1000 steps; T = steps = 1 for text is ours), s = snr.
    logps, lengths: [B, 2]. Two terms by pairs: `error`, and `margin` with scale beta. Source: arXiv 2406.06424,
    mapo-t2i/mapo.
    """
    error = -per_token(sums("logps", logps), lengths)
    chosen, rejected = pair("logps", _error_score(snr * error))
    return Terms({"error": Term(error[:, 0]), "margin": Term(links.logistic(steps * (chosen - rejected)), scale=beta)})


def _triple(name: str, x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gold, chosen, rejected) of [B, 3], or of [B, 2], where the chosen is the gold answer too."""
    if jnp.ndim(x) != 2 or jnp.shape(x)[1] not in (2, 3):
        raise ConfigError(f"{name}: found shape {jnp.shape(x)}; allowed: [B, 3] (gold, chosen, rejected) or [B, 2]")
    return x[:, 0], x[:, -2], x[:, -1]


def _gold_nll(logps: Any, lengths: Any, scale: Any) -> Term:
    gold, tokens = _triple("logps", sums("logps", logps))[0], floats(lengths)[:, 0]
    return Term(-per_token(gold, tokens), tokens, "tokens", scale)


@method(id="tpo_triple", system="TPO: triple preference optimisation", arxiv="2405.16681", fidelity="official code")
def tpo_triple(logps: Array, lengths: Array, *, beta: Any = 0.01, alpha: Any = 1.0) -> Terms:
    """Triple preference optimisation: sp(-beta (S_w - S_l)) + alpha NLL(gold), the NLL a token mean over the batch.

    logps, lengths: [B, 3], gold, chosen, rejected (best first); on pairs [B, 2] the chosen answer is the gold one,
    which is CPO. Two terms: `preference` by pairs, `nll` by tokens with scale alpha. Source: arXiv 2405.16681,
    sahsaeedi/triple-preference-optimization. Left out: hinge and square links.
    """
    _, chosen, rejected = _triple("logps", sums("logps", logps))
    return Terms({"preference": Term(links.logistic(beta * (chosen - rejected))),
                  "nll": _gold_nll(logps, lengths, alpha)})


@method(id="tpo_triple:length", system="TPO-L: triple preference optimisation, length-normalised",
        arxiv="2405.16681", fidelity="official code")
def tpo_l(logps: Array, lengths: Array, *, beta: Any = 2.0, gamma: Any = 0.5, alpha: Any = 1.0) -> Terms:
    """TPO-L: sp(-(beta (S_w / n_w - S_l / n_l) - gamma)) + alpha NLL(gold); shapes, terms, source as `tpo_triple`."""
    _, chosen, rejected = _triple("logps", per_token(sums("logps", logps), lengths))
    return Terms({"preference": Term(links.logistic(beta * (chosen - rejected) - gamma)),
                  "nll": _gold_nll(logps, lengths, alpha)})
