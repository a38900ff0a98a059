"""Rollouts: sampling completions from a decoder, and the rules that shape the sampled distribution."""

from alignax.rollout.decoding import (
    Rules,
    apply_count_penalties,
    apply_repetition_penalty,
    apply_temperature,
    categorical,
    epsilon_filter,
    hold_back,
    min_p_filter,
    shape,
    token_bias,
    top_k_filter,
    top_p_filter,
    truncate,
    typical_filter,
)
from alignax.rollout.refill import refill
from alignax.rollout.sampler import CUT, ENDED, REASONS, STOPPED, Samples, generate, stream
from alignax.rollout.stops import cut_at_stop, held_back, stop_table, token_pieces

__all__ = [
    "CUT", "ENDED", "REASONS", "STOPPED", "Rules", "Samples", "apply_count_penalties", "apply_repetition_penalty",
    "apply_temperature", "categorical", "cut_at_stop", "epsilon_filter", "generate", "held_back", "hold_back",
    "min_p_filter", "refill", "shape", "stop_table", "stream", "token_bias", "token_pieces", "top_k_filter",
    "top_p_filter", "truncate", "typical_filter",
]
