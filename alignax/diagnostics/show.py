"""Examples as the model sees them, with the loss mask in colour, and histograms of lengths.

In colour, scored tokens are green, unscored ones of a completion yellow, the prompt is dim, and special tokens stand
in braces with their role. The form without colour, for logs, puts double brackets around what is scored:

    {BOS <s>}Once upon a time[[, there was a cat.{EOS <s>}]]
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from alignax.data import TextPolicy, Tokenizer, TokenRecord
from alignax.types import ConfigError

STYLES = {"prompt": "dim", "scored": "green", "unscored": "yellow"}
LEGEND = Text.assemble(("prompt", STYLES["prompt"]), "  ", ("scored", STYLES["scored"]), "  ",
                       ("completion, not scored", STYLES["unscored"]), "  ", ("{special token}", "bold reverse"))


class Piece(NamedTuple):
    """A stretch of equal tokens: its text, its kind (prompt, scored, unscored), whether it is one special token."""

    text: str
    kind: str
    special: bool
    tokens: int


def pieces(record: TokenRecord, completion: int | None, tokenizer: Tokenizer, policy: TextPolicy) -> list[Piece]:
    """The prompt and one completion (None: the prompt alone) as pieces, in order.

    What is scored is the record's own mask, and not its first token where no token stands before it.
    Raises ConfigError for a completion that the record does not have.
    """
    count = len(record.completions)
    if completion is not None and not 0 <= completion < count:
        raise ConfigError(f"{record.place}: completion {completion} of {count}")
    rest = np.zeros(0, np.int32) if completion is None else record.completions[completion]
    ids = [*record.prompt.tolist(), *rest.tolist()]
    scored = np.ones(len(rest), bool) if record.scored is None or completion is None else record.scored[completion]
    kinds = ["prompt"] * len(record.prompt) + ["scored" if s else "unscored" for s in scored]
    if len(rest) and not len(record.prompt):
        kinds[0] = "unscored"
    special = set(tokenizer.special_tokens.values()) | policy.eos_ids | {policy.bos_id}
    roles = [_role(tokenizer, policy, id, place) if id in special else None for place, id in enumerate(ids)]
    out: list[Piece] = []
    text_ids: list[int] = []  # the ids so far that are text: a piece's text is what it adds to theirs
    before = ""
    for (kind, role), group in itertools.groupby(range(len(ids)), lambda i: (kinds[i], roles[i])):
        places = list(group)
        if role is not None:
            out += [Piece(role, kind, True, 1) for _ in places]
            continue
        text_ids += [ids[i] for i in places]
        after = tokenizer.decode(text_ids, skip_special=False)
        # A character whose bytes straddle two pieces belongs to neither's decoding of the whole.
        alone = not after.startswith(before)
        text = tokenizer.decode([ids[i] for i in places], skip_special=False) if alone else after[len(before):]
        out.append(Piece(text, kind, False, len(places)))
        before = after
    return out


def _role(tokenizer: Tokenizer, policy: TextPolicy, id: int, place: int) -> str:
    """`{ROLE spelling}` of a special token; one that is both opens the sequence or ends something."""
    spelling = tokenizer.token(id)
    if id == policy.bos_id and (place == 0 or id not in policy.eos_ids):
        return f"{{BOS {spelling}}}"
    return f"{{EOS {spelling}}}" if id in policy.eos_ids else f"{{{spelling}}}"


def coloured(parts: Sequence[Piece]) -> Text:
    """Pieces as rich text, kinds told apart by colour."""
    text = Text()
    for piece in parts:
        text.append(piece.text, f"bold {STYLES[piece.kind]} reverse" if piece.special else STYLES[piece.kind])
    return text


def plain(parts: Sequence[Piece]) -> str:
    """Pieces as a string, [[scored]] in double brackets."""
    out = []
    for scored, group in itertools.groupby(parts, lambda piece: piece.kind == "scored"):
        text = "".join(piece.text for piece in group)
        out.append(f"[[{text}]]" if scored else text)
    return "".join(out)


def names(record: TokenRecord) -> list[str]:
    """What the completions are called: chosen and rejected in a pair, else by number and score or label."""
    count = len(record.completions)
    if count == 2 and record.scores is None and record.labels is None:
        return ["chosen", "rejected"]
    said = [f", score {s:g}" for s in record.scores or ()] or \
        [f", {'desirable' if label else 'undesirable'}" for label in record.labels or ()] or [""] * count
    return [f"completion {k}{said[k]}" for k in range(count)]


def histogram(counts: Mapping[str, Sequence[int]], edges: Sequence[int], *, title: str, width: int = 20) -> Table:
    """A bar chart: one row per bin from the first to the last that holds anything, one column of bars per name.

    counts: name -> numbers per bin; bin i is edges[i] to edges[i + 1] - 1, the last open above.
    """
    for name, values in counts.items():
        if len(values) != len(edges):
            raise ConfigError(f"histogram: {name!r} has {len(values)} bins for {len(edges)} edges")
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right")
    for name in counts:
        table.add_column(name, width=width)
        table.add_column("n", justify="right")
    filled = [i for i in range(len(edges)) if any(values[i] for values in counts.values())]
    top = max((max(values) for values in counts.values()), default=0)
    for i in range(filled[0], filled[-1] + 1) if filled else ():
        above = f"{edges[i]}+" if i + 1 == len(edges) else f"{edges[i]}–{edges[i + 1] - 1}"
        row = [item for values in counts.values() for item in (Bar(top, 0, values[i], width=width), str(values[i]))]
        table.add_row(above, *row)
    return table


def save_histogram(values: Mapping[str, np.ndarray], path: str | os.PathLike, *, unit: str) -> Path:
    """Histograms of lengths as a PNG file: one line per name, int [n] each. Returns the path.

    Raises ConfigError where there is nothing to draw.
    """
    from alignax.diagnostics import style

    drawn = {name: lengths for name, lengths in values.items() if len(lengths)}
    if not drawn:
        raise ConfigError("save_histogram: no lengths to draw")
    figure = style.figure(7, 4)
    axes = style.axes(figure, 1, 1, 1)
    edges = np.linspace(0, max(int(lengths.max()) for lengths in drawn.values()) + 1, 41)
    for colour, (name, lengths) in zip(itertools.cycle(style.COLOURS), drawn.items()):
        axes.stairs(np.histogram(lengths, edges)[0], edges, label=f"{name}, n = {len(lengths)}", color=colour,
                    linewidth=1.6)
    axes.set_xlabel(f"length in {unit}")
    axes.set_ylabel("records")
    axes.legend(frameon=False, fontsize=9)
    return style.save(figure, path)
