"""Supervised losses: maximum likelihood of given completions."""

from __future__ import annotations

from alignax.losses.info import method
from alignax.losses.inputs import floats
from alignax.types import Array, Term, Terms


@method(id="sft", system="Supervised fine-tuning (next-token cross-entropy)", arxiv="", fidelity="paper",
        chosen_only=True)
def sft(token_logps: Array, mask: Array) -> Terms:
    """Cross-entropy of the completion tokens: -log pi(y_t), token mean over the global batch.

    token_logps: [B, K, L]; mask: bool [B, K, L]. Returns one term `nll` with reduction tokens: every scored token of
    the batch weighs the same, so that longer completions weigh more. Left out: prompt tokens, label smoothing.
    """
    return Terms({"nll": Term(-floats(token_logps), mask, "tokens")})
