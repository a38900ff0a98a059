"""Stop strings on the device: an automaton over the bytes of token pieces.

A string may be tokenised in many ways, and its last token may carry more text than the string. So the text itself is
followed: an automaton (Aho and Corasick, 1975) reads the bytes of the stop strings, and its transitions are tabulated
per token, `table[state, token]`, so that one look-up per sampled token tells whether its text completes a stop string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignax.types import ConfigError


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers spell the 256 bytes: printable Latin-1 characters stand
    for themselves, the other bytes for the characters from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _kinds(spec: Any) -> set[str]:
    """The types of a decoder specification, those inside a sequence included."""
    if not isinstance(spec, dict):
        return set()
    return {spec.get("type", "")}.union(*(_kinds(part) for part in spec.get("decoders", ())))


def token_pieces(core: Any) -> list[bytes]:
    """The bytes that each id adds to a text which it continues, of a `tokenizers.Tokenizer`; b"" for special tokens,
    which decoding leaves out, and for ids that are not in use.

    Byte-level and byte-fallback pieces are read from their spelling, since bytes alone may be no text; the others are
    decoded behind another token, so that a piece has the space that it has inside a text. Where a decoder rewrites
    text across tokens (WordPiece's clean-up of spaces), the pieces are those of its plain case.
    """
    spec = json.loads(core.to_str())
    kinds, alphabet = _kinds(spec.get("decoder")), _byte_alphabet()
    added = core.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}
    vocab = core.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values()) + 1)
    before, opening = _context(core, vocab, special)
    for token, number in vocab.items():
        if number in special:
            continue
        if "ByteLevel" in kinds:
            plain = number not in added and all(c in alphabet for c in token)
            pieces[number] = bytes(alphabet[c] for c in token) if plain else token.encode()
        elif "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            pieces[number] = bytes([int(token[3:5], 16)])
        else:
            text = core.decode([opening, number])
            pieces[number] = (text[len(before):] if text.startswith(before) else token).encode()
    return pieces


def _context(core: Any, vocab: dict[str, int], special: set[int]) -> tuple[str, int]:
    """(text, id) of a plain token, behind which others are decoded."""
    for number in sorted(vocab.values()):
        text = "" if number in special else core.decode([number])
        if text.isascii() and text.isalnum():
            return text, number
    raise ConfigError("token_pieces: the tokenizer has no token of letters or digits to decode others behind; stop "
                      "strings cannot be followed with it")


def stop_table(stops: Sequence[str], pieces: Sequence[bytes], vocab_size: int) -> np.ndarray:
    """int32 [S, V]: the state after a token, from every state; 0 is the start and S - 1 means that a stop string is
    complete, which it stays.

    stops: strings, matched as UTF-8 bytes anywhere in the text. pieces: see token_pieces; ids of the vocabulary
    beyond them have no text. Memory: 4 bytes for each of (total bytes of the stops + 2) * V entries at most. Raises
    ConfigError for an empty string, no string at all, or more pieces than vocab_size.
    """
    if isinstance(stops, str) or not stops or not all(isinstance(s, str) and s for s in stops):
        raise ConfigError(f"stop_table(stops=): found {stops!r}, allowed: one or more strings that are not empty")
    if len(pieces) > vocab_size:
        raise ConfigError(f"stop_table(pieces=): found {len(pieces)} token pieces, allowed: at most vocab_size = "
                          f"{vocab_size}")
    words = sorted({s.encode() for s in stops})
    # A state is the longest end of the text that begins some stop string; complete ones share the last state.
    states = sorted({w[:n] for w in words for n in range(len(w))}, key=lambda s: (len(s), s))
    states = [s for s in states if not any(w in s for w in words)]
    number, done = {s: i for i, s in enumerate(states)}, len(states)
    step = np.zeros((done + 1, 256), np.int32)
    step[done] = done
    for state, index in number.items():
        for byte in set(b"".join(words)):
            text = state + bytes([byte])
            if any(text.endswith(w) for w in words):
                step[index, byte] = done
            else:
                step[index, byte] = next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)

    table = np.repeat(np.arange(done + 1, dtype=np.int32)[:, None], vocab_size, axis=1)
    lengths = np.asarray([len(p) for p in pieces] + [0] * (vocab_size - len(pieces)))
    for column in range(lengths.max(initial=0)):
        ids = np.flatnonzero(lengths > column)
        table[:, ids] = step[table[:, ids], np.asarray([pieces[i][column] for i in ids])]
    return table


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it, or all of it."""
    return text[:min((text.index(s) for s in stops if s in text), default=len(text))]


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may still become a stop string (or a character whose bytes are not all
    there); a stream shows them once they cannot."""
    longest = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return max(longest, len(text) - len(text.rstrip("\ufffd")))
