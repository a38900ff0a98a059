"""What a pair loss is made of; `losses.compose` puts the parts together.

    m     = beta (r(chosen) - rejected_scale r(rejected)) - offset
    terms = preference: preference_weight * weight * link(m)    +    one extra term

Every part reads as a loss does: positional names are requests, keyword names hyper-parameters; `beta` is the loss's.
S = sum of the policy's log-probs over a completion, R the reference's, lr = S - R, n tokens, [B, 2] each. A part
returns its array, or a `Piece` where there is more to say. No gradient through references, offsets (but `dpop`) or
weights.

Not here: what orders or couples the pairs of a batch (AOT, relative preference optimisation, Dr. DPO), lists,
pointwise losses, and samplers of pairs or tokens (beta-DPO's filter, SamPO): use those losses themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.losses.anchored import _DIVERGENCES, discopop, exo, log_score_gap, wpo_weight
from alignax.losses.direct import _token_nll, adaptive_margin, alpha_dpo_state, shaped_reward
from alignax.losses.inputs import floats, log_ratios, pair, pair_log_ratios, pair_sums, per_token, sums
from alignax.losses.margins import _quality_gap
from alignax.losses.selective import _ratios, _shorter
from alignax.losses.shaped import _clipped, focal_po
from alignax.ops import links
from alignax.types import Array, Term


class Piece(NamedTuple):
    """What a part gives: values [B, 2] of a reward, [B] of an offset or weight; weight: what the mean over pairs is
    taken with (bool or float [B]); the new running state; metrics as (sum, count)."""

    values: Any
    weight: Any = 1.0
    new_state: Any = None
    metrics: Mapping[str, tuple[jax.Array, jax.Array]] = MappingProxyType({})


# Rewards r(y), [B, 2]


def log_ratio(logps: Array, ref_logps: Array) -> jax.Array:
    """lr: DPO, IPO, RSO and most others."""
    return log_ratios(logps, ref_logps)


def mean_log_ratio(logps: Array, ref_logps: Array, lengths: Array) -> jax.Array:
    """lr / n: LN-DPO, the averaged IPO."""
    return per_token(log_ratios(logps, ref_logps), lengths)


def logp(logps: Array) -> jax.Array:
    """S: SLiC, CPO."""
    return sums("logps", logps)


def mean_logp(logps: Array, lengths: Array) -> jax.Array:
    """S / n: SimPO."""
    return per_token(sums("logps", logps), lengths)


def likelihood(logps: Array, lengths: Array) -> jax.Array:
    """p = e^(S/n): SimPER (with the linear link)."""
    return jnp.exp(mean_logp(logps, lengths))


def log_odds(logps: Array, lengths: Array) -> jax.Array:
    """log(p / (1 - p)), p = e^(S/n): ORPO."""
    return links.log_odds_from_mean_logp(mean_logp(logps, lengths))


def shaped_logp(logps: Array, lengths: Array, *, shape_alpha: Any = 0.25, clip: Any = links.EXP_CLIP) -> jax.Array:
    """(1 - e^(-alpha S/n)) / alpha: AlphaPO; S / n where |alpha| < 1e-6. The exponent is held at `clip`."""
    return shaped_reward(mean_logp(logps, lengths), shape_alpha, clip)


def sharpened_log_ratio(logps: Array, ref_logps: Array, *, policy_alpha: Any = 0.95) -> jax.Array:
    """alpha S - R: H-DPO."""
    return policy_alpha * sums("logps", logps) - jax.lax.stop_gradient(sums("ref_logps", ref_logps))


def one_sided_log_ratio(logps: Array, ref_logps: Array) -> jax.Array:
    """lr of the chosen, max(0, lr) of the rejected: MinorDPO."""
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jnp.stack([chosen, jax.nn.relu(rejected)], 1)


def f_divergence(logps: Array, ref_logps: Array, *, divergence: str = "forward_kl", f_alpha: Any = 0.5,
                 clip: Any = links.EXP_CLIP) -> Piece:
    """f'(e^lr) of a divergence (static): reverse_kl, forward_kl, js, alpha: f-DPO. Exponents are held at `clip`."""
    ratios = log_ratios(logps, ref_logps)
    exponent = {"forward_kl": 1.0, "alpha": f_alpha}.get(divergence, 0.0) * ratios
    return Piece(_DIVERGENCES[divergence](ratios, f_alpha, clip), metrics=_clipped(exponent, clip))


