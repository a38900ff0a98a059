"""Text to ids: a thin wrapper over `tokenizers`, and the one place that decides about BOS and EOS.

Prompt = [BOS if there is one] + ids of the text; completion = ids of the text + [EOS if one is appended]. The
tokenizer's own template (which would add BOS to every piece it sees) is never used, and by default the spelling of
a special token inside a text is encoded as ordinary text, so that data cannot smuggle in an end token. Training,
sampling, rewards and export all go through `TextPolicy`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from alignax.types import ConfigError

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
KINDS = ("bytes", "words")


@dataclasses.dataclass(frozen=True)
class TextPolicy:
    """Which special ids frame a text.

    bos_id: opens a prompt, or None. eos_id: the one that is appended to a completion, or None. eos_ids: all ids
    that end a completion when sampled; holds eos_id. pad_id: fills unused columns; it may equal an EOS id, because
    masks are explicit and never inferred from it. Id 0 is an id like any other.
    """

    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int] = frozenset()
    pad_id: int = 0

    def __post_init__(self):
        appended = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        object.__setattr__(self, "eos_ids", frozenset(self.eos_ids) | appended)
        for name, value in (("bos_id", self.bos_id), ("eos_id", self.eos_id), ("pad_id", self.pad_id),
                            *(("eos_ids", value) for value in self.eos_ids)):
            optional = name in ("bos_id", "eos_id") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"TextPolicy.{name}: found {value!r}, expected an id >= 0"
                                  + (" or None" if name in ("bos_id", "eos_id") else ""))

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """[BOS] + ids; a BOS that already opens the ids is not doubled."""
        ids = list(ids)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def completion(self, ids: Sequence[int]) -> list[int]:
        """ids + [EOS]; ids that already end in one of the end tokens are left as they are."""
        ids = list(ids)
        return ids if self.eos_id is None or (ids and ids[-1] in self.eos_ids) else [*ids, self.eos_id]

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether the completion closes with an end token."""
        return len(ids) > 0 and int(ids[-1]) in self.eos_ids


Span = tuple[int, int]


