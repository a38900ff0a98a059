"""The ledger: every record is kept, cut or dropped, and each of these is counted with its reason.

Cutting and dropping are legitimate; doing either without a number is not. All data functions that lose anything
take a `Ledger` and write to it, and a run prints the table once, after reading.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from alignax.types import ConfigError

SIDES = ("left", "right")


def _counter() -> collections.Counter:
    return collections.Counter()


@dataclasses.dataclass
class Ledger:
    """Counts of what happened to the records.

    kept: records that survived tokenisation. dropped: reason -> records. cuts and cut_tokens: (reason, side) ->
    pieces of text that lost tokens, and how many tokens they lost. noted: reason -> events that lose nothing but
    that a reader should know of (a tokeniser that merges across the prompt's end, unknown tokens, ignored fields).
    """

    kept: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=_counter)
    cuts: collections.Counter = dataclasses.field(default_factory=_counter)
    cut_tokens: collections.Counter = dataclasses.field(default_factory=_counter)
    noted: collections.Counter = dataclasses.field(default_factory=_counter)

    def keep(self, count: int = 1) -> None:
        """Counts records that survive."""
        self.kept += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts records that are left out because of `reason`."""
        self.dropped[reason] += count

    def cut(self, reason: str, tokens: int, side: str) -> None:
        """Counts one text that lost `tokens` tokens on `side`; raises ConfigError on an unknown side."""
        if side not in SIDES:
            raise ConfigError(f"Ledger.cut: side {side!r} is not one of {list(SIDES)}")
        if tokens < 1:
            raise ConfigError(f"Ledger.cut: tokens is {tokens}, a cut loses at least 1")
        self.cuts[reason, side] += 1
        self.cut_tokens[reason, side] += tokens

    def note(self, reason: str, count: int = 1) -> None:
        """Counts events that lose nothing."""
        self.noted[reason] += count

    @property
    def total(self) -> int:
        """Records accounted for: kept plus dropped."""
        return self.kept + sum(self.dropped.values())

    def merge(self, other: Ledger) -> Ledger:
        """Returns a new ledger with the counts of both; neither operand changes."""
        return Ledger(self.kept + other.kept, self.dropped + other.dropped, self.cuts + other.cuts,
                      self.cut_tokens + other.cut_tokens, self.noted + other.noted)

    __add__ = merge

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form: {"kept", "dropped": {reason: n}, "cut": [{reason, side, count, tokens}], "noted"}."""
        cut = [{"reason": reason, "side": side, "count": count, "tokens": self.cut_tokens[reason, side]}
               for (reason, side), count in sorted(self.cuts.items())]
        return {"kept": self.kept, "dropped": dict(sorted(self.dropped.items())), "cut": cut,
                "noted": dict(sorted(self.noted.items()))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        """The inverse of `as_dict`."""
        ledger = cls(data["kept"], collections.Counter(data["dropped"]), noted=collections.Counter(data["noted"]))
        for row in data["cut"]:
            ledger.cuts[row["reason"], row["side"]] = row["count"]
            ledger.cut_tokens[row["reason"], row["side"]] = row["tokens"]
        return ledger

    def table(self, title: str = "records") -> Table:
        """A rich Table with one row per outcome and reason."""
        table = Table(title=title)
        for column in ("outcome", "reason", "count", "tokens lost"):
            table.add_column(column, justify="right" if column in ("count", "tokens lost") else "left")
        table.add_row("kept", "", str(self.kept), "")
        for reason, count in sorted(self.dropped.items()):
            table.add_row("dropped", reason, str(count), "")
        for (reason, side), count in sorted(self.cuts.items()):
            table.add_row("cut", f"{reason} ({side})", str(count), str(self.cut_tokens[reason, side]))
        for reason, count in sorted(self.noted.items()):
            table.add_row("noted", reason, str(count), "")
        return table
