"""Records to token records, with every cut and every dropped record counted.

Lengths count special tokens. max_prompt and max_completion bound one part, max_length bounds the prompt with its
longest completion. What happens beyond a bound is the `truncation` rule:

    error   DataError with file:line and both lengths
    drop    the record is left out and counted under the bound's name
    left    prompts lose their oldest tokens (BOS stays); completions too long lose their last tokens
    right   prompts lose their newest tokens; completions too long lose their last tokens

Completions are always cut on the right, since a completion without its beginning is a different one; a cut
completion has no EOS. A prompt keeps at least one token where it had one; beyond that completions give way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from alignax.data.chat import ChatTemplate
from alignax.data.columns import step_columns
from alignax.data.dialogue import encode_dialogues
from alignax.data.ledger import Ledger
from alignax.data.records import Record, record_number
from alignax.data.tokens import TextPolicy, Tokenizer
from alignax.types import ConfigError, DataError

TRUNCATION = ("error", "drop", "left", "right")


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """One record as ids.

    number: stable uint32 of the id. prompt: int32 [P], BOS included. completions: int32 arrays, EOS included where
    it stands. completion_ended: which completions close with an end token. scored: bool arrays as long as the
    completions, which of their tokens are trained on and counted (a dialogue's other turns are not), or None for all.
    aux_prompt: another prompt for the same completions, BOS included, or None.
    columns: what the data say of each token, by the name of a request (`steps`, `advantages`, ...): arrays as long as
    the completions. The rest is as in `Record`.
    """

    number: np.uint32
    id: str
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    completion_ended: tuple[bool, ...]
    scores: tuple[float, ...] | None = None
    labels: tuple[float, ...] | None = None
    margin: float | None = None
    file: str = "<memory>"
    line: int = 0
    scored: tuple[np.ndarray, ...] | None = None
    aux_prompt: np.ndarray | None = None
    columns: Mapping[str, tuple[np.ndarray, ...]] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> str:
        """`file:line`, as error messages give it."""
        return f"{self.file}:{self.line}"

    @property
    def longest(self) -> int:
        """Tokens of the longest completion; 0 without completions."""
        return max((len(c) for c in self.completions), default=0)


def _ids(values: Sequence[int] | np.ndarray, place: str, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(f"{place}: {name}: expected one-dimensional integer ids, found {array.dtype} {array.shape}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise DataError(f"{place}: {name}: ids run from {array.min()} to {array.max()}, expected 0 to 2**31 - 1")
    return array.astype(np.int32)


def token_record(id: str, prompt: Sequence[int], completions: Iterable[Sequence[int]], *, eos_ids: Iterable[int] = (),
                 scores: Sequence[float] | None = None, labels: Sequence[float] | None = None,
                 margin: float | None = None, file: str = "<sampled>", line: int = 0) -> TokenRecord:
    """A token record from ids, for instance sampled ones, which are trained on as they are, never re-tokenised.

    prompt holds BOS already; a completion holds its end token where it was sampled, and nothing after it. eos_ids:
    the ids that end a completion. Raises DataError on ids that are no int32, an empty completion, tokens after an
    end token, and scores or labels that do not match the completions.
    """
    place, ends = f"{file}:{line}", np.asarray(sorted(eos_ids), np.int64)
    arrays = tuple(_ids(c, place, f"completions[{k}]") for k, c in enumerate(completions))
    for k, array in enumerate(arrays):
        if not array.size:
            raise DataError(f"{place}: completions[{k}]: no tokens; expected at least one")
        early = np.flatnonzero(np.isin(array[:-1], ends))
        if early.size:
            raise DataError(f"{place}: completions[{k}]: end token {array[early[0]]} at {early[0]} of {array.size}; "
                            "expected nothing after it")
    for name, values in (("scores", scores), ("labels", labels)):
        if values is not None and len(values) != len(arrays):
            raise DataError(f"{place}: {name}: {len(values)} entries for {len(arrays)} completions")
    ended = tuple(bool(np.isin(array[-1], ends)) for array in arrays)
    return TokenRecord(record_number(id), id, _ids(prompt, place, "prompt"), arrays, ended,
                       None if scores is None else tuple(float(s) for s in scores),
                       None if labels is None else tuple(float(s) for s in labels), margin, file, line)


def _cut_prompt(prompt: list[int], limit: int, side: str, bos_id: int | None) -> list[int]:
    """The prompt within `limit` >= 1 tokens; BOS survives a cut on the left."""
    if len(prompt) <= limit:
        return prompt
    if side == "right":
        return prompt[:limit]
    opening = prompt[:1] if bos_id is not None and prompt[0] == bos_id else []
    return opening + prompt[len(prompt) - (limit - len(opening)):]


def _excess(prompt: list[int], completions: list[list[int]], max_prompt: int | None, max_completion: int | None,
            max_length: int | None) -> tuple[str, str] | None:
    """(bound, message) of the first bound that is exceeded, or None."""
    longest = max((len(c) for c in completions), default=0)
    for name, bound, found in (("max_prompt", max_prompt, len(prompt)), ("max_completion", max_completion, longest),
                               ("max_length", max_length, len(prompt) + longest)):
        if bound is not None and found > bound:
            return name, (f"{found} tokens exceed {name} = {bound} (prompt {len(prompt)}, "
                          f"completions {[len(c) for c in completions]})")
    return None


def _shorten(prompt: list[int], completions: list[list[int]], side: str, policy: TextPolicy, max_prompt: int | None,
             max_completion: int | None, max_length: int | None, ledger: Ledger) -> tuple[list[int], list[list[int]]]:
    """Cuts to the bounds in the order of the module's rules and counts each cut."""

    def prompt_to(limit: int, reason: str) -> None:
        nonlocal prompt
        if len(prompt) > limit:
            ledger.cut(f"{reason}: prompt", len(prompt) - limit, side)
            prompt = _cut_prompt(prompt, limit, side, policy.bos_id)

    def completions_to(limit: int, reason: str) -> None:
        for k, completion in enumerate(completions):
            if len(completion) > limit:
                ledger.cut(f"{reason}: completion", len(completion) - limit, "right")
                completions[k] = completion[:limit]

    if max_prompt is not None:
        prompt_to(max_prompt, "max_prompt")
    if max_completion is not None:
        completions_to(max_completion, "max_completion")
    if max_length is not None:
        longest = max((len(c) for c in completions), default=0)
        floor = min(len(prompt), 1)
        prompt_to(max(max_length - longest, floor), "max_length")
        completions_to(max_length - len(prompt), "max_length")
    return prompt, completions


def _text_parts(record: Record, tokenizer: Tokenizer, policy: TextPolicy, ledger: Ledger
                ) -> tuple[list[int], list[list[int]], list[list[bool]] | None]:
    """(prompt, completions, None) of a record of texts."""
    head = tokenizer.encode_prompt(record.prompt)
    completions: list[list[int]] = []
    for text in record.completions:
        _, ids, merged = tokenizer.encode_pair(record.prompt, text, head)
        if merged:
            ledger.note("boundary_merge")
        completions.append(policy.completion(ids))
    return policy.prompt(head), completions, None


def _parts(record: Record, tokenizer: Tokenizer, policy: TextPolicy, template: ChatTemplate | None, ledger: Ledger
           ) -> tuple[list[int], list[list[int]], list[list[bool]] | None]:
    """(prompt, completions, scored) of a record, before any cut; scored is None where every token is."""
    if not record.is_chat:
        if template is not None:
            ledger.note("text record: the chat template does not apply")
        return _text_parts(record, tokenizer, policy, ledger)
    if template is None:
        raise DataError(f"{record.place}: the record holds messages, which need a chat template; none is given")
    return encode_dialogues(record.prompt, record.completions, template, tokenizer, policy, tools=record.tools,
                            place=record.place, note=ledger.note)


def _scored_tokens(ids: list[int], scored: list[bool] | None, prompt: list[int]) -> int:
    """Tokens that are trained on; nothing predicts the first one of an empty prompt."""
    flags = [True] * len(ids) if scored is None else scored[:len(ids)]
    return sum(flags[0 if prompt else 1:])


def tokenize_records(records: Iterable[Record], tokenizer: Tokenizer, policy: TextPolicy, *, ledger: Ledger,
                     max_prompt: int | None = None, max_completion: int | None = None, max_length: int | None = None,
                     truncation: str = "error", template: ChatTemplate | None = None) -> list[TokenRecord]:
    """Tokenises records under the bounds and the `truncation` rule (see the module); None means no bound.

    Records of messages go through the chat template (see alignax/data/dialogue.py), those of texts do not. A
    completion that would have no scored token (the text gives no ids and no EOS is appended, it is a single token
    after an empty prompt without BOS, which nothing predicts, or a cut leaves nothing of the assistant's turns) is
    a DataError under `error`, otherwise its record is dropped as "no scored tokens". The ledger afterwards holds
    kept + dropped = len(records), all cuts, and notes on tokens that straddle the prompt's end, unknown tokens,
    completions that differ as text but not as ids, and what the template does to the dialogues.
    Raises ConfigError on an unknown rule and on bounds that leave no room; DataError with file:line on messages
    without a template, and on dialogues that the template refuses.
    """
    if truncation not in TRUNCATION:
        raise ConfigError(f"tokenize_records: truncation is {truncation!r}, allowed are {list(TRUNCATION)}")
    for name, bound, least in (("max_prompt", max_prompt, 1), ("max_completion", max_completion, 1),
                               ("max_length", max_length, 2)):
        if bound is not None and bound < least:
            raise ConfigError(f"tokenize_records: {name} is {bound}, expected at least {least}")
    if template is not None and policy.pad_id in policy.eos_ids:
        ledger.note("the pad token is an end token; masks do not depend on it")
    out: list[TokenRecord] = []
    for record in records:
        prompt, completions, scored = _parts(record, tokenizer, policy, template, ledger)
        if tokenizer.unk_id is not None:
            unknown = sum(ids.count(tokenizer.unk_id) for ids in (prompt, *completions))
            if unknown:
                ledger.note("unknown tokens", unknown)
        excess = _excess(prompt, completions, max_prompt, max_completion, max_length)
        if excess is not None:
            reason, message = excess
            if truncation == "error":
                raise DataError(f"{record.place}: {message}; truncation may be {list(TRUNCATION)}")
            if truncation == "drop":
                ledger.drop(reason)
                continue
        before = len({tuple(c) for c in completions})
        shorter = completions
        columns = step_columns(record, completions, tokenizer)
        # The cut is counted in a scratch ledger first: a record that is dropped after all has lost itself, not tokens.
        scratch = Ledger()
        if excess is not None:
            prompt, shorter = _shorten(prompt, list(completions), truncation, policy, max_prompt, max_completion,
                                       max_length, scratch)
        bare = [k for k, ids in enumerate(shorter)
                if not _scored_tokens(ids, None if scored is None else scored[k], prompt)]
        if bare:
            if truncation == "error":
                raise DataError(f"{record.place}: completion {bare[0]} has no scored token (prompt {len(prompt)} "
                                f"tokens, completion {len(shorter[bare[0]])}); set a BOS or EOS, or drop it")
            ledger.drop("no scored tokens")
            continue
        for (reason, side), count in scratch.cuts.items():
            ledger.cuts[reason, side] += count
            ledger.cut_tokens[reason, side] += scratch.cut_tokens[reason, side]
        after = len({tuple(c) for c in shorter})
        if after < before:
            ledger.note("completions identical after a cut")
        elif before < len(set(record.completions)):
            ledger.note("completions identical as ids")
        flags = None if scored is None else tuple(np.asarray(mask[:len(ids)], bool)
                                                  for mask, ids in zip(scored, shorter, strict=True))
        # A cut may stand behind another turn's end token, which ends no answer.
        ended = tuple(policy.ended(ids) and (flags is None or bool(flags[k][-1])) for k, ids in enumerate(shorter))
        out.append(TokenRecord(record_number(record.id), record.id, np.asarray(prompt, np.int32),
                               tuple(np.asarray(ids, np.int32) for ids in shorter), ended, record.scores,
                               record.labels, record.margin, record.file, record.line, flags,
                               columns={name: tuple(a[:len(ids)] for a, ids in zip(arrays, shorter, strict=True))
                                        for name, arrays in columns.items()}))
        ledger.keep()
    return out
