"""Built-in sources of prompts and texts: the stories of the main job, and openings for models of children's stories."""

from __future__ import annotations

import itertools
import os

import numpy as np

from alignax.data.records import Record, read_jsonl
from alignax.data.stories import all_prompts, generate_corpus, split_prompts
from alignax.types import ConfigError, DataError

_NAMES = ("Lily", "Tim", "Tom", "Mia", "Ben", "Sara", "Max", "Anna", "Sam", "Lucy", "Jack", "Amy")
_ANIMALS = ("dog", "cat", "bird", "rabbit", "bear", "mouse", "duck", "frog")
_PLACES = ("the park", "the garden", "the forest", "the beach", "the store", "the river", "school", "the farm")
HELD_OUT = 1000  # openings of the stories that no training sees

_TIMES = ("One day", "One morning", "One sunny day", "One night")


def story_records(*, seed: int, split: str, n: int) -> list[Record]:
    """n stories as prompt and one completion, for the supervised stage.

    The HELD_OUT openings that `prompt_texts` gives for the eval split never appear in the train split.
    """
    total = len(all_prompts())
    train, unseen = split_prompts(seed, total - HELD_OUT, HELD_OUT)
    rows = generate_corpus(n, seed, prompts=train if split == "train" else unseen)
    return [Record(id=f"story-{split}-{i}", prompt=row["prompt"], completions=(row["completion"],), scores=None,
                   labels=None, margin=None, file="<builtin:stories>", line=i + 1) for i, row in enumerate(rows)]


def prompt_texts(source: str, *, split: str, seed: int, n: int) -> list[tuple[str, str]]:
    """n (id, text) prompts of a source, `train` and `eval` disjoint for the built-in ones.

    source: builtin:stories, builtin:openings, or a file of prompt records, read whole (n = 0) or its first n.
    Raises ConfigError for an unknown built-in name, DataError when the source has fewer than n prompts.
    """
    if source == "builtin:stories":
        train, held_out = split_prompts(seed, len(all_prompts()) - HELD_OUT, HELD_OUT)
        texts = train if split == "train" else held_out
    elif source == "builtin:openings":
        texts = _openings(split)
        texts = [texts[i] for i in np.random.default_rng([seed, 7]).permutation(len(texts))]
    elif source.startswith("builtin:"):
        raise ConfigError(f"prompts={source!r}; allowed: builtin:stories, builtin:openings, or a file")
    else:
        rows = read_jsonl(os.fspath(source), on_identical="keep")
        spoken = next((r for r in rows if r.is_chat), None)
        if spoken is not None:
            raise DataError(f"{spoken.place}: field 'prompt': expected a text to sample from, found messages")
        found = [(r.id, r.prompt) for r in rows]
        if n > len(found):
            raise DataError(f"{source}: {len(found)} prompts, but {n} were asked for")
        return found[:n] if n else found
    if len(texts) < n:
        raise DataError(f"prompts={source!r}: {len(texts)} prompts in the {split} split, but {n} were asked for")
    return [(f"{source[8:]}-{split}-{i}", text) for i, text in enumerate(texts[:n])]


def _openings(split: str) -> list[str]:
    """Every combination of name, animal, place and time; a quarter of them is held out."""
    every = [f"{time}, {name} and a little {animal} went to {place}."
             for time, name, animal, place in itertools.product(_TIMES, _NAMES, _ANIMALS, _PLACES)]
    held_out = set(np.random.default_rng(7).permutation(len(every))[: len(every) // 4].tolist())
    return [text for i, text in enumerate(every) if (i in held_out) == (split == "eval")]
