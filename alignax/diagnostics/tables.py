"""Tables of evaluation results for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

_ABSENT = "–"


def _format(value: float | int | None, digits: int, sign: bool = False) -> str:
    """A number with `digits` decimals (integers without), or a dash where there is none."""
    if value is None:
        return _ABSENT
    plus = "+" if sign else ""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:{plus}}"
    return f"{value:{plus}.{digits}f}"


def _aligned(texts: list[str]) -> list[str]:
    """Pad to one width with the decimal points in one column."""
    whole = max((len(text.partition(".")[0]) for text in texts), default=0)
    padded = [" " * (whole - len(text.partition(".")[0])) + text for text in texts]
    width = max((len(text) for text in padded), default=0)
    return [text.ljust(width) for text in padded]


def aligned(values: Sequence[float | int | None], digits: int) -> list[str]:
    """Cells of a column with their decimal points below one another; None becomes a dash. Justify them left."""
    return _aligned([_format(value, digits) for value in values])


def before_after(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    title: str = "before and after",
    units: Mapping[str, str] | None = None,
    digits: int = 3,
) -> Table:
    """A table with one row per metric: before, after, and the change.

    before, after: metric -> number (numpy scalars are fine). Rows follow `before`, then what only `after` has; a
    metric that one side lacks shows a dash there and no change. units: metric -> unit, shown in a column of its own
    where any is given. digits: decimals of non-integer numbers; decimal points are aligned in each column.
    Raises ValueError where `units` names a metric that neither side has.
    """
    units = dict(units or {})
    names = list(before) + [name for name in after if name not in before]
    unknown = [name for name in units if name not in names]
    if unknown:
        raise ValueError(f"units given for {unknown}, which are not metrics; the metrics are {names}")

    def number(source: Mapping[str, float], name: str) -> float | int | None:
        value = source.get(name)
        return value.item() if hasattr(value, "item") else value

    rows = [(number(before, name), number(after, name)) for name in names]
    changes = [None if old is None or new is None else new - old for old, new in rows]
    columns = [
        _aligned([_format(old, digits) for old, _ in rows]),
        _aligned([_format(new, digits) for _, new in rows]),
        _aligned([_format(change, digits, sign=True) for change in changes]),
    ]

    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    # Padded texts keep their alignment only when justified left: rich strips trailing spaces before it pads.
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="left", no_wrap=True)
    if units:
        table.add_column("unit", no_wrap=True)
    for row, name in enumerate(names):
        cells = [name, *(column[row] for column in columns), *([units.get(name, "")] if units else [])]
        table.add_row(*map(Text, cells))  # Text: a name with square brackets is no markup
    return table


def comparison(baseline: Mapping[str, float], policies: Sequence[Mapping[str, float]], *,
               title: str = "held-out prompts") -> Table:
    """The table of an evaluation: one row per policy, the baseline first.

    Each mapping holds policy, gold_reward, win_rate, win_low, win_high, kl_on_policy, kl_se, length, distinct_2,
    unfinished and prompts, as `alignax.evaluate` makes them. The baseline's win rate against itself is left out.
    """
    table = Table(title=f"{title} ({baseline['prompts']})", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for heading in ("gold reward", "win rate [95%]", "KL nats (se)", "length", "distinct-2", "unfinished"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (baseline, *policies):
        win = "" if row is baseline else f"{row['win_rate']:.3f} [{row['win_low']:.3f}, {row['win_high']:.3f}]"
        kl = "" if row is baseline else f"{row['kl_on_policy']:.2f} ({row['kl_se']:.2f})"
        table.add_row(str(row["policy"]), f"{row['gold_reward']:+.2f}", win, kl, f"{row['length']:.1f}",
                      f"{row['distinct_2']:.3f}", str(row["unfinished"]))
    return table
