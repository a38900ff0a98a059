"""A synthetic task small enough for two cores: short children's stories with moods.

A prompt is an opening ("Tom went to the river ."), a completion its continuation of two to four sentences, drawn
from a grammar whose sentences are worth -2 to +2 on the word lexicon of `alignax.rewards.lexicon`: mood words are
the only lexicon words in it. A hidden mood per story makes the sum vary, with mean about 0 and standard deviation
about 1.5, so that a reward by rule (positive minus negative words) has something to prefer and room to climb.

Words and punctuation are separated by single spaces. A completion begins with a space, so that prompt + completion
is a story, and the word-level tokenizer is lossless on it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from alignax.data.tokens import Tokenizer, word_tokenizer
from alignax.types import ConfigError

BOYS = "Tom Ben Max Sam Leo Jack Tim Finn Noah Luke Owen Hugo".split()
GIRLS = "Mia Lily Anna Zoe Ella Ruby Lucy Nora Kate Rose Ivy Emma".split()
PLACES = ("river park farm forest beach garden school house lake hill market barn bridge village meadow library pond "
          "zoo castle kitchen shop street island tower").split()
ANIMALS = ("dog cat bird rabbit fox duck frog bear mouse horse sheep turtle pig goat owl squirrel cow hen snail puppy "
           "kitten").split()
OBJECTS = ("ball kite boat drum book hat cake apple basket lamp flower shell bell map cup box doll stick coat "
           "wagon rope spoon blanket bucket ladder puzzle whistle crown").split()
COLORS = "red blue green yellow white brown pink gray big little old new round tall small striped".split()
FOODS = "bread soup milk cheese rice honey corn pie beans jam".split()
TIMES = ["then", "later", "soon", "at noon", "after lunch", "in the morning", "in the evening", "that day",
         "after dinner", "before bed"]

GOOD_ADJECTIVES = ("happy glad joyful kind gentle sweet nice brave cheerful proud merry playful friendly funny calm "
                   "lucky silly great lovely wonderful").split()
GOOD_VERBS = "loved liked enjoyed found saved".split()
GOOD_ACTS = "smiled laughed danced sang clapped cheered giggled won".split()
GOOD_TOUCH = "hugged helped thanked kissed".split()
GOOD_SKY = "bright warm beautiful pretty".split()

BAD_ADJECTIVES = ("sad angry scared afraid lonely upset worried mean rude grumpy gloomy tired sick hungry bored "
                  "jealous selfish sorry terrible").split()
BAD_VERBS = "hated lost broke kicked missed".split()
BAD_ACTS = "cried wept screamed shouted sobbed frowned fell trembled yelled".split()
BAD_TOUCH = "pushed hurt hit fought".split()
BAD_SKY = "cold dark gloomy ugly".split()

WALKED = "walked ran went rode hurried".split()
TOOK = "took carried brought".split()

OPENINGS = ("{n} went to the {place} .", "one day {n} was at the {place} .", "{n} saw a {animal} at the {place} .",
            "{n} had a {color} {object} .")

# Sentences by worth. The moods differ only in which adjectives, verbs, acts, touches and skies fill them.
NEUTRAL = ("{time} {p} saw a {color} {animal} near the {place} .", "the {object} was {color} and {color2} .",
           "{time} {p} {walked} to the {place} with {m} .", "{p} {took} the {color} {object} home .",
           "{p} and {m} ate some {food} .", "{m} put the {object} near the {animal} .")
ONE = ("{p} {act} when {p} saw the {animal} .", "the {color} {animal} was {adjective} .",
       "{time} {p} {verb} the {object} .", "{m} {touch} the {color} {animal} .",
       "the sky over the {place} was {sky} .", "{p} felt very {adjective} .")
TWO = ("the {adjective} {animal} {touch} {h} .", "{time} {p} and {m} {act} and {act2} .",
       "{p} {verb} the {object} and {act} .", "{m} was {adjective} and the {place} was {sky} .")

_FILL = {"good": {"adjective": GOOD_ADJECTIVES, "verb": GOOD_VERBS, "act": GOOD_ACTS, "touch": GOOD_TOUCH,
                  "sky": GOOD_SKY},
         "bad": {"adjective": BAD_ADJECTIVES, "verb": BAD_VERBS, "act": BAD_ACTS, "touch": BAD_TOUCH,
                 "sky": BAD_SKY}}
_NEUTRAL_FILL = {"animal": ANIMALS, "place": PLACES, "object": OBJECTS, "color": COLORS, "food": FOODS, "time": TIMES,
                 "walked": WALKED, "took": TOOK}

# P(sentence is worth -2, -1, 0, 1, 2) under each mood, and the moods' own probabilities.
MOODS = ("happy", "plain", "sad")
MOOD_WEIGHTS = (0.3, 0.4, 0.3)
_WORTH = {"happy": (0.0, 0.1, 0.5, 0.33, 0.07), "plain": (0.03, 0.17, 0.6, 0.17, 0.03),
          "sad": (0.07, 0.33, 0.5, 0.1, 0.0)}
_SENTENCES = (2, 3, 4)
_SENTENCE_WEIGHTS = (0.4, 0.45, 0.15)
_RECALL = 0.7  # how often a sentence speaks of the place, animal or object of its opening


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


@functools.cache
def all_prompts() -> tuple[str, ...]:
    """Every opening of the grammar, in a fixed order, all distinct."""
    out = []
    for opening in OPENINGS:
        slots = {name: values for name, values in
                 (("n", BOYS + GIRLS), ("place", PLACES), ("animal", ANIMALS), ("color", COLORS), ("object", OBJECTS))
                 if "{" + name + "}" in opening}
        out += [opening.format(**dict(zip(slots, values, strict=True)))
                for values in itertools.product(*slots.values())]
    return tuple(out)


def _sentence(rng: np.random.Generator, worth: int, p: str, h: str, friend: str, known: dict[str, str]) -> str:
    """One sentence whose lexicon reward is exactly `worth`."""
    template = _pick(rng, {0: NEUTRAL, 1: ONE, 2: TWO}[abs(worth)])
    fill = {name: _pick(rng, values) for name, values in _NEUTRAL_FILL.items()}
    fill |= {name: word for name, word in known.items() if rng.random() < _RECALL}
    fill["color2"] = _pick(rng, [c for c in COLORS if c != fill["color"]])
    words = _FILL["good" if worth >= 0 else "bad"]
    fill |= {name: _pick(rng, values) for name, values in words.items()}
    fill["act2"] = _pick(rng, [a for a in words["act"] if a != fill["act"]])
    return template.format(p=p, h=h, m=friend, **fill)


def _continuation(rng: np.random.Generator, prompt: str) -> str:
    words = prompt.split()
    hero = next((word for word in words if word in BOYS or word in GIRLS), None)
    if hero is None:
        raise ConfigError(f"stories: prompt {prompt!r} names no hero; expected one of {BOYS + GIRLS}")
    p, h = ("he", "him") if hero in BOYS else ("she", "her")
    friend = _pick(rng, [name for name in BOYS + GIRLS if name != hero])
    known = {name: word for name, values in (("place", PLACES), ("animal", ANIMALS), ("object", OBJECTS))
             for word in words if word in values}
    worths = _WORTH[MOODS[int(rng.choice(len(MOODS), p=MOOD_WEIGHTS))]]
    count = int(rng.choice(_SENTENCES, p=_SENTENCE_WEIGHTS))
    values = rng.choice((-2, -1, 0, 1, 2), size=count, p=worths)
    return " " + " ".join(_sentence(rng, int(value), p, h, friend, known) for value in values)


def generate_corpus(n: int, seed: int, prompts: Sequence[str] | None = None) -> list[dict[str, str]]:
    """n stories as {"prompt", "completion"}, openings drawn uniformly from `prompts` (default: all of them).

    A function of (n, seed, prompts); story i depends on (seed, i, prompts) alone, so a longer corpus extends a
    shorter one. prompt + completion is the whole text.
    """
    if n < 0 or seed < 0:
        raise ConfigError(f"generate_corpus: n is {n} and seed is {seed}, expected both >= 0")
    prompts = all_prompts() if prompts is None else prompts
    if not prompts:
        raise ConfigError("generate_corpus: prompts is empty, expected at least one")
    out = []
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        prompt = _pick(rng, prompts)
        out.append({"prompt": prompt, "completion": _continuation(rng, prompt)})
    return out


def split_prompts(seed: int, n_train: int, n_eval: int) -> tuple[list[str], list[str]]:
    """(train, eval) prompts, distinct and disjoint; the eval prompts do not change with n_train.

    Raises ConfigError where the grammar has fewer openings than asked for.
    """
    everything = all_prompts()
    if n_train < 0 or n_eval < 0 or n_train + n_eval > len(everything):
        raise ConfigError(f"split_prompts: n_train {n_train} and n_eval {n_eval}; expected both >= 0 and a sum of "
                          f"at most {len(everything)}, the number of openings")
    order = np.random.default_rng([seed, 0]).permutation(len(everything))
    return ([everything[i] for i in order[n_eval:n_eval + n_train]], [everything[i] for i in order[:n_eval]])


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word that the grammar can produce, sorted."""
    texts = [*OPENINGS, *NEUTRAL, *ONE, *TWO, *BOYS, *GIRLS, "he she him her"]
    for table in (_NEUTRAL_FILL, *_FILL.values()):
        texts += [text for values in table.values() for text in values]
    return tuple(sorted({word for text in texts for word in text.split() if not word.startswith("{")}))


def stories_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the grammar: <pad> 0, <bos> 1, <eos> 2, <unk> 3, then its words; nothing to train."""
    return word_tokenizer(vocabulary())
