"""Pairs and groups of step sequences: every token is a step. [B, K, L] arrays and masks; sp = softplus.

lr_t = log pi(a_t) - log pi_ref(a_t); no gradient into the reference or the snapshot.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _steps(x: Any, mask: jax.Array) -> jax.Array:
    """x as floats, 0 outside the mask."""
    return jnp.where(mask, floats(x), 0)


def _ratios(token_logps: Any, ref_token_logps: Any, mask: jax.Array) -> jax.Array:
    return _steps(token_logps, mask) - jax.lax.stop_gradient(_steps(ref_token_logps, mask))


def _contrast(steps: jax.Array, labels: Any, mask: jax.Array, alpha: Any, lam: Any, gamma: Any,
              bc_weight: Any, logps: Any) -> Terms:
    """CPL's loss on step values, soft in the label, and its behaviour-cloning term."""
    number = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)  # of the action: what others wrote in between takes no time
    discount = jnp.asarray(gamma, steps.dtype) ** number.astype(steps.dtype)
    first, second = pair("token_logps", alpha * (discount * steps).sum(-1))
    one, two = pair("labels", floats(labels))
    share = jax.lax.stop_gradient(jnp.clip((1 + one - two) / 2, 0, 1))
    values = share * links.logistic(first - lam * second) + (1 - share) * links.logistic(second - lam * first)
    return Terms({"preference": Term(values), "cloning": Term(-floats(logps), mask, "tokens", bc_weight)})


@method(id="cpl", system="Contrastive Preference Learning", arxiv="2310.13639", fidelity="official code", completions=2)
def cpl(token_logps: Array, labels: Array, mask: Array, *, alpha: Any = 0.1, lam: Any = 0.5, gamma: Any = 1.0,
        bc_weight: Any = 0.0) -> Terms:
    """Contrastive preference learning: sp(-(A+ - lam A-)), A = alpha sum_t gamma^t log pi(a_t | s_t).

    t counts the scored tokens. labels: [B, 2]; segment 0 is preferred with share (1 + l_0 - l_1) / 2, so (1, 0),
    (0, 1) and a tie (equal labels) give 1, 0 and 1/2; a soft label mixes the two orders. lam in (0, 1] is the
    conservative bias. token_logps, mask: [B, 2, L]. Two terms: `preference` by pairs, and `cloning`, the mean of
    -log pi over all steps of both segments, with scale bc_weight (CPL-BC: 1, with lam 1). Source: arXiv 2310.13639,
    jhejna/cpl (gamma 1 there). Left out: rankings of more than two segments, behaviour-cloning pre-training.
    """
    mask = jnp.asarray(mask, bool)
    return _contrast(_steps(token_logps, mask), labels, mask, alpha, lam, gamma, bc_weight, token_logps)


@method(id="cpl:kl", system="Contrastive Preference Learning with a reference", arxiv="2310.13639",
        fidelity="official code", completions=2)
def cpl_kl(token_logps: Array, ref_token_logps: Array, labels: Array, mask: Array, *, alpha: Any = 0.2,
           lam: Any = 0.75, gamma: Any = 1.0, bc_weight: Any = 0.0) -> Terms:
    """CPL-KL: `cpl` with log pi - log pi_ref in A; lam = 1 and gamma = 1 is DPO on the sums. Terms, source: `cpl`."""
    mask = jnp.asarray(mask, bool)
    ratios = _ratios(token_logps, ref_token_logps, mask)
    return _contrast(ratios, labels, mask, alpha, lam, gamma, bc_weight, token_logps)


@method(id="d3po", system="D3PO: preference optimisation over denoising trajectories (trajectory form)",
        arxiv="2311.13231", fidelity="official code", completions=2, limits={"clip": (1e-6, 0.999999)})