def clipped_tokens(token_logps: Array, ref_token_logps: Array, mask: Array, *, log_low: Any = -1.0,
                   log_high: Any = 1.5) -> jax.Array:
    """sum_t of lr_t held in [log_low, log_high]: Humanline."""
    ratios = _ratios(token_logps, ref_token_logps, jnp.asarray(mask, bool))
    return jnp.clip(ratios, log_low, log_high).sum(-1)


def edited_tokens(token_logps: Array, ref_token_logps: Array, diff: Array, mask: Array, *,
                  other_weight: Any = 0.5) -> jax.Array:
    """sum_t w_t lr_t, w = 1 on tokens in which the pair differs, other_weight on the rest: span-weighted DPO."""
    ratios = _ratios(token_logps, ref_token_logps, jnp.asarray(mask, bool))
    return jnp.where(jnp.asarray(diff, bool), ratios, other_weight * ratios).sum(-1)


def leading_tokens(token_logps: Array, ref_token_logps: Array, mask: Array, *, tail_weight: Any = 0.5) -> jax.Array:
    """sum_t w_t lr_t, w = 1 on the first min(n_w, n_l) tokens, tail_weight beyond: LD-DPO."""
    mask = jnp.asarray(mask, bool)
    ratios = _ratios(token_logps, ref_token_logps, mask)
    return jnp.where(jnp.cumsum(mask, -1) <= _shorter(mask), ratios, tail_weight * ratios).sum(-1)


# Links f(m), [B] -> [B]; the first argument is the margin


def logistic(m: jax.Array) -> jax.Array:
    """sp(-m): DPO."""
    return links.logistic(m)


def smoothed(m: jax.Array, *, label_smoothing: Any = 0.1) -> jax.Array:
    """(1 - e) sp(-m) + e sp(m): conservative DPO."""
    return links.smoothed(m, label_smoothing)


def debiased(m: jax.Array, *, label_smoothing: Any = 0.1) -> jax.Array:
    """[(1 - e) sp(-m) - e sp(m)] / (1 - 2 e), e < 1/2: robust DPO."""
    return links.debiased(m, label_smoothing)


def hinge(m: jax.Array, *, delta: Any = 1.0) -> jax.Array:
    """max(0, delta - m): SLiC, RSO."""
    return links.hinge(m, delta)


def squared_hinge(m: jax.Array, *, delta: Any = 1.0) -> jax.Array:
    """max(0, delta - m)^2: GPO's truncated square."""
    return jnp.square(links.hinge(m, delta))


def square(m: jax.Array, *, tau: Any = 0.1) -> jax.Array:
    """(m - 1 / (2 tau))^2: IPO, whose beta is 1."""
    return links.square(m, 1 / (2 * tau))


def exponential(m: jax.Array, *, clip: Any = links.EXP_CLIP) -> Piece:
    """e^-m, the exponent held at `clip` with zero gradient beyond, counted in the metric `clipped`."""
    return Piece(links.exponential(m, clip), metrics=_clipped(m, clip))


def sigmoid(m: jax.Array) -> jax.Array:
    """1 - sigmoid(m), bounded: the second part of APO-down."""
    return jax.nn.sigmoid(-m)


def savage(m: jax.Array) -> jax.Array:
    """(1 - sigmoid(m))^2: GPO's Savage loss."""
    return jnp.square(jax.nn.sigmoid(-m))


def linear(m: jax.Array) -> jax.Array:
    """-m: SimPER; unbounded below for unbounded rewards."""
    return -m


