"""The CHES score: from hidden states alone, how far training on a pair would displace its chosen completion.

Source: Razin et al., Unintentional Unalignment (arXiv 2410.08847); fidelity: paper, its formulas on padded batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ches(hidden: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(CHES, length-normalised CHES) of pairs, [B] each; the higher, the more displacement is to be expected.

    hidden: [B,2,L,D], the state after the last norm that predicts each token. mask: bool [B,2,L]. With H the sum of the
    states over a completion's scored tokens and n their number: <H_w, H_l> - |H_w|^2, and
    <H_w, H_l> / (n_w n_l) - |H_w|^2 / n_w^2. A completion without tokens counts as zero states over one token.
    """
    wide = hidden.astype(jnp.promote_types(jnp.float32, hidden.dtype))
    total = jnp.where(mask[..., None], wide, 0).sum(2)
    count = jnp.maximum(mask.sum(-1), 1).astype(total.dtype)[..., None]
    return _score(total), _score(total / count)


def _score(total: jax.Array) -> jax.Array:
    """<H_w, H_l> - |H_w|^2 of [B,2,D]."""
    return (total[:, 0] * (total[:, 1] - total[:, 0])).sum(-1)
