"""One page about a preference run: the three curves, the pull on either side, where the mass went, the verdicts.

Takes the numbers that alignax.examine measured and the rows of metrics.jsonl; writes HTML with its figures inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from alignax.diagnostics import attribution, live, pages, properties, style
from alignax.diagnostics.style import COLOURS, INK, MUTED

SIDE_COLOURS = {"chosen": COLOURS[0], "rejected": COLOURS[1], "unseen": COLOURS[2], "fresh": COLOURS[2],
                "greedy": COLOURS[4], "baseline": INK}
BASELINE = "−KL(start ‖ policy)"


def summary(measured: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """excess (side -> Interval), check (what the fresh samples' own excess is; about 0 by identity), seen (the
    curves), verdicts."""
    excess = {side: properties.excess(measured["change"][side], measured["baseline"])
              for side in ("chosen", "rejected", "greedy")}
    seen = properties.curves(rows, measured["stage"])
    return {"excess": excess, "check": properties.excess(measured["change"]["fresh"], measured["baseline"]),
            "seen": seen, "verdicts": properties.judge(excess["chosen"], excess["rejected"], seen,
                                         properties.interval(measured["change"]["chosen"]))}


def write(folder: Path, stages: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, title: str,
          console: Any) -> Path:
    """Writes report.html and its figures into `folder` and the verdicts on the console; returns the page's path.

    stages: what alignax.examine.stage returns, one after another; rows: of metrics.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = [("", [pages.paragraph(
        "Log-ratios are to the parameters that the stage began with, in nats per sequence. After any training a "
        f"typical completion of the start loses {BASELINE} on average; what is judged is the excess over that "
        "baseline, with 95% bootstrap intervals over prompts.")])]
    for measured in stages:
        found = summary(measured, rows)
        name = measured["stage"]
        figures = [(_curves(measured, found, folder / f"{name}_curves.png"),
                    "The three curves. Left: change of log-likelihood since the start, the baseline dashed. Right: "
                    "what is left when the baseline is subtracted; points with bars: fresh samples at the end."),
                   (_mass(measured, found, folder / f"{name}_mass.png"),
                    "Where the mass went: excess over the baseline at the end, per sequence and per token.")]
        if (path := _gradients(measured, rows, folder / f"{name}_gradients.png")) is not None:
            figures.append((path, "Size of the loss's derivative on either side: by the log-probability (how hard the "
                                  "loss pulls) and by the probability itself (the quantity of arXiv 2406.07327)."))
        if (path := _attributed(rows, name, folder / f"{name}_attribution.png")) is not None:
            figures.append((path, "Which part of the actual update moved which completion, in nats per update on the "
                                  "probe, and the sum against what was measured."))
        sections.append((f"{name}: {_settings(measured)}", [
            pages.html_table(("property", "verdict", "rule, with the numbers", "what to try"),
                             [(v.name, v.verdict, v.rule, v.remedy if v.verdict == properties.SHOWN else "")
                              for v in found["verdicts"]]),
            *(pages.image(path, caption) for path, caption in figures),
            pages.html_table(("quantity", "value"), _facts(measured, found, rows))]))
        console.print(table(measured, found))
    path = folder / "report.html"
    path.write_text(pages.page(title, sections), encoding="utf-8")
    return path


