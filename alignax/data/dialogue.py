"""Dialogues to ids: what the template writes, cut where the answer begins, with a mask over the assistant's turns.

The prompt is the template's text of the prompt's messages with the generation prompt; a completion is what the text
of the whole dialogue adds to it. Ids are those of the whole text, so that training sees what the template's text is
at sampling; where a token would straddle the border of a turn, the pieces are encoded one by one (`boundary_merge`),
so that prompt ids stay a prefix and masks exact.

An assistant turn is scored from the end of its generation prompt through its end token. A template's own
{% generation %} blocks say so where there are any; an end token that follows a block directly belongs to the turn.
Text after the last end token (a line feed, as a rule) is not part of the completion. EOS is appended only where
the template closes the last turn with no end token of the policy's set.

The template alone decides about BOS: none is added to what it writes. All that a reader should know of (a BOS that
stands twice or is missing, thoughts or turns that the template leaves out, EOS appended, ...) is noted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignax.data.chat import REASONING, ChatTemplate, Rendered
from alignax.data.messages import ASSISTANT, Dialogue
from alignax.data.tokens import Span, TextPolicy, Tokenizer
from alignax.types import DataError

Note = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A template, bound to the tokenizer and to the record that it writes."""

    template: ChatTemplate
    tokenizer: Tokenizer
    policy: TextPolicy
    tools: Sequence[Mapping[str, Any]] | None
    place: str
    note: Note

    def rendered(self, turns: Dialogue, ask: bool) -> Rendered:
        return self.template.rendered(turns, tools=self.tools, add_generation_prompt=ask,
                                      special=self.tokenizer.special_tokens, place=self.place)

    def fail(self, message: str) -> DataError:
        return DataError(f"{self.place}: the chat template of {self.template.origin} {message}")


def _difference(short: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(short, whole, strict=False)) if a != b), min(len(short), len(whole)))
    return f"they part at character {at}: {short[at:at + 40]!r} against {whole[at:at + 40]!r}"


def _note_losses(writer: _Writer, turns: Dialogue, text: str) -> None:
    """Notes what of the messages is not in the text, as far as it can be seen."""
    for turn in turns:
        if turn.content and turn.content.strip() not in text:
            writer.note(f"the template drops or changes a turn of {turn.role!r}")
        thoughts = next((turn.extra[name] for name in REASONING if turn.extra.get(name)), None)
        if isinstance(thoughts, str) and thoughts.strip() not in text:
            writer.note("the template drops a turn's thoughts")


def _turn_end(writer: _Writer, whole: Rendered, specials: list[tuple[Span, str]], start: int, limit: int | None) -> int:
    """Where the assistant turn that begins at `start` ends: behind its end token.

    limit: where the text of this turn ends, or None where the template writes it differently once others follow.
    Without an end token inside, the turn ends behind its last special token, else at the limit.
    """
    ends = {writer.tokenizer.token(id) for id in writer.policy.eos_ids}
    inside = [(end, name) for (begin, end), name in specials if begin >= start and (limit is None or end <= limit)]
    closing = [end for end, name in inside if name in ends]
    if closing:
        return closing[0] if limit is None else closing[-1]
    if limit is None:
        raise writer.fail("rewrites an assistant turn once others follow, and closes it with no end token of "
                          f"{sorted(ends)}: where it ends cannot be told; give its dialogues up to each turn instead")
    return inside[-1][0] if inside else limit


def _turn_spans(writer: _Writer, prompt: Dialogue, completion: Dialogue, whole: Rendered,
                specials: list[tuple[Span, str]], first: int) -> list[Span]:
    """Spans of the assistant turns of a completion, found by rendering the dialogue up to each of them."""
    turns, spans = (*prompt, *completion), []
    for j in range(len(prompt), len(turns)):
        if turns[j].role != ASSISTANT:
            continue
        opening = whole.text[:first] if j == len(prompt) else writer.rendered(turns[:j], True).text
        if not whole.text.startswith(opening):
            raise writer.fail(f"writes the dialogue before turn {j} differently once it goes on, so that the turn "
                              f"cannot be found; {_difference(opening, whole.text)}")
        limit: int | None = len(whole.text)
        if j + 1 < len(turns):
            so_far = writer.rendered(turns[:j + 1], False).text
            limit = len(so_far) if whole.text.startswith(so_far) else None
            if limit is None:
                writer.note("the template rewrites an earlier assistant turn once others follow")
        spans.append((len(opening), _turn_end(writer, whole, specials, len(opening), limit)))
    return spans


def _marked_spans(writer: _Writer, whole: Rendered, specials: list[tuple[Span, str]], first: int) -> list[Span]:
    """Spans that the template's generation blocks mark behind the prompt, each with an end token that follows it."""
    ends = {writer.tokenizer.token(id) for id in writer.policy.eos_ids}
    spans = []
    for start, end in whole.generated:
        if end <= first:
            continue
        behind = next((span for span, name in specials if span[0] == end and name in ends), None)
        if behind is not None:
            writer.note("the template's generation block leaves out the end token; it is scored all the same")
            end = behind[1]
        spans.append((max(start, first), end))
    return spans