def _inside(spec: Any) -> Any:
    """A copy of a tokenizer specification for a piece inside a text: what is added at its very beginning is not."""
    if isinstance(spec, list):
        return [_inside(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    out = {key: _inside(value) for key, value in spec.items()}
    return out | {"prepend_scheme": "never"} if out.get("prepend_scheme") == "first" else out


def _without_prefix(spec: Any) -> Any:
    """A copy of a tokenizer specification that adds no leading space to a text (for text that continues another)."""
    if isinstance(spec, list):
        return [_without_prefix(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    out = {key: _without_prefix(value) for key, value in spec.items()}
    if "normalizers" in out:
        out["normalizers"] = [part for part in out["normalizers"] if part.get("type") != "Prepend"]
    if "prepend_scheme" in out:
        out["prepend_scheme"] = "never"
    if "add_prefix_space" in out:
        out["add_prefix_space"] = False
    return out


def _continuation(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for the continuation of a text; `core` itself where it adds no leading space anyway."""
    spec = json.loads(core.to_str())
    changed = dict(spec)
    for key in ("normalizer", "pre_tokenizer"):
        changed[key] = _without_prefix(spec.get(key))
    if isinstance(changed["normalizer"], dict) and changed["normalizer"].get("type") == "Prepend":
        changed["normalizer"] = None
    return core if changed == spec else tokenizers.Tokenizer.from_str(json.dumps(changed))


class Tokenizer:
    """Ids of prompts and completions without any special tokens; `TextPolicy` adds those.

    core: a `tokenizers.Tokenizer`; padding and truncation stored in it are switched off (a stored truncation would
    cut texts silently). special_in_text: whether a special token spelled inside a text becomes its id (for chat
    templates that write special tokens themselves) or is ordinary text (default).
    """

    def __init__(self, core: tokenizers.Tokenizer, *, special_in_text: bool = False):
        core = tokenizers.Tokenizer.from_str(core.to_str())  # a copy: the caller's settings stay untouched
        core.no_padding()
        core.no_truncation()
        self._core, self._next = core, _continuation(core)
        core.encode_special_tokens = self._next.encode_special_tokens = not special_in_text
        self._pieces: dict[str, tokenizers.Tokenizer] = {}
        added = core.get_added_tokens_decoder()
        self._special = {str(token.content): token for token in added.values() if token.special}
        self._special_ids = {str(token.content): id for id, token in added.items() if token.special}
        unknown = getattr(core.model, "unk_token", None)
        self.unk_id: int | None = None if unknown is None else core.token_to_id(unknown)

    @property
    def core(self) -> tokenizers.Tokenizer:
        """The wrapped tokenizer, for what reads its vocabulary or its decoder; not to be changed."""
        return self._core

    @property
    def vocab_size(self) -> int:
        """Highest id plus one: the number of embedding rows that the tokenizer needs."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int:
        """The id of one token of the vocabulary; raises ConfigError where there is none."""
        found = self._core.token_to_id(token)
        if found is None:
            special = sorted(str(t.content) for t in self._core.get_added_tokens_decoder().values())
            raise ConfigError(f"token {token!r} is not in the vocabulary of {self.vocab_size}; special tokens: "
                              f"{special}")
        return found

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that opens a sequence, without special tokens."""
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a text that continues another: no leading-space piece is invented for it."""
        return self._next.encode(text, add_special_tokens=False).ids

    def encode_pair(self, prompt: str, completion: str, prompt_ids: Sequence[int] | None = None
                    ) -> tuple[list[int], list[int], bool]:
        """(prompt ids, completion ids, boundary_merge), so that all completions of a prompt share its ids.

        Both texts are encoded together, which is what the model sees at sampling time, and split after the prompt's
        own ids. Where a token straddles the border (boundary_merge), the completion is encoded alone, as a
        continuation: SentencePiece-like tokenizers would otherwise open it with an invented space piece.
        """
        head = self.encode_prompt(prompt) if prompt_ids is None else list(prompt_ids)
        joint = self.encode_prompt(prompt + completion)
        if joint[:len(head)] == head:
            return head, joint[len(head):], False
        return head, self.encode_completion(completion), True

    def completion_starts(self, prompt: str, completion: str) -> list[int]:
        """Where the tokens of a completion begin, in characters of its text; 0 for one that begins in the prompt."""
        kind = "text" if self._core.encode_special_tokens else "special"
        head, ids, merged = self.encode_pair(prompt, completion)
        if merged:
            alone = self._piece_core(f"next_{kind}").encode(completion, add_special_tokens=False)
            starts = [a for a, _ in alone.offsets]
        else:
            joint = self._piece_core(kind).encode(prompt + completion, add_special_tokens=False)
            starts = [max(a - len(prompt), 0) for a, _ in joint.offsets[len(head):]]
        if len(starts) != len(ids):
            raise ConfigError(f"this tokenizer gives {len(starts)} offsets for {len(ids)} tokens of a completion; "
                              "expected one each")
        return starts

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling and id of every special token."""
        return dict(self._special_ids)

    def token(self, id: int) -> str:
        """The spelling of one id; raises ConfigError where the vocabulary has none."""
        found = self._core.id_to_token(int(id))
        if found is None:
            raise ConfigError(f"id {id} is not in the vocabulary of {self.vocab_size}")
        return found

    def _piece_core(self, kind: str) -> tokenizers.Tokenizer:
        """Copies of the tokenizer whose offsets are exact, made when first needed: encoding templates needs them.

        kinds: `special` (special tokens in the text become ids), `text` (they are text), `inside` (text behind a
        special token), `next_special` and `next_text` (of a piece that continues another).
        """
        if kind not in self._pieces:
            spec = json.loads((self._next if kind.startswith("next") else self._core).to_str())
            spec["post_processor"] = None  # byte-level ones trim the spaces off the offsets
            if kind == "inside":
                spec |= {key: _inside(spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
            core = tokenizers.Tokenizer.from_str(json.dumps(spec))
            core.encode_special_tokens = not kind.endswith("special")
            self._pieces[kind] = core
        return self._pieces[kind]

    def find_special(self, text: str, literal: Sequence[Span] = (), more: Sequence[str] = ()) -> list[tuple[Span, str]]:
        """((start, end), spelling) of the special tokens in a text, leftmost and longest, outside of `literal` spans.

        more: further spellings to look for.
        """
        names = sorted({*self._special, *more}, key=len, reverse=True)
        if not names:
            return []
        pattern, found, at = re.compile("|".join(map(re.escape, names))), [], 0
        while match := pattern.search(text, at):
            start, end = match.span()
            if any(a < end and start < b for a, b in literal):
                at = start + 1
                continue
            found.append(((start, end), match.group()))
            at = end
        return found

    def encode_rendered(self, text: str, literal: Sequence[Span] = (), *, opens: bool = True
                        ) -> tuple[list[int], list[Span]]:
        """(ids, offsets) of text that a template wrote: special tokens become ids except inside `literal` spans.

        literal: spans of `text` in which the spelling of a special token came from the data and stays text. opens:
        whether the text begins a sequence (else no leading-space piece is invented for it). Without literal spans
        the whole text is one call of the library; with them the pieces between special tokens are encoded one by one
        as the library would.
        """
        if not literal:
            encoding = self._piece_core("special" if opens else "next_special").encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        ids: list[int] = []
        offsets: list[Span] = []

        def plain(start: int, end: int) -> None:
            if start < end:
                kind = "next_text" if not opens else "text" if start == 0 else "inside"
                encoding = self._piece_core(kind).encode(text[start:end], add_special_tokens=False)
                ids.extend(encoding.ids)
                offsets.extend((start + a, start + b) for a, b in encoding.offsets)

        at = 0
        for (start, end), name in self.find_special(text, literal):
            token, before = self._special[name], start
            while token.lstrip and before > at and text[before - 1].isspace():
                before -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            plain(at, before)
            ids.append(self._special_ids[name])
            offsets.append((before, end))
            at = end
        plain(at, len(text))
        return ids, offsets

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids that open a sequence; special tokens are left out unless `skip_special` is False."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_completion(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """Text of a completion in its context, with its leading space where decoding it alone would lose it.

        Where the two cannot be separated in text (a character whose bytes straddle the border), the completion is
        decoded alone.
        """
        before = self.decode(prompt_ids)
        whole = self.decode([*prompt_ids, *ids])
        return whole[len(before):] if whole.startswith(before) else self.decode(ids)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the `tokenizer.json` form."""
        self._core.save(str(path))


def load_tokenizer(folder_or_file: str | os.PathLike, *, special_in_text: bool = False) -> Tokenizer:
    """Loads a `tokenizer.json`, given itself or its folder; ConfigError where there is none or it does not parse."""
    path = Path(folder_or_file)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"load_tokenizer: no file {str(path)!r}; expected a tokenizer.json or a folder with one")
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception on a file it cannot parse
        raise ConfigError(f"load_tokenizer: {str(path)!r} is not a tokenizer.json: {error}") from error
    return Tokenizer(core, special_in_text=special_in_text)


def text_policy(tokenizer: Tokenizer, *, bos: str | None = BOS, eos: str | None = EOS, pad: str = PAD,
                more_eos: Sequence[str] = ()) -> TextPolicy:
    """A policy from token spellings; `more_eos` also end a sampled completion. ConfigError on an unknown token."""
    return TextPolicy(None if bos is None else tokenizer.token_id(bos),
                      None if eos is None else tokenizer.token_id(eos),
                      frozenset(tokenizer.token_id(token) for token in more_eos), tokenizer.token_id(pad))


def load_policy(folder: str | os.PathLike, *, eos_id: int | None = None) -> TextPolicy:
    """A policy from `generation_config.json` (before `config.json`) of a Hugging Face folder.

    The end tokens are the whole set given there. Which one is appended must be said through `eos_id` where there
    are several; ConfigError otherwise, or where it is not in the set. Pads use pad_token_id, else an end token (the
    id is never read back: masks are explicit).
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            found |= {k: v for k, v in json.loads(path.read_text("utf-8")).items()
                      if k in ("bos_token_id", "eos_token_id", "pad_token_id") and v is not None}
    if "eos_token_id" not in found:
        raise ConfigError(f"load_policy: no eos_token_id in config.json or generation_config.json of {str(folder)!r}")
    ends = found["eos_token_id"] if isinstance(found["eos_token_id"], list) else [found["eos_token_id"]]
    if eos_id is None and len(ends) != 1:
        raise ConfigError(f"load_policy: {str(folder)!r} has the end tokens {ends}; name the one to append with eos_id")
    if eos_id is not None and eos_id not in ends:
        raise ConfigError(f"load_policy: eos_id is {eos_id}, the end tokens of {str(folder)!r} are {ends}")
    eos_id = ends[0] if eos_id is None else eos_id
    return TextPolicy(found.get("bos_token_id"), eos_id, frozenset(ends), found.get("pad_token_id", eos_id))


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError where the tokenizer has ids that the model's vocabulary of `vocab_size` rows lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is {vocab_size}; "
                          f"vocab_size must be at least {tokenizer.vocab_size}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, kind: str = "bytes") -> Tokenizer:
    """Trains a tokenizer with <pad> = 0, <bos> = 1, <eos> = 2 (and for words <unk> = 3).

    kind `bytes`: byte-level BPE, lossless on any Unicode text, vocab_size >= 256 + 3. kind `words`: one id per
    space-separated word, most frequent first, then alphabetical; lossless where words stand one space apart.
    """
    if kind not in KINDS:
        raise ConfigError(f"train_tokenizer: kind is {kind!r}, allowed are {list(KINDS)}")
    if kind == "words":
        counts: dict[str, int] = {}
        for text in texts:
            for word in text.split():
                counts[word] = counts.get(word, 0) + 1
        order = sorted(counts.keys() - {PAD, BOS, EOS, UNK}, key=lambda word: (-counts[word], word))
        return word_tokenizer(order[:max(vocab_size - 4, 0)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 3:
        raise ConfigError(f"train_tokenizer: vocab_size is {vocab_size}; byte-level BPE needs at least "
                          f"{len(alphabet) + 3}")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False))
    return Tokenizer(core)


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A word-level tokenizer: <pad>, <bos>, <eos>, <unk>, then `words` in the order given, split at whitespace."""
    vocab = {token: index for index, token in enumerate([PAD, BOS, EOS, UNK, *words])}
    if len(vocab) != len(words) + 4:
        raise ConfigError(f"word_tokenizer: {len(words)} words with {len(words) + 4 - len(vocab)} repeated or special")
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([PAD, BOS, EOS, UNK])
    return Tokenizer(core)