def _of_pair(loss: Callable, m: jax.Array, **hyper: Any) -> jax.Array:
    """A pair loss that depends on its margin alone, as a link."""
    pairs = jnp.stack([m, jnp.zeros_like(m)], 1)
    return loss(pairs, jnp.zeros_like(pairs), beta=1.0, **hyper)


def reverse_kl(m: jax.Array, *, target_smoothing: Any = 1e-3) -> jax.Array:
    """KL((sigmoid(m), sigmoid(-m)) || (1 - e, e)): EXO."""
    return _of_pair(exo, m, label_smoothing=target_smoothing)


def blend(m: jax.Array, *, blend_tau: Any = 0.05, clip: Any = links.EXP_CLIP) -> jax.Array:
    """(1 - sigmoid(m / tau)) sp(-m) + sigmoid(m / tau) e^-m: DiscoPOP."""
    return _of_pair(discopop, m, tau=blend_tau, clip=clip)


def focal(m: jax.Array, *, focal_gamma: Any = 0.05) -> jax.Array:
    """sigmoid(m)^gamma sp(-m): FocalPO, the factor differentiated."""
    return _of_pair(focal_po, m, gamma=focal_gamma)


# Offsets, subtracted from the margin, [B]


def constant(*, gamma: Any = 0.5) -> Any:
    """gamma: SimPO's target margin."""
    return gamma


def scores(scores: Array, *, offset_scale: Any = 1.0) -> Piece:
    """scale log(s_w - s_l): ODPO; pairs whose scores tie or are inverted have weight 0."""
    gap, kept = log_score_gap(scores)
    return Piece(offset_scale * gap, kept)


def score_difference(scores: Array, *, offset_scale: Any = 1.0) -> jax.Array:
    """scale (s_w - s_l): refined DPO."""
    better, worse = pair("scores", jax.lax.stop_gradient(floats(scores)))
    return offset_scale * (better - worse)


def margins(margins: Array, *, offset_scale: Any = 1.0) -> jax.Array:
    """scale times the record's margin: sequential preference optimisation, MODPO."""
    return offset_scale * jax.lax.stop_gradient(floats(margins))


def lengths(lengths: Array, *, length_alpha: Any = 0.02) -> jax.Array:
    """-alpha (n_w - n_l): R-DPO, iLR-DPO."""
    longer, other = pair("lengths", floats(lengths))
    return -length_alpha * (longer - other)


def dpop(logps: Array, ref_logps: Array, *, beta: Any = 0.1, penalty: Any = 50.0) -> jax.Array:
    """beta lambda max(0, -lr_w), differentiated: DPO-Positive."""
    return beta * penalty * jax.nn.relu(-pair_log_ratios(logps, ref_logps)[0])


def aux_prompt(aux_prompt_logps: Array, aux_prompt_ref_logps: Array, *, beta: Any = 0.1,
               offset_scale: Any = 1.0) -> jax.Array:
    """scale beta D', D' the pair's difference of log-ratios under another prompt: Sr-DPO."""
    return offset_scale * _quality_gap(aux_prompt_logps, aux_prompt_ref_logps, beta)


def adaptive(logps: Array, ref_logps: Array, lengths: Array, state: Any, *, beta: Any = 0.1,
             target_gamma: Any = 0.6, target_alpha: Any = 0.2, momentum: Any = 0.9) -> Piece:
    """beta (gamma + alpha z), z the standardised gap to the reference, with running mean and deviation: alpha-DPO."""
    target, new_state = adaptive_margin(logps, ref_logps, lengths, state, target_gamma, target_alpha, momentum)
    count = (target.sum().astype(jnp.float32), jnp.float32(target.size))
    return Piece(beta * target, new_state=new_state, metrics={"margin_target": count})


# Weights of the preference term, [B]


