"""The classic traps of tokenisation, looked for in the ids that training would see.

Every check runs on what `tokenize_records` returns and on what it notes, record by record, so that a count comes with
the places it stands at; nothing is computed a second way.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape

from alignax.data.ledger import Ledger
from alignax.data.records import Record
from alignax.data.tokens import TextPolicy, Tokenizer
from alignax.data.truncate import TokenRecord, tokenize_records
from alignax.types import DataError

SHOWN = 3  # examples of a finding
_BORDER = 12  # characters shown on either side of the border of prompt and completion

# What a ledger notes while it tokenises, by how the note begins: code, severity, and words that say more than the
# note (None: the note itself). Notes that a check below reports, with places of its own, have no code.
_NOTES = {
    "boundary_merge": ("merged border", "warning", "completions whose first token would straddle the border of prompt "
                       "and completion; they are encoded alone, not as they would be sampled"),
    "unknown tokens": ("unknown tokens", "warning", "tokens that the vocabulary does not have"),
    "completions identical as ids": ("identical as ids", "warning", "records whose completions differ as texts but not "
                                     "as ids: they state no preference"),
    "the template drops or changes": ("template drops", "error", None),
    "the template drops a turn's thoughts": ("drops thoughts", "warning", None),
    "the template rewrites": ("rewrites turns", "warning", None),
    "the template closes": ("other turn end", "warning", None),
    "EOS appended": ("EOS appended", "info", None),
    "the template's generation block": ("EOS outside", "info", None),
    "turns behind": ("turns left out", "warning", None),
    "text record": ("template unused", "warning", "texts, to which the chat template does not apply; records of "
                    "messages would use it"),
    "double BOS": None,
    "no BOS": None,
    "no end token": None,
    "special token spelled": None,
    "the pad token": None,
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found: a short code, severity, how often, what it means, and the first places."""

    code: str
    severity: str
    count: int
    message: str
    examples: tuple[str, ...] = ()


def finding(code: str, severity: str, count: int, message: str, examples: Iterable[str] = ()) -> list[Finding]:
    """[Finding] with the first SHOWN examples, or [] where the count is 0."""
    return [Finding(code, severity, count, message, tuple(examples)[:SHOWN])] if count else []


def escaped(text: str) -> str:
    """Text for a rich table: brackets are no markup, control characters are spelled."""
    return escape("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


class _Tally:
    """Counts under a key, with the places they come from."""

    def __init__(self):
        self.counts: collections.Counter = collections.Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, key: str, place: str, count: int = 1) -> None:
        self.counts[key] += count
        if len(self.places.setdefault(key, [])) < SHOWN:
            self.places[key].append(place)

    def finding(self, key: str, code: str, severity: str, message: str) -> list[Finding]:
        return finding(code, severity, self.counts[key], message, self.places.get(key, ()))


def tokenise(records: Sequence[Record], tokenizer: Tokenizer, policy: TextPolicy, template: Any,
             bounds: Mapping[str, int | None], truncation: str
             ) -> tuple[list[TokenRecord], list[Finding], Ledger | None]:
    """(token records without limits, findings, ledger under the limits or None where there are none).

    A record that cannot be tokenised at all (a role that the template refuses) is an error and left out of the rest.
    """
    more = {} if template is None else {"template": template}
    notes, dropped, tally = _Tally(), _Tally(), _Tally()
    special = sorted(tokenizer.special_tokens)
    usable: list[Record] = []
    out: list[TokenRecord] = []
    for record in records:
        ledger = Ledger()
        try:
            found = tokenize_records([record], tokenizer, policy, ledger=ledger, truncation="drop", **more)
        except DataError as error:
            tally.add("refused", str(error))
            continue
        usable.append(record)
        out += found
        for reason, count in ledger.noted.items():
            notes.add(reason, _example(record, reason), count)
        for reason, count in ledger.dropped.items():
            dropped.add(reason, record.place, count)
        for token_record in found:
            _check(token_record, policy, tally)
        _spelled(record, special, tally)
    findings = [
        *tally.finding("refused", "refused", "error", "records that cannot be tokenised"),
        *tally.finding("double bos", "double BOS", "error", "prompts that open with two BOS tokens"),
        *tally.finding("no bos", "BOS missing", "warning", "prompts that do not open with the policy's BOS"),
        *tally.finding("inner bos", "BOS inside", "warning", "records with a BOS behind the start of the prompt"),
        *tally.finding("no eos", "EOS missing", "error", "completions without an end token: a model trained on them "
                       "does not learn to stop" + ("; the policy appends none" if policy.eos_id is None else "")),
        *tally.finding("masked eos", "EOS masked", "error", "completions whose end token is not trained on"),
        *tally.finding("spelled", "special spelled", "warning", "texts that spell a special token; it is encoded as "
                       "ordinary text unless the tokenizer reads special tokens in texts"),
        *_policy_findings(policy, len(out)),
        *(item for reason in dropped.counts for item in dropped.finding(
            reason, "dropped", "warning", f"records dropped without any limit: {reason}")),
        *(item for reason in notes.counts for item in _note_findings(reason, notes)),
    ]
    if all(bound is None for bound in bounds.values()):
        return out, findings, None
    limited = Ledger()
    tokenize_records(usable, tokenizer, policy, ledger=limited, **bounds, **more,
                     truncation="drop" if truncation == "error" else truncation)
    for reason in set(limited.noted) & set(notes.counts):
        del limited.noted[reason]  # said above, and no matter of the limits
    return out, [*findings, *_limit_findings(limited, dropped.counts, truncation)], limited


