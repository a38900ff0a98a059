"""Token-level preference losses, on [B, 2, L] arrays."""

from __future__ import annotations

from typing import Any

import jax

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair, token_sum
from alignax.ops import links
from alignax.types import Array


def _parts(token_logps, ref_token_logps, ref_policy_kl, mask):
    """(u, SeqKL chosen, SeqKL rejected), [B] each; u = lr(chosen) - lr(rejected)."""
    ratio = token_sum(floats(token_logps) - jax.lax.stop_gradient(floats(ref_token_logps)), mask)
    chosen, rejected = pair("token_logps", ratio)
    return chosen - rejected, *pair("ref_policy_kl", token_sum(ref_policy_kl, mask))


@method(id="tdpo", system="Token-level DPO (TDPO2)", arxiv="2404.11999", fidelity="official code", completions=2)
def tdpo(token_logps: Array, ref_token_logps: Array, ref_policy_kl: Array, mask: Array, *, beta: Any = 0.1,
         alpha: Any = 0.5) -> jax.Array:
    """TDPO2: sp(-beta (u - alpha (SeqKL(rejected) - sg[SeqKL(chosen)]))).

    u = lr(chosen) - lr(rejected); SeqKL = sum over completion tokens of KL(ref || policy). Sums, no length
    normalisation; beta multiplies the KL part too. token_logps, ref_token_logps, ref_policy_kl: [B, 2, L]; mask:
    bool [B, 2, L]; returns [B], mean over pairs. Gradients flow through SeqKL(rejected), not through SeqKL(chosen)
    or the reference. Source: arXiv 2404.11999, Vance0124/Token-level-Direct-Preference-Optimization.
    """
    u, kl_chosen, kl_rejected = _parts(token_logps, ref_token_logps, ref_policy_kl, mask)
    return links.logistic(beta * (u - alpha * (kl_rejected - jax.lax.stop_gradient(kl_chosen))))


@method(id="tdpo:tdpo1", system="Token-level DPO (TDPO1)", arxiv="2404.11999", fidelity="official code",
        completions=2)
def tdpo1(token_logps: Array, ref_token_logps: Array, ref_policy_kl: Array, mask: Array, *,
          beta: Any = 0.1) -> jax.Array:
    """TDPO1: sp(-beta (u - (SeqKL(rejected) - SeqKL(chosen)))), both KLs differentiated.

    Shapes, sums and source as `tdpo`.
    """
    u, kl_chosen, kl_rejected = _parts(token_logps, ref_token_logps, ref_policy_kl, mask)
    return links.logistic(beta * (u - (kl_rejected - kl_chosen)))