def _encode(writer: _Writer, whole: Rendered, head: list[int], first: int, spans: list[Span]
            ) -> tuple[list[int], list[bool]]:
    """(ids behind the head, which of them are scored), up to the end of the last span."""
    last = spans[-1][1]
    ids, offsets = writer.tokenizer.encode_rendered(whole.text, whole.literal)
    borders = sorted({first, last, *(border for span in spans for border in span)})
    begins, ends = np.asarray(offsets or [(0, 0)]).T
    straddles = any(((begins < border) & (border < ends)).any() for border in borders)
    if ids[:len(head)] != head or straddles:
        writer.note("boundary_merge")
        ids, offsets = list(head), [(0, 0)] * len(head)
        for start, end in zip(borders, borders[1:], strict=False):
            literal = [(a - start, b - start) for a, b in whole.literal if start <= a and b <= end]
            piece, where = writer.tokenizer.encode_rendered(whole.text[start:end], literal, opens=start == 0)
            ids += piece
            offsets += [(start, end)] * len(where)  # whole pieces: a token is scored as its piece is
    out: list[int] = []
    scored: list[bool] = []
    for id, (a, _) in zip(ids[len(head):], offsets[len(head):], strict=True):
        if a >= last:
            break
        out.append(id)
        scored.append(any(start <= a < end for start, end in spans))
    return out, scored


def _completion(writer: _Writer, prompt: Dialogue, completion: Dialogue, opening: str, head: list[int]
                ) -> tuple[list[int], list[bool]]:
    """(ids, scored) of one completion; see the module."""
    last = max(index for index, turn in enumerate(completion) if turn.role == ASSISTANT)
    if last + 1 < len(completion):
        writer.note("turns behind the last assistant turn left out", len(completion) - last - 1)
        completion = completion[:last + 1]
    turns = (*prompt, *completion)
    whole = writer.rendered(turns, False)
    if not whole.text.startswith(opening):
        raise writer.fail("writes the prompt differently once an answer follows, so that what is trained on is not "
                          f"what is sampled from; {_difference(opening, whole.text)}")
    _note_losses(writer, turns, whole.text)
    if whole.literal:
        writer.note("special token spelled in a text, kept as text", len(whole.literal))
    first = len(opening)
    ends = {writer.tokenizer.token(id) for id in writer.policy.eos_ids}
    specials = writer.tokenizer.find_special(whole.text, whole.literal, sorted(ends))
    marked = writer.template.marks_generation(writer.tools)
    spans = (_marked_spans(writer, whole, specials, first) if marked else
             _turn_spans(writer, prompt, completion, whole, specials, first))
    spans = [span for span in spans if span[0] < span[1]]
    if not spans:
        return [], []
    ids, scored = _encode(writer, whole, head, first, spans)
    if not writer.policy.ended(ids):
        closing = [name for span, name in specials if span[1] == spans[-1][1]]
        if closing:
            writer.note(f"the template closes a turn with {closing[0]!r}, which is no end token of the policy")
        if writer.policy.eos_id is None:
            writer.note("no end token: the template writes none and the policy appends none")
        else:
            writer.note("EOS appended: the template does not close the turn with an end token")
            ids, scored = [*ids, writer.policy.eos_id], [*scored, True]
    return ids, scored


def encode_dialogues(prompt: Dialogue, completions: Sequence[Dialogue], template: ChatTemplate, tokenizer: Tokenizer,
                     policy: TextPolicy, *, place: str, note: Note, tools: Sequence[Mapping[str, Any]] | None = None
                     ) -> tuple[list[int], list[list[int]], list[list[bool]] | None]:
    """(prompt ids, ids of each completion, which of these are scored, None for all) of one prompt.

    note: called with a reason (and a count) for everything that loses nothing but that a reader should know of.
    Raises DataError with `place` where the template refuses the dialogue, where its text of the prompt is not the
    beginning of its text of the whole, and where an assistant turn cannot be found.
    """
    writer = _Writer(template, tokenizer, policy, tools, place, note)
    asked = writer.rendered(prompt, True)
    head = tokenizer.encode_rendered(asked.text, asked.literal)[0]
    if policy.bos_id is not None:
        if head[:2] == [policy.bos_id] * 2:
            note("double BOS: the template opens with two")
        elif head[:1] != [policy.bos_id]:
            note("no BOS: the template writes none, and none is added")
    if not completions:
        _note_losses(writer, prompt, asked.text)
    parts = [_completion(writer, prompt, completion, asked.text, head) for completion in completions]
    scored = None if all(all(flags) for _, flags in parts) else [flags for _, flags in parts]
    return head, [ids for ids, _ in parts], scored
