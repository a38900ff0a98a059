"""Reference-free pairs. S = token sum of the policy's log-probs, n tokens, [B, 2] each; sp = softplus."""

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


@method(id="alpha_po", system="AlphaPO", arxiv="2501.03884", fidelity="third-party code", completions=2)
def alpha_po(logps: Array, lengths: Array, *, beta: Any = 2.5, gamma: Any = 0.25, alpha: Any = 0.25,
             clip: Any = links.EXP_CLIP) -> jax.Array:
    """Reward-shaped SimPO: sp(-(beta (r_w - r_l) - gamma)), r = (1 - exp(-alpha S/n)) / alpha.

    alpha may be negative; |alpha| < 1e-6 uses the limit r = S/n (SimPO). The exponent is clipped at `clip` with zero
    gradient beyond. logps, lengths: [B, 2]; returns [B]. Source: arXiv 2501.03884 via TRL and oxRL.
    """
    mean = per_token(sums("logps", logps), lengths)
    alpha = jnp.asarray(alpha, mean.dtype)
    tiny = jnp.abs(alpha) < 1e-6
    safe = jnp.where(tiny, 1, alpha)
    exponent = -safe * mean
    exponent = jnp.where(exponent <= clip, exponent, jnp.asarray(clip, mean.dtype))
    chosen, rejected = pair("logps", jnp.where(tiny, mean, -jnp.expm1(exponent) / safe))
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