def wpo(token_logps: Array, log_sum_sq: Array, mask: Array) -> jax.Array:
    """min(1, w_w w_l) of WPO: how likely the pair is under the policy, on the scale of its own samples."""
    return wpo_weight(token_logps, log_sum_sq, mask)


def weights(weights: Array) -> Piece:
    """The record's weight, in a weighted mean: sum(w f) / sum(w)."""
    return Piece(1.0, jax.lax.stop_gradient(floats(weights)))


# Extra terms


def nll(logps: Array, *, extra_weight: Any = 0.1) -> Term:
    """-S_w by pairs: SLiC, SFT-DPO, the cumulative RPO."""
    return Term(-pair_sums("logps", logps)[0], scale=extra_weight)


def nll_mean(logps: Array, lengths: Array, *, extra_weight: Any = 0.1) -> Term:
    """-S_w / n_w by pairs: RPO."""
    return Term(-per_token(pair_sums("logps", logps)[0], pair("lengths", lengths)[0]), scale=extra_weight)


def nll_tokens(logps: Array, lengths: Array, *, extra_weight: Any = 0.1) -> Term:
    """-sum S_w / sum n_w, the token mean over the batch: CPO, ORPO."""
    return _token_nll(logps, lengths, extra_weight)


def calibration(logps: Array, ref_logps: Array, *, calibration_beta: Any = 1e-3, extra_weight: Any = 0.1) -> Term:
    """(lr_w - 1 / (2 b))^2 + (lr_l + 1 / (2 b))^2, b = calibration_beta: Cal-DPO."""
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    target = 1 / (2 * calibration_beta)
    return Term(links.square(chosen, target) + links.square(rejected, -target), scale=extra_weight)


def constraint(logps: Array, ref_logps: Array, *, extra_weight: Any = 0.1) -> Term:
    """(lr_w + lr_l)^2: C2-DPO."""
    return Term(jnp.square(sum(pair_log_ratios(logps, ref_logps))), scale=extra_weight)


def reference_sample(reference_sample_logps: Array, *, extra_weight: Any = 0.1) -> Term:
    """-S of completions sampled from the reference, by sequences: TYPO."""
    return Term(-sums("reference_sample_logps", reference_sample_logps), 1.0, "sequences", extra_weight)


def _table(*parts: Callable) -> Mapping[str, Callable]:
    return MappingProxyType({part.__name__: part for part in parts})


NONE = "none"
REWARDS = _table(log_ratio, mean_log_ratio, logp, mean_logp, likelihood, log_odds, shaped_logp, sharpened_log_ratio,
                 one_sided_log_ratio, f_divergence, clipped_tokens, edited_tokens, leading_tokens)
LINKS = _table(logistic, smoothed, debiased, hinge, squared_hinge, square, exponential, sigmoid, savage, linear,
               reverse_kl, blend, focal)
OFFSETS = _table(constant, scores, score_difference, margins, lengths, dpop, aux_prompt, adaptive)
WEIGHTS = _table(wpo, weights)
EXTRAS = _table(nll, nll_mean, nll_tokens, calibration, constraint, reference_sample)
KINDS: Mapping[str, Mapping[str, Callable]] = MappingProxyType(
    {"reward": REWARDS, "link": LINKS, "offset": OFFSETS, "weight": WEIGHTS, "extra": EXTRAS})
"""Kind -> name -> part. Offset, weight and extra may also be `none`."""

INIT_STATE: Mapping[Callable, Callable[[], Any]] = MappingProxyType({adaptive: alpha_dpo_state})
"""Parts with a running state -> what makes it; such parts read the whole batch."""

LIMITS: Mapping[Callable, Mapping[str, tuple[float, float]]] = MappingProxyType(
    {debiased: {"label_smoothing": (0.0, 0.499)}, reverse_kl: {"target_smoothing": (1e-12, 0.5)}})
STATIC: Mapping[str, tuple[str, ...]] = MappingProxyType({"divergence": tuple(_DIVERGENCES)})
"""Hyper-parameters that are names -> the legal ones."""
