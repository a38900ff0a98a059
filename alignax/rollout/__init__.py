"""Rollouts: sampling completions from a decoder, and the rules that shape the sampled distribution."""

from alignax.rollout.decoding import apply_temperature, top_p_filter
from alignax.rollout.sampler import Samples, generate

__all__ = ["Samples", "apply_temperature", "generate", "top_p_filter"]
