"""DPO with a weight on every token: sparse masks from a reference model, confidence on edited tokens. [B, 2, L] arrays.

l_t = log pi(y_t) - log pi_ref(y_t), KL_t = KL(pi_ref || pi) at slot t; sp = softplus. Sums over completion tokens, no
length normalisation; no gradient into the reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, token_sum
from alignax.losses.steps import ratios
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _sparse(token_logps: Any, ref_token_logps: Any, ref_policy_kl: Any, reward_mask: Any, kl_mask: Any, mask: Any,
            beta: Any) -> jax.Array:
    """sp(-beta (u - d)), [B]: weighted log-ratios and weighted KLs, each masked before it is multiplied."""
    mask = jnp.asarray(mask, bool)
    inside = lambda x: jnp.where(mask, floats(x), 0)
    u = (inside(reward_mask) * ratios(token_logps, ref_token_logps, mask)).sum(-1)
    d = (inside(kl_mask) * inside(ref_policy_kl)).sum(-1)
    chosen, rejected = pair("token_logps", u)
    kl_chosen, kl_rejected = pair("ref_policy_kl", d)
    return links.logistic(beta * (chosen - rejected - (kl_rejected - kl_chosen)))


def _size(weights: Any, mask: Any) -> jax.Array:
    """Sum of |weights| over the tokens of both completions, [B]."""
    return token_sum(jnp.abs(floats(weights)), mask).sum(-1)


@method(id="sparse_po", system="SparsePO: sparse token masks, independent", arxiv="2410.05102",
        fidelity="official code", completions=2)
def sparse_po(token_logps: Array, ref_token_logps: Array, ref_policy_kl: Array, reward_mask: Array, kl_mask: Array,
              mask: Array, *, beta: Any = 0.8, reward_l1: Any = 0.0, kl_l1: Any = 0.0) -> Terms:
    """TDPO1 with learned token weights: sp(-beta (u - d)) + reward_l1 |m_u|_1 + kl_l1 |m_d|_1.

    u = sum_t m_u(t) l_t on y_w minus the same on y_l; d = sum_t m_d(t) KL_t on y_l minus the same on y_w; m_u =
    reward_mask, m_d = kl_mask, both >= 0. All arrays [B, 2, L]. Three terms by pairs: `preference`, `reward_l1` and
    `kl_l1`, the sums of |m| over the tokens of both completions. Gradients flow into the weights and through both KLs.
    Source: arXiv 2410.05102, huawei-noah/HEBO (beta 0.1 on HH). Left out: that code's dropout on the masks and their
    own weight decay. Where the weights come from, see `models.token_heads`.
    """
    values = _sparse(token_logps, ref_token_logps, ref_policy_kl, reward_mask, kl_mask, mask, beta)
    return Terms({"preference": Term(values), "reward_l1": Term(_size(reward_mask, mask), scale=reward_l1),
                  "kl_l1": Term(_size(kl_mask, mask), scale=kl_l1)})


@method(id="sparse_po:common", system="SparsePO: one common mask", arxiv="2410.05102", fidelity="official code",
        completions=2)
def sparse_po_common(token_logps: Array, ref_token_logps: Array, ref_policy_kl: Array, reward_mask: Array,
                     mask: Array, *, beta: Any = 0.8, l1: Any = 0.0) -> Terms:
    """`sparse_po` with one learned weight for log-ratio and KL; its size counts once. Two terms by pairs:
    `preference`, and `l1` with scale l1 (0.001 on HH in the paper). Shapes and source as there."""
    values = _sparse(token_logps, ref_token_logps, ref_policy_kl, reward_mask, reward_mask, mask, beta)
    return Terms({"preference": Term(values), "l1": Term(_size(reward_mask, mask), scale=l1)})


@method(id="sparse_po:mapo", system="MaPO: masks from the reference's activations", arxiv="2410.05102",
        fidelity="official code", completions=2)
def sparse_po_mapo(token_logps: Array, ref_token_logps: Array, ref_policy_kl: Array, activation_mask: Array,
                   mask: Array, *, beta: Any = 0.8) -> jax.Array:
    """`sparse_po` with a fixed weight in [0, 1] from the reference's activations, constant; returns [B].

    Shapes and source as there. Which activations enter is the provider's choice: see `models.token_heads`.
    """
    weight = jax.lax.stop_gradient(floats(activation_mask))
    return _sparse(token_logps, ref_token_logps, ref_policy_kl, weight, weight, mask, beta)


_REF_WEIGHTS = ("policy", "self")


@method(id="bmc", system="Bridging and modelling correlations in pairs", arxiv="2408.07471", fidelity="paper",
        completions=2)
def bmc(token_logps: Array, ref_token_logps: Array, diff: Array, mask: Array, *, beta: Any = 0.05, delta: Any = 3.0,
        ref_weights: str = "policy") -> jax.Array:
    """DPO with confidence weights on edited tokens: sp(-beta (sum_t lam_t l_t on y_w - the same on y_l)).

    lam_t = 1 + min(sg[1 / pi(y_t)], delta) where `diff`, else 1: unsure tokens weigh more, on both sides alike.
    token_logps, ref_token_logps, diff (bool), mask: [B, 2, L]; returns [B], mean over pairs. No gradient through lam.
    ref_weights (static): policy, one lam for policy and reference (the paper); self, the reference's log-probs are
    weighted by its own probabilities, as the official code does. Source: arXiv 2408.07471, YJiangcm/BMC (delta 2.5 on
    mathematics, 2.0 with beta 0.01 on instructions). Left out: the edited chosen answer (the bridging), and the stop
    words that the code takes out of the diff. Raises ConfigError for another value of ref_weights.
    """
    if ref_weights not in _REF_WEIGHTS:
        raise ConfigError(f"bmc: ref_weights = {ref_weights!r}; allowed: {', '.join(_REF_WEIGHTS)}")
    mask, edited = jnp.asarray(mask, bool), jnp.asarray(diff, bool)

    def weight(logps):
        # min(1/p, delta) as an exponent, which cannot overflow.
        power = jnp.minimum(-jax.lax.stop_gradient(logps), jnp.log(jnp.asarray(delta, logps.dtype)))
        return 1 + jnp.where(edited, jnp.exp(power), 0)

    logps, ref = (jnp.where(mask, floats(x), 0) for x in (token_logps, jax.lax.stop_gradient(ref_token_logps)))
    ours = weight(logps)
    theirs = weight(ref) if ref_weights == "self" else ours
    # One weight times the difference: at pi = pi_ref the log-ratio is then exactly 0.
    sequences = (ours * (logps - ref) if ref_weights == "policy" else ours * logps - theirs * ref).sum(-1)
    chosen, rejected = pair("token_logps", sequences)
    return links.logistic(beta * (chosen - rejected))
