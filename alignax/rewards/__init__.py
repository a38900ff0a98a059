"""Rewards: rules and drawn preferences."""

from alignax.rewards.lexicon import NEGATIVE, POSITIVE, lexicon_reward
from alignax.rewards.preferences import STRATEGIES, Pairs, bradley_terry_pairs

__all__ = ["NEGATIVE", "POSITIVE", "STRATEGIES", "Pairs", "bradley_terry_pairs", "lexicon_reward"]
