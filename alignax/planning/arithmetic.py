"""FLOPs of an update from sizes alone, by formulas, to set beside the counts of the traced and compiled programs.

A product of [m, k] and [k, n] is 2 m k n FLOPs. What is not a product (norms, softmax, optimiser) is left out.
"""

from __future__ import annotations

from alignax.models import DecoderConfig


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


def update_flops(config: DecoderConfig, rows: int, columns: int, slots: int, *, policy_head: bool = True,
                 reference: bool = False, extra_forwards: int = 0, remat: str = "none", accumulation: int = 1,
                 lora: bool = False) -> float:
    """FLOPs of one update over the whole batch.

    The backward pass costs two forwards, and one where the weights are frozen under adapters (`lora`; the adapters'
    own products are left out). The head always computes its logits again for the backward pass. remat other than
    `none` computes the layers again (`dots*` only their attention). Exact accumulation runs the policy once more,
    without gradient. reference: one forward beside. extra_forwards: further streams without gradient.
    """
    one = forward_flops(config, rows, columns, slots if policy_head else 0)
    backward = 1 if lora else 2
    # Of the recomputation, the last product of a layer is not needed, unless a norm follows it.
    last = 0 if config.post_norms else config.hidden_size * config.intermediate_size / matrix_parameters(config)
    again_weights = 1 - last if remat in ("full", "inputs_offloaded") else 0
    again_attention = 0 if remat == "none" else 1
    first = 1 if accumulation > 1 else 0
    total = one["weights"] * (1 + backward + again_weights + first)
    total += one["attention"] * (1 + 2 + again_attention + first)
    total += one["head"] * (2 + backward + first)
    return total + (int(reference) + extra_forwards) * sum(one.values())
