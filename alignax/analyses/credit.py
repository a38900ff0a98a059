"""Token-level credit: the implicit reward of every token of a pair, drawn on the text (From r to Q*, 2404.12358).

A policy trained by DPO is a token-level soft Q-function whose reward of a token is beta log(pi / pi_ref). Shown is the
log-ratio itself, without beta: positive where the stage made the token likelier at its prefix.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import matplotlib.cm
import matplotlib.colors
import numpy as np
from matplotlib.patches import Rectangle

from alignax import step
from alignax.analyses.of_run import Result, Stage
from alignax.diagnostics import style

SIDES = ("chosen", "rejected")
_LINE = 92  # characters of a line of the figure


def analyse(stage: Stage, *, shown: int = 4) -> Result:
    """Log-ratios log pi_after - log pi_before of every token of the stage's pairs; the figure shows the first `shown`.

    The table names of each side of a pair the sum and the tokens that gained and lost most.
    """
    spec = stage.ctx.spec
    wanted = {"token_logps", "ref_token_logps", "mask"}
    compute = jax.jit(lambda after, before, batch: step.compute(spec, after, before, batch, wanted))
    found = stage.each(lambda batch: compute(stage.after, stage.before, batch))
    ratio = found["token_logps"].astype(np.float64) - found["ref_token_logps"]
    pairs, rows = [], []
    for n, record in enumerate(stage.records):
        entry = {"id": record.id}
        for k, side in enumerate(SIDES):
            scored, count = found["mask"][n, k], len(record.completions[k])
            spelled = [stage.ctx.tokenizer.token(int(i)) for i in record.completions[k]]
            values = np.where(scored, ratio[n, k], np.nan)[:count]
            entry[side] = {"tokens": spelled, "credit": [None if np.isnan(v) else float(v) for v in values]}
            best, worst = int(np.nanargmax(values)), int(np.nanargmin(values))
            if n < shown:
                rows.append([f"{record.id[:20]} {side}", float(np.nansum(values)), int(scored.sum()),
                             f"{spelled[best].strip()} {values[best]:+.2f}",
                             f"{spelled[worst].strip()} {values[worst]:+.2f}"])
        pairs.append(entry)
    numbers = {"stage": stage.name, "from": stage.init, "unit": "nats, log pi_after - log pi_before", "pairs": pairs}
    label = f"log π({stage.name}) − log π({stage.init}) of a token (nats)"
    return Result(numbers, f"{stage.name}: log-ratio to {stage.init}, token by token",
                  ["completion", "sum (nats)", "tokens", "gained most", "lost most"], rows, [],
                  lambda path: draw(pairs[:shown], label, path))


def _spelling(token: str) -> str:
    """A token as it is drawn: a mark where a piece opens with a space, no line ends."""
    return token.replace("\n", "⏎").replace("▁", "·").replace("Ġ", "·").replace("Ċ", "⏎") or "∅"


def lines(tokens: Sequence[str]) -> list[list[tuple[int, int, int]]]:
    """Lines of (token number, column, width) that hold at most _LINE characters each."""
    out: list[list[tuple[int, int, int]]] = [[]]
    column = 0
    for number, token in enumerate(tokens):
        width = len(_spelling(token)) + 1
        if column and column + width > _LINE:
            out.append([])
            column = 0
        out[-1].append((number, column, width))
        column += width
    return out


def draw(pairs: Sequence[dict], label: str, path: pathlib.Path) -> pathlib.Path:
    """Every token on its colour: orange where it lost, blue where it gained; the scale ends at the 98th percentile."""
    blocks = [(pair, side, lines(pair[side]["tokens"])) for pair in pairs for side in SIDES]
    height = sum(len(block) for _, _, block in blocks) + 0.9 * len(blocks) + 0.7 * len(pairs)
    sizes = [abs(v) for pair in pairs for side in SIDES for v in pair[side]["credit"] if v is not None]
    top = max(float(np.percentile(sizes, 98)), 1e-6)
    colours = matplotlib.colors.LinearSegmentedColormap.from_list(
        "credit", [style.COLOURS[1], "#ffffff", style.COLOURS[0]])
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-top, top), colours)
    figure = style.figure(9.2, 0.26 * height + 0.4)
    axes = figure.add_subplot()
    axes.set_xlim(0, _LINE + 1)
    axes.set_ylim(height, 0)
    axes.axis("off")
    y = 0.0
    for pair, side, block in blocks:
        if side == SIDES[0]:
            axes.text(0, y + 0.45, pair["id"][:40], fontsize=style.NOTE, color=style.MUTED, va="center")
            y += 0.7
        total = sum(v for v in pair[side]["credit"] if v is not None)
        axes.text(0, y + 0.45, f"{side}  {total:+.2f} nats", fontsize=style.TICK, color=style.INK, va="center",
                  weight="bold")
        y += 0.9
        for line in block:
            for number, column, width in line:
                value = pair[side]["credit"][number]
                face = "#f0f0f0" if value is None else scale.to_rgba(value)
                axes.add_patch(Rectangle((column, y + 0.06), width - 0.15, 0.88, facecolor=face, edgecolor="none"))
                dark = value is not None and abs(value) > 0.6 * top
                axes.text(column + (width - 0.15) / 2, y + 0.5, _spelling(pair[side]["tokens"][number]),
                          fontsize=style.NOTE, family="monospace", ha="center", va="center",
                          color="white" if dark else style.INK, parse_math=False)
            y += 1
    bar = figure.colorbar(scale, ax=axes, label=label, shrink=min(1.0, 12 / height), aspect=18, extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.MUTED, labelsize=style.TICK)
    return style.save(figure, path)
