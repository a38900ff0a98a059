"""FLOPs of an update from sizes alone, by formulas, to set beside the counts of the traced and compiled programs.

A product of [m, k] and [k, n] is 2 m k n FLOPs. What is not a product (norms, softmax, optimiser) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from alignax.models import DecoderConfig
from alignax.types import REQUESTS, Passes, passes

_PAIRED = {"ref_policy_kl", "policy_ref_kl"}  # read the logits of policy and reference at once
_ON_STATES = {"hidden", "prompt_embedding", "activation_mask"}  # no logits


def matrix_parameters(config: DecoderConfig) -> int:
    """Elements of the matrices of one layer: query, key, value, output, and the two or three of the MLP."""
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * wide + 2 * narrow)
    return attention + config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)


def forward_flops(config: DecoderConfig, rows: int, columns: int, slots: int) -> dict[str, float]:
    """FLOPs of one forward pass over [rows, columns] tokens with the head at `slots` places, by part.

    weights: 2 tokens x matrices. attention: scores and values over all `columns`, 4 tokens x columns x heads x
    head_dim: the causal half is computed and masked. head: 2 slots x width x vocabulary.
    """
    tokens = rows * columns
    return {"weights": 2.0 * tokens * config.num_layers * matrix_parameters(config),
            "attention": 4.0 * tokens * columns * config.num_layers * config.num_heads * config.head_dim,
            "head": 2.0 * slots * config.hidden_size * config.vocab_size}


def update_flops(config: DecoderConfig, rows: int, columns: int, slots: int, requests: Iterable[str], *,
                 reference: str = "none", remat: str = "none", accumulation: int = 1, lora: bool = False) -> float:
    """FLOPs of one update over the whole batch, of the passes that types.passes counts for these requests.

    reference: its rule. Every stream has the same sizes. A backward pass costs two forwards, and one where the weights
    are frozen under adapters (`lora`; the adapters' own products are left out). The head always computes its logits
    again for the backward pass, with a KL over the vocabulary the reference's too; log-probs of the reference beside
    such a KL are a head of their own. remat other than `none` computes the layers again (`dots*` only their attention).
    Products of value, reward and Q heads and of `candidate_logps` are left out.
    """
    requests = set(requests)
    one = forward_flops(config, rows, columns, slots)
    backward = 1 if lora else 2
    # Of the recomputation, the last product of a layer is not needed, unless a norm follows it.
    last = 0 if config.post_norms else config.hidden_size * config.intermediate_size / matrix_parameters(config)
    again_weights = 1 - last if remat in ("full", "inputs_offloaded") else 0
    again_attention = 0 if remat == "none" else 1

    def count(some: set[str]) -> Passes:
        found = passes(some, reference, accumulation=accumulation).values()
        return Passes(*map(sum, zip(*found, strict=True))) if found else Passes()

    layers = count(requests)
    forward = layers.policy_forward + layers.reference_forward
    total = one["weights"] * (forward + layers.policy_backward * (backward + again_weights))
    total += one["attention"] * (forward + layers.policy_backward * (2 + again_attention))
    logits = {n for n in requests - _ON_STATES if REQUESTS[n].provider in ("policy", "reference")}
    policy, paired = count(logits), count(logits & _PAIRED)
    heads = policy.policy_forward + policy.policy_backward * (1 + backward) + count(logits - _PAIRED).reference_forward
    return total + one["head"] * (heads + paired.reference_forward + paired.policy_backward)