def d3po(token_logps: Array, ref_token_logps: Array, labels: Array, mask: Array, *, beta: Any = 0.1, clip: Any = 0.1,
         form: str = "step") -> Terms:
    """D3PO: every step inherits the trajectory's label: mean over t of sp(-beta h (c_t^0 - c_t^1)).

    c_t = lr_t clipped to [log(1 - clip), log(1 + clip)], gradient 0 outside; h = sign(l_0 - l_1): 1, -1, or 0 for a
    tie, which costs log 2 without gradient. form (static): step, over the steps that both trajectories have, mean
    over steps and then over pairs; trajectory, sp(-beta h (sum_t lr_t^0 - sum_t lr_t^1)) unclipped, by pairs, which
    is DPO on paths (ours, for text). token_logps, ref_token_logps, mask: [B, 2, L]; labels: [B, 2]. One term `loss`.
    Source: arXiv 2311.13231, yk7333/d3po. Left out: one optimiser step per denoising step.
    """
    if form not in ("step", "trajectory"):
        raise ConfigError(f"d3po: form = {form!r}; allowed: 'step', 'trajectory'")
    mask = jnp.asarray(mask, bool)
    ratios = _ratios(token_logps, ref_token_logps, mask)
    one, two = pair("labels", floats(labels))
    sign = jax.lax.stop_gradient(jnp.sign(one - two))
    if form == "trajectory":
        first, second = pair("token_logps", ratios.sum(-1))
        return Terms({"loss": Term(links.logistic(beta * sign * (first - second)))})
    clip = jnp.asarray(clip, ratios.dtype)
    first, second = pair("token_logps", jnp.clip(ratios, jnp.log1p(-clip), jnp.log1p(clip)))
    values = links.logistic(beta * sign[:, None] * (first - second))
    return Terms({"loss": Term(values, mask[:, 0] & mask[:, 1], "seq_mean_token_mean")})


@method(id="prdp", system="Reward difference prediction (trajectory form)", arxiv="2402.08714", fidelity="paper")
def prdp(token_logps: Array, ref_token_logps: Array, old_token_logps: Array, scores: Array, mask: Array,
         valid: Array, *, beta: Any = 1.0, clip: Any = 0.2, time_reduce: str = "sum", skip_ties: bool = False) -> Terms:
    """Proximal reward difference prediction: max(l, l^c), l = ((h_a - h_b) - (r_a - r_b) / beta)^2.

    h = sum_t lr_t; l^c the same with every lr_t clipped to within `clip` of its value under the snapshot pi_old
    (constant). token arrays and mask: [B, K, L]; scores, valid: [B, K]; r = scores. One term `loss`: the mean over
    the K (K - 1) / 2 pairs of a prompt, then over prompts that have pairs. time_reduce (static): `sum`, or `mean` over
    the steps, as the paper's listing does; skip_ties (static): pairs with r_a = r_b drop out, as they do there.
    Source: arXiv 2402.08714. Its beta and clip (3e-6 and 1e-4) belong to diffusion log-probs; the defaults here are
    ours, clip in nats per token. Left out: the epochs of sampling, between which pi_old is renewed.
    """
    if time_reduce not in ("sum", "mean"):
        raise ConfigError(f"prdp: time_reduce = {time_reduce!r}; allowed: 'sum', 'mean'")
    valid = jnp.asarray(valid, bool)
    mask = jnp.asarray(mask, bool) & valid[..., None]
    steps = _ratios(token_logps, ref_token_logps, mask)
    old = jax.lax.stop_gradient(_steps(old_token_logps, mask) - _steps(ref_token_logps, mask))
    near = jnp.clip(steps, old - clip, old + clip)
    count = jnp.maximum(mask.sum(-1), 1) if time_reduce == "mean" else 1
    reward = jnp.where(valid, jax.lax.stop_gradient(floats(scores)), 0)
    gap = lambda x: x[:, :, None] - x[:, None, :]
    losses = [jnp.square(gap(jnp.where(mask, h, 0).sum(-1) / count) - gap(reward) / beta) for h in (steps, near)]
    order = jnp.arange(reward.shape[1])
    pairs = valid[:, :, None] & valid[:, None, :] & (order[:, None] < order[None, :])[None]
    if skip_ties:
        pairs &= gap(reward) != 0
    flat = lambda x: x.reshape(x.shape[0], -1)
    return Terms({"loss": Term(flat(jnp.maximum(*losses)), flat(pairs), "seq_mean_token_mean")})
