"""A gold reward by rule: positive minus negative words, in the register of small children's stories."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

POSITIVE = frozenset("""
    happy glad joyful cheerful merry proud brave kind gentle sweet nice good great best wonderful lovely beautiful
    pretty bright warm sunny safe calm cozy soft fun funny silly playful friendly lucky magic special perfect
    smiled laughed giggled hugged kissed danced sang cheered clapped shared helped thanked enjoyed loved love
    liked won saved found friend friends gift treat smile laugh hug party
""".split())

NEGATIVE = frozenset("""
    sad angry scared afraid lonely upset worried mean rude bad worst awful terrible horrible ugly mad grumpy gloomy
    tired sick hurt lost broken cold dark dirty cruel nasty selfish jealous sorry bored hungry wild poor
    cried wept screamed shouted yelled frowned fell broke hit kicked pushed hated hate fought failed missed hid
    trembled sobbed growled pain tears danger trouble fear storm fight
""".split())

_WORD = re.compile(r"[^\W\d_]+")


def lexicon_reward(texts: Iterable[str]) -> np.ndarray:
    """Number of positive minus number of negative words of each text, float32 [n].

    Words are maximal runs of letters, lower-cased and matched whole ("unhappy" counts for nothing).
    """
    words = (_WORD.findall(text.lower()) for text in texts)
    return np.asarray([sum((w in POSITIVE) - (w in NEGATIVE) for w in found) for found in words], np.float32)
