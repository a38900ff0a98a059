"""Worse versions of a text: its key phrases, found by RAKE, and versions without a growing share of them.

RAKE (rapid automatic keyword extraction) takes the runs of words between stop words and punctuation as candidate
phrases. A word's score is its degree over its frequency, the degree being the summed lengths of the phrases that it
stands in; a phrase's score is the sum over its words. The stop words are English: in another language the runs
between punctuation are the phrases.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from alignax.data.truncate import TokenRecord

Span = tuple[int, int]
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
STOP_WORDS = frozenset("""
a about above across after again against all almost along already also although always am among an and another any
anyone anything are around as at away be became because become been before began behind being below between both but by
came can cannot come could did do does doing done down during each either else enough even ever every everyone
everything few for from get gets getting go goes going gone got had has have having he her here hers herself him himself
his how however i if in indeed instead into is it its itself just keep kept later least less let like made make makes
many may maybe me might mine more most much must my myself near neither never no nobody none nor not nothing now of off
often on once one only onto or other others our ours ourselves out over own per perhaps put quite rather really said
same saw say says see seem seemed seems several shall she should since so some someone something sometimes soon still
such take than that the their theirs them themselves then there therefore these they thing this those though through
thus to together too took toward towards two under until up upon us use used very was we well went were what whatever
when where whether which while who whole whom whose why will with within without would yes yet you your yours yourself
""".split())


def key_phrases(text: str) -> list[Span]:
    """(start, end) of the key phrases of a text, the highest score first, ties as they stand."""
    phrases: list[list[re.Match]] = []
    before = None
    for word in _WORD.finditer(text):
        if word.group().lower() in STOP_WORDS:
            before = None
            continue
        if before is not None and text[before:word.start()].isspace():
            phrases[-1].append(word)
        else:
            phrases.append([word])
        before = word.end()
    frequency: collections.Counter[str] = collections.Counter()
    degree: collections.Counter[str] = collections.Counter()
    for phrase in phrases:
        for word in phrase:
            frequency[word.group().lower()] += 1
            degree[word.group().lower()] += len(phrase)
    score = lambda phrase: sum(degree[w] / frequency[w] for w in (word.group().lower() for word in phrase))
    return [(phrase[0].start(), phrase[-1].end()) for phrase in sorted(phrases, key=score, reverse=True)]


def token_spans(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[Span]]:
    """(text, the characters of each token): decoding every beginning of `ids` shows what a token adds."""
    ends = [len(decode(ids[:n])) for n in range(len(ids) + 1)]
    return decode(ids), list(zip(ends, ends[1:], strict=False))


def without_phrases(record: TokenRecord, versions: int, decode: Callable[[Sequence[int]], str]) -> TokenRecord:
    """The record's first completion in `versions` versions: version k lacks k / (versions - 1) of its key phrases.

    Version 0 has the very ids of the completion; the tokens that the removed phrases reach into are left out of the
    others, best phrases first, and end tokens stay. Where a version would keep no scored token, its last removed
    phrases stay. decode: ids to text, special tokens left out.
    """
    ids = record.completions[0]
    scored = np.ones(len(ids), bool) if record.scored is None else np.asarray(record.scored[0], bool)
    text, spans = token_spans(ids.tolist(), decode)
    phrases = key_phrases(text)
    reached = [np.asarray([start < b and a < end for start, end in spans], bool) for a, b in phrases]
    masks = []
    for k in range(versions):
        gone = round(k * len(phrases) / (versions - 1))
        kept = np.ones(len(ids), bool)
        for phrase in reached[:gone]:
            if (kept & ~phrase & scored).any():
                kept &= ~phrase
        masks.append(kept)
    return dataclasses.replace(record, completions=tuple(ids[kept] for kept in masks), scores=None, labels=None,
                               margin=None, columns={}, completion_ended=(record.completion_ended[0],) * versions,
                               scored=None if record.scored is None else tuple(scored[kept] for kept in masks))