def _note_findings(reason: str, notes: _Tally) -> list[Finding]:
    """The finding that a note of the ledger becomes; a note that is not known here is a warning in its own words."""
    known = next((entry for start, entry in _NOTES.items() if reason.startswith(start)), ("noted", "warning", None))
    if known is None:
        return []
    code, severity, words = known
    return notes.finding(reason, code, severity, words or reason)


def _example(record: Record, reason: str) -> str:
    """The place; for a merged border, with the texts on both sides of it."""
    if reason != "boundary_merge" or record.is_chat:
        return record.place
    return f"{record.place} {record.prompt[-_BORDER:]!r} | {record.completions[0][:_BORDER]!r}"


def _check(record: TokenRecord, policy: TextPolicy, tally: _Tally) -> None:
    """Looks at the special tokens of one record."""
    prompt, bos = record.prompt.tolist(), policy.bos_id
    if bos is not None:
        if prompt[:2] == [bos, bos]:
            tally.add("double bos", record.place)
        elif prompt[:1] != [bos]:
            tally.add("no bos", record.place)
        # Where BOS is an end token too, it may stand at the end of any turn.
        inside = bos not in policy.eos_ids and (bos in prompt[2:] or any(bos in c for c in record.completions))
        if inside:
            tally.add("inner bos", record.place)
    for k, ended in enumerate(record.completion_ended):
        if not ended:
            tally.add("no eos", record.place)
        elif record.scored is not None and not record.scored[k][-1]:
            tally.add("masked eos", record.place)


def _spelled(record: Record, special: Sequence[str], tally: _Tally) -> None:
    """Looks for special tokens spelled in the texts of one record."""
    contents = [record.prompt, *record.completions]
    texts = [part if isinstance(part, str) else "\n".join(turn.content or "" for turn in part) for part in contents]
    found = [token for token in special if any(token in text for text in texts)]
    if found:
        tally.add("spelled", f"{record.place} {' '.join(found)}")


def _policy_findings(policy: TextPolicy, count: int) -> list[Finding]:
    """What the policy itself says; counts are the records it concerns."""
    return [*finding("pad is EOS", "info", count if policy.pad_id in policy.eos_ids else 0,
                     f"id {policy.pad_id} is the pad and an end token; masks are explicit here, but code that takes "
                     "them from the pad id would never train on that end token"),
            *finding("BOS is EOS", "info", count if policy.bos_id in policy.eos_ids else 0,
                     f"id {policy.bos_id} opens prompts and ends completions")]


def _limit_findings(limited: Ledger, unlimited: Mapping[str, int], truncation: str) -> list[Finding]:
    """What the limits cut and drop."""
    severity = "error" if truncation == "error" else "warning"
    words = "refused" if truncation == "error" else "dropped"
    lost = {reason: count - unlimited.get(reason, 0) for reason, count in limited.dropped.items()}
    return [*(item for reason, count in sorted(lost.items()) for item in finding(
                f"over {reason}", severity, count, f"records {words} under the limits, of {limited.total}")),
            *(Finding("cut", "warning", count, f"texts that lose {limited.cut_tokens[reason, side]} tokens on the "
                      f"{side} to {reason}") for (reason, side), count in sorted(limited.cuts.items()))]