def table(measured: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    """The verdicts of one stage for the terminal, under its excess displacements."""
    excess = "  ".join(f"{side} {value}" for side, value in found["excess"].items())
    out = Table(title=f"{measured['stage']} ({_settings(measured)}): excess displacement, nats per sequence: {excess}",
                title_justify="left")
    for heading in ("property", "verdict", "what to try"):
        out.add_column(heading)
    for verdict in found["verdicts"]:
        out.add_row(verdict.name, verdict.verdict, verdict.remedy if verdict.verdict == properties.SHOWN else "")
    return out


def _settings(measured: Mapping[str, Any]) -> str:
    """The loss and its numbers in one phrase."""
    hyper = ", ".join(f"{key} {value:g}" for key, value in measured["hyper"].items()
                      if isinstance(value, (int, float)) and not isinstance(value, bool))
    return f"{measured['loss']}, {hyper}" if hyper else measured["loss"]


def _facts(measured: Mapping[str, Any], found: Mapping[str, Any], rows) -> list[tuple[str, str]]:
    """Rows of the table of numbers."""
    out = [(f"excess of the {side}", str(value)) for side, value in found["excess"].items()]
    out += [(f"change of the {side}, baseline not subtracted", str(properties.interval(measured["change"][side])))
            for side in ("chosen", "rejected")]
    out += [("excess of the fresh samples themselves (0 in expectation: the check)", str(found["check"])),
            (f"baseline {BASELINE}, mean", f"{float(np.mean(measured['baseline'])):+.2f}"),
            ("probability of the start's greedy completion, start and end",
             "{:.3g}, {:.3g}".format(*measured["greedy"])),
            ("entropy on fresh samples, nats per token, start and end", "{:.3f}, {:.3f}".format(*measured["entropy"])),
            ("share of prompts whose chosen completion lost likelihood",
             f"{float(np.mean(measured['change']['chosen'] < 0)):.2f}"),
            ("length-normalised CHES at the start, mean; correlation with the chosen's change",
             f"{float(np.mean(measured['ches']['scores'])):.3g}; {measured['ches']['correlation']:+.2f}"),
            ("tokens: " + ", ".join(measured["lengths"]),
             ", ".join(f"{value:.1f}" for value in measured["lengths"].values()))]
    out += [(f"agreement: {key.replace('_', ' ')}", f"{value:.3f}") for key, value in measured["agreement"].items()]
    fits = _fits(rows, measured["stage"])
    out += [(f"R² of the attributed change of the {side}, over {count} updates", f"{fit:.3f}")
            for side, (fit, count) in fits.items()]
    return out + [("prompts, fresh samples of each", f"{measured['prompts']}, {measured['samples']}")]


def _watched(rows, stage: str, group: str) -> list[Mapping[str, Any]]:
    """The rows of a stage that hold numbers of a group of the live diagnostics."""
    return [row for row in rows if row["stage"] == stage and row["split"] == "diagnostics"
            and any(key.startswith(group + "/") for key in row)]


def _fits(rows, stage: str) -> dict[str, tuple[float, int]]:
    """side -> (R^2 of predicted against measured changes over the updates that were looked at, how many)."""
    seen = _watched(rows, stage, "attribution")
    if len(seen) < 3:
        return {}
    return {side: (attribution.r_squared([row[f"attribution/predicted_{side}"] for row in seen],
                                         [row[f"attribution/measured_{side}"] for row in seen]), len(seen))
            for side in live.SIDES}


def _panel(figure, *place: int, title: str, y: str, x: str = "update"):
    axes = style.axes(figure, *place)
    style.title(axes, title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "update":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return axes


def _curves(measured: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> Path:
    seen = found["seen"]
    ends = {side: float(np.mean(measured["change"][side])) for side in ("chosen", "rejected", "fresh", "greedy")}
    base = float(np.mean(measured["baseline"]))
    if not seen:  # a straight line between what is known: the start and the end
        seen = {"step": np.array([0.0, 1.0]), "baseline": np.array([0.0, base]), "unseen": np.array([0, ends["fresh"]]),
                **{side: np.array([0.0, ends[side]]) for side in ("chosen", "rejected")}}
    x = "update" if found["seen"] else "start and end of the run"
    figure = style.figure(10.4, 3.9)
    sides = [side for side in ("chosen", "rejected", "unseen") if side in seen]
    raw = _panel(figure, 1, 2, 1, title="change since the start", y="nats per sequence", x=x)
    left = _panel(figure, 1, 2, 2, title=f"less the baseline {BASELINE}", y="excess, nats per sequence", x=x)
    for axes, below, names in ((raw, 0, [*sides, "baseline"]), (left, seen["baseline"], sides)):
        axes.axhline(0, color=MUTED, linewidth=0.8)
        labels = []
        for side in names:
            values = seen[side] - below
            axes.plot(seen["step"], values, color=SIDE_COLOURS[side], linewidth=1.8,
                      linestyle="--" if side == "baseline" else "-")
            labels.append((side, SIDE_COLOURS[side], float(values[-1])))
        if axes is left:
            last = float(seen["step"][-1])
            for side, shift in (("chosen", 0.99), ("rejected", 1.01)):  # apart, so that neither hides the other
                _bar(axes, shift * last, found["excess"][side], SIDE_COLOURS[side])
        if not found["seen"]:
            axes.set_xticks([0, 1], ["start", "end"])
        figure.canvas.draw_idle()
        style.end_labels(axes, labels)
    return style.save(figure, path)


def _bar(axes, x: float, value: properties.Interval, colour: str) -> None:
    """A point with its interval."""
    error = [[value.mean - value.low], [value.high - value.mean]] if np.isfinite(value.low) else None
    axes.errorbar([x], [value.mean], yerr=error, fmt="o", color=colour, markersize=5, capsize=4, elinewidth=1.6,
                  markeredgecolor="white", zorder=4)


def _mass(measured: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> Path:
    figure = style.figure(10.4, 2.7)
    kinds = [("chosen", found["excess"]["chosen"]), ("rejected", found["excess"]["rejected"]),
             ("greedy", found["excess"]["greedy"]), ("fresh", found["check"])]
    names = {"chosen": "chosen", "rejected": "rejected", "greedy": "greedy of the start", "fresh": "fresh samples"}
    for number, (title, per) in enumerate((("per sequence", False), ("per token", True))):
        axes = _panel(figure, 1, 2, number + 1, title=title, y="", x=f"excess, nats {title}")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for height, (side, value) in enumerate(kinds):
            size = measured["lengths"][side] if per else 1.0
            mean, low, high = (part / size for part in value)
            axes.barh(height, mean, color=SIDE_COLOURS[side], height=0.6, alpha=0.85)
            if np.isfinite(low):
                axes.errorbar([mean], [height], xerr=[[mean - low], [high - mean]], color=INK, capsize=3,
                              elinewidth=1.2)
        axes.set_yticks(range(len(kinds)), [names[side] for side, _ in kinds] if not per else [""] * len(kinds))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    return style.save(figure, path)


def _gradients(measured: Mapping[str, Any], rows, path: Path) -> Path | None:
    """Curves where the run watched `entanglement`, else both ends; None where neither is known."""
    seen = [row for row in _watched(rows, measured["stage"], "entanglement") if "entanglement/pull" in row]
    slopes = measured["slopes"]
    if len(seen) < 2 and slopes is None:
        return None
    figure = style.figure(10.4, 3.4)
    x = "update" if len(seen) >= 2 else "start and end of the run"
    size = _panel(figure, 1, 2, 1, title="by the log-probability", y="|dl / d log π|", x=x)
    steep = _panel(figure, 1, 2, 2, title="by the probability", y="log₁₀ |dl / dπ|", x=x)
    marks = ("chosen", "pull", 0), ("rejected", "push", 1)
    for (side, name, index), line in zip(marks, ("-", "--"), strict=True):
        if len(seen) >= 2:
            steps = [row["step"] for row in seen]
            pairs = ((size, [abs(row[f"entanglement/{name}"]) for row in seen]),
                     (steep, [row[f"entanglement/log10_slope_{side}"] for row in seen]))
        else:
            steps, ends = [0, 1], (slopes["start"], slopes["end"])
            pairs = ((size, [float(np.abs(end[index]).mean()) for end in ends]),
                     (steep, [float(end[2 + index].mean()) for end in ends]))
        for axes, values in pairs:
            axes.plot(steps, values, color=SIDE_COLOURS[side], linestyle=line, linewidth=1.8, label=side,
                      marker=None if len(steps) > 2 else "o", markersize=4)
    for axes in (size, steep):
        if len(seen) < 2:
            axes.set_xticks([0, 1], ["start", "end"])
    size.set_ylim(bottom=0)
    style.legend(steep)
    return style.save(figure, path)


def _attributed(rows, stage: str, path: Path) -> Path | None:
    """Stacked parts for chosen and rejected over the updates that were looked at; None where none was."""
    seen = _watched(rows, stage, "attribution")
    if not seen:
        return None
    parts = ("chosen", "rejected", "other", "earlier", "decay")
    names = {"chosen": "chosen's gradient", "rejected": "rejected's gradient", "other": "other terms",
             "earlier": "earlier steps", "decay": "weight decay"}
    colours = dict(zip(parts, (COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[5], COLOURS[4]), strict=True))
    figure = style.figure(10.4, 3.4)
    steps = np.array([row["step"] for row in seen], float)
    for number, side in enumerate(("chosen", "rejected")):
        axes = _panel(figure, 1, 2, number + 1, title=f"update's effect on the {side}", y="nats per update")
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for part in parts:
            key = f"attribution/{side}_from_{part}"
            if key in seen[0]:
                axes.plot(steps, [row[key] for row in seen], color=colours[part], linewidth=1.5, label=names[part],
                          marker="o" if len(seen) < 4 else None, markersize=4)
        axes.plot(steps, [row[f"attribution/measured_{side}"] for row in seen], color=INK, linestyle="--",
                  linewidth=1.2, label="measured", marker="o" if len(seen) < 4 else None, markersize=4)
        if number:
            style.legend(axes, fontsize=style.NOTE, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return style.save(figure, path)
