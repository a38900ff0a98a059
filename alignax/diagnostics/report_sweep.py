"""The report of a sweep: best configurations, what each factor does, figures, and one page that holds them all.

Reads sweep.json (that the folder is a sweep) and results.jsonl (one line per member) of `alignax sweep`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from alignax.diagnostics import pages, sweep_figures
from alignax.diagnostics import sweep_statistics as statistics
from alignax.diagnostics.compare import RESAMPLES
from alignax.types import ConfigError, DataError

_LOWER = ("loss", "kl", "perplexity")
_MOST_PANELS = 6
_FEW_SEEDS = 5
_KL = "kl_on_policy"


def write(folder: Path, out: Path, *, metric: str = "", better: str = "", top: int = 10, console: Any) -> Path:
    """Writes the report of a sweep's folder into `out` and returns the path of report.html.

    metric: a number of results.jsonl (default: win_rate, else the first loss on held-out records). better: higher,
    lower, or "" for what the name suggests. top: configurations in the tables. Prints the best ones to the console.
    Raises ConfigError for a metric that no member has, DataError where no member has finished yet or a line of
    results.jsonl cannot be read.
    """
    if top < 1:
        raise ConfigError(f"--top={top}; allowed: at least 1")
    every = _read(folder / "results.jsonl")
    # A dropped member's numbers are of fewer updates than the others'.
    rows = [row for row in every if row["state"] != "dropped"]
    metric = _metric(rows, metric, folder)
    words = metric.replace("_", ".").split(".")
    lower = better == "lower" if better else any(word in words for word in _LOWER)
    found = statistics.configurations(rows, metric, lower=lower)
    effects = statistics.effects(rows, metric, lower=lower)
    factors = statistics.factors_of(rows)
    short = statistics.short_names(factors)
    out.mkdir(parents=True, exist_ok=True)

    best = _best_table(found[:top], factors, short, metric, rows)
    levels = _level_table(effects, short, metric)
    drawn = _draw(rows, found[:top], effects, factors, short, metric, lower, out / "figures")
    title = f"Sweep {folder.resolve().name}: {metric}"
    told = _told(every, found, metric, lower)
    (out / "report.md").write_text(_markdown(title, told, best, levels, drawn), encoding="utf-8")
    tex = [pages.latex_table(*best, caption=f"Best configurations by {metric}.")]
    if levels[1]:
        tex.append(pages.latex_table(*levels, caption=f"Marginal effects on {metric}."))
    (out / "tables.tex").write_text("\n".join(tex), encoding="utf-8")
    sections = [("", [pages.paragraph(line) for line in told]),
                ("Best configurations", [pages.html_table(*best, sortable=True), *_images(drawn, "best")])]
    if levels[1]:
        sections.append(("Effect of each factor", [pages.paragraph(_LEVELS), pages.html_table(*levels, sortable=True),
                                                   *_images(drawn, "effects")]))
    sections.append(("Factors together", _images(drawn, "heat_map", "lines", "frontier", "parallel")))
    sections.append(("All members", [pages.html_table(*_member_table(every, metric), sortable=True)]))
    sections.append(("Tables to copy", [pages.source("\n".join(tex), "LaTeX (booktabs)"), pages.source(
        "\n".join(pages.markdown_table(*t) for t in (best, levels) if t[1]), "Markdown")]))
    page = out / "report.html"
    page.write_text(pages.page(title, [s for s in sections if s[1]]), encoding="utf-8")
    _print(console, best, told)
    return page


_LEVELS = ("A level's location is the interquartile mean over all members that have it. Column 'behind best' compares "
           "it with the factor's best level over pairs of members alike in everything else, the seed included: the "
           "mean difference with its interval; empty where there are no such pairs.")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise DataError(f"{path} is missing; `alignax sweep` writes it when it ends or is stopped")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("member", "state", "reason", "factors", "metrics")})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a member's row ({error!r})") from error
    return rows


def _metric(rows: Sequence[Mapping[str, Any]], wanted: str, folder: Path) -> str:
    names = list(dict.fromkeys(key for row in rows for key, value in row["metrics"].items() if value is not None))
    if not names:
        raise DataError(f"{folder}: none of its {len(rows)} members has a result yet")
    if wanted:
        if wanted not in names:
            raise ConfigError(f"--metric={wanted}; allowed, the numbers of {folder / 'results.jsonl'}: "
                              f"{', '.join(sorted(names))}")
        return wanted
    losses = [name for name in names if name.endswith(".eval.loss")]
    return "win_rate" if "win_rate" in names else losses[0] if losses else names[0]


def _told(rows: Sequence[Mapping], found: Sequence[statistics.Configuration], metric: str, lower: bool) -> list[str]:
    """The facts at the head of the report."""
    states = {state: sum(row["state"] == state for row in rows)
              for state in ("finished", "dropped", "failed", "pending")}
    valued = sum(len(one.values) for one in found)
    seeds = sorted({len(one.values) for one in found})
    drawn = "seeds are drawn again inside each configuration" if seeds[0] > 1 else (
        "members are drawn again, since there are configurations of one seed")
    lines = [f"{len(rows)} members: {', '.join(f'{n} {state}' for state, n in states.items() if n)}. "
             f"{valued} have a finite {metric}; {'lower' if lower else 'higher'} is better.",
             f"{len(found)} configurations with {' to '.join(map(str, {seeds[0]: 0, seeds[-1]: 0}))} "
             f"{'seed' if seeds[-1] == 1 else 'seeds'} each. "
             "Configurations are summarised by the interquartile mean over seeds, with 95% percentile intervals of "
             f"{RESAMPLES} bootstrap samples ({drawn})."]
    if 1 < seeds[-1] < _FEW_SEEDS:
        lines.append(f"Intervals of fewer than {_FEW_SEEDS} seeds are too narrow: a bootstrap knows no seed that it "
                     "has not seen.")
    if metric.split(".")[-1] == "loss" and len({str(row["factors"].get("loss")) for row in rows}) > 1:
        lines.append("Values of different losses have different scales: compare them inside one loss only.")
    if states["dropped"]:
        lines.append("Dropped members are left out of all statistics: what is said of a factor is said of those that "
                     "went on, which were chosen.")
    spent = [row["metrics"][_KL] for row in rows if statistics.value_of(row, _KL) is not None]
    if metric != _KL and spent and max(spent) > 2 * max(min(spent), 1.0):
        lines.append(f"Members spent between {pages.number(min(spent))} and {pages.number(max(spent))} nats of KL "
                     f"({_KL}): compare {metric} at equal KL.")
    for row in rows:
        if row["state"] == "failed":
            lines.append(f"Failed: {row['member']}: {row['reason']}")
    return lines


def _interval(one: statistics.Estimate | None) -> str:
    return "" if one is None or one.low is None else f"[{pages.number(one.low)}, {pages.number(one.high)}]"


def _best_table(found: Sequence[statistics.Configuration], factors: Sequence[str], short: Mapping[str, str],
                metric: str, rows: Sequence[Mapping]) -> tuple[list[str], list[list]]:
    """The metric of the best configurations, and what KL each spent (mean over its seeds) where that is known."""
    spent = {row["member"]: value for row in rows if (value := statistics.value_of(row, _KL)) is not None}
    shown = metric != _KL and all(name in spent for one in found for name in one.members)
    means = [[float(np.mean([spent[name] for name in one.members]))] if shown else [] for one in found]
    headings = [*(short[f] for f in factors), metric, "95% interval", *[_KL] * shown, "seeds", "failed"]
    return headings, [[*(statistics.show(one.factors.get(f)) for f in factors), one.estimate.value,
                       _interval(one.estimate), *mean, one.estimate.n, one.failed]
                      for one, mean in zip(found, means, strict=True)]


def _level_table(effects: Sequence[statistics.Effect], short: Mapping[str, str],
                 metric: str) -> tuple[list[str], list[list]]:
    headings = ["factor", "level", metric, "95% interval", "members", "failed", "behind best", "95% interval", "pairs"]
    rows = []
    for effect in effects:
        for level in effect.levels:
            gap = level.behind
            rows.append([short[effect.factor], level.label, level.estimate.value, _interval(level.estimate),
                         level.estimate.n, level.failed, None if gap is None else gap.value, _interval(gap),
                         None if gap is None else gap.n])
    return headings, rows


def _member_table(rows: Sequence[Mapping], metric: str) -> tuple[list[str], list[list]]:
    factors = list(dict.fromkeys(key for row in rows for key in row["factors"]))
    short = statistics.short_names(factors)
    others = [name for name in dict.fromkeys(k for row in rows for k in row["metrics"])
              if name != metric and "." not in name][:8]
    headings = ["member", *(short[f] for f in factors), "state", metric, *others]
    return headings, [[row["member"], *(row["factors"].get(f) if isinstance(row["factors"].get(f), (int, float))
                                        else statistics.show(row["factors"].get(f)) for f in factors), row["state"],
                       row["metrics"].get(metric), *(row["metrics"].get(name) for name in others)] for row in rows]


def _draw(rows, found, effects, factors, short, metric, lower, folder: Path) -> dict[str, tuple[Path, str]]:
    """The figures that this sweep has the factors for: name -> (path, caption)."""
    drawn = {}
    names = ["  ".join(v if isinstance(v, str) else f"{short[f]} {statistics.show(v)}" for f in factors
                       if (v := one.factors.get(f)) is not None) or one.members[0] for one in found]
    drawn["best"] = sweep_figures.best(found, names, metric, folder / "best.png"), \
        f"The best configurations by {metric}; rings are seeds, dots interquartile means with their 95% interval."
    if effects:
        drawn["effects"] = sweep_figures.effects(effects, short, metric, folder / "effects.png"), \
            f"{metric} by level of each factor, over all members that have the level; the largest spread first."
    pair = _pair(rows, [effect.factor for effect in effects])
    if pair:
        drawn["heat_map"] = _heat_map(rows, *pair, factors, short, metric, folder / "heat_map.png")
    numeric = [f for f in (effect.factor for effect in effects) if _numeric(rows, f)]
    if numeric:
        drawn["lines"] = _lines(rows, numeric[0], effects, short, metric, folder / "lines.png")
    spent = _frontier(rows, effects, short, folder / "frontier.png")
    if spent:
        drawn["frontier"] = spent
    members = [([row["factors"].get(f) if isinstance(row["factors"].get(f), (int, float, str))
                 else statistics.show(row["factors"].get(f)) or None for f in factors], value)
               for row in rows if (value := statistics.value_of(row, metric)) is not None]
    if factors:
        drawn["parallel"] = sweep_figures.parallel(members, [short[f] for f in factors], metric,
                                                   folder / "parallel.png", lower=lower), \
            "Parallel coordinates: a line per member, its colour the metric; the better ones are drawn on top."
    return drawn


def _numeric(rows: Sequence[Mapping], factor: str) -> bool:
    held = {row["factors"][factor] for row in rows if isinstance(row["factors"].get(factor), (int, float))
            and not isinstance(row["factors"][factor], bool)}
    return len(held) > 1 and all(isinstance(row["factors"].get(factor), (int, float, type(None))) for row in rows)


def _pair(rows: Sequence[Mapping], ranked: Sequence[str]) -> tuple[str, str] | None:
    """The two factors of a map: those that most members have, numbers before texts, more cells before fewer; of equals,
    those of the larger effect. None where no two share four cells, which are the least for a map."""
    best, most = None, (0, False, 0)
    for one, two in itertools.combinations(ranked, 2):
        a, b = statistics.levels_of(rows, one)[1], statistics.levels_of(rows, two)[1]
        both = a.keys() & b.keys()
        score = len(both), _numeric(rows, one) and _numeric(rows, two), len({(a[m], b[m]) for m in both})
        if score[-1] >= 4 and score > most:
            best, most = (one, two), score
    return best


def _heat_map(rows, one: str, two: str, factors, short, metric, path: Path) -> tuple[Path, str]:
    """The pair's map, a panel for each level of a third factor of texts where there is one that splits it."""
    down, across = (two, one) if _numeric(rows, one) else (one, two)
    third = next((f for f in factors if f not in (one, two) and not _numeric(rows, f)
                  and 2 <= len(statistics.levels_of(rows, f)[0]) <= _MOST_PANELS), None)
    row_labels, row_of = statistics.levels_of(rows, down)
    column_labels, column_of = statistics.levels_of(rows, across)
    titles, panel_of = statistics.levels_of(rows, third) if third else ([""], {row["member"]: "" for row in rows})
    cells: dict[tuple, list[float]] = {}
    for row in rows:
        name, value = row["member"], statistics.value_of(row, metric)
        if value is not None and name in row_of and name in column_of and name in panel_of:
            cells.setdefault((panel_of[name], row_of[name], column_of[name]), []).append(value)
    panels = {title: np.asarray([[float(statistics.interquartile_mean(cells[title, r, c])) if (title, r, c) in cells
                                  else np.nan for c in column_labels] for r in row_labels]) for title in titles}
    panels = {title: table for title, table in panels.items() if np.isfinite(table).any()}
    split = f", a panel for each {short[third]}" if third else ""
    caption = (f"{metric} by {short[down]} and {short[across]}{split}; a cell is the interquartile mean over its "
               "members.")
    return sweep_figures.heat_maps(panels, row_labels, column_labels, metric, path, row_name=short[down],
                                   column_name=short[across]), caption


def _lines(rows, factor: str, effects, short, metric, path: Path) -> tuple[Path, str]:
    """The metric over a numeric factor, a line per level of the other factor of the largest effect."""
    by = next((e.factor for e in effects if e.factor != factor and any(row["factors"].get(factor) is not None
               and row["factors"].get(e.factor) is not None for row in rows)
               and len(statistics.levels_of(rows, e.factor)[0]) <= sweep_figures.MOST_LINES), None)
    labels, label_of = statistics.levels_of(rows, by) if by else ([""], {row["member"]: "" for row in rows})
    held: dict[str, dict[float, list[float]]] = {label: {} for label in labels}
    for row in rows:
        value, at = statistics.value_of(row, metric), row["factors"].get(factor)
        if value is not None and at is not None and row["member"] in label_of:
            held[label_of[row["member"]]].setdefault(at, []).append(value)
    series = {label: [(at, statistics.estimate([found[at]])) for at in sorted(found)]
              for label, found in held.items() if found}
    caption = f"{metric} over {short[factor]}" + (f", a line for each {short[by]}" if by else "") + (
        "; interquartile means over members with their 95% interval.")
    return sweep_figures.lines(series, metric, path, factor=short[factor], by=short[by] if by else ""), caption


def _frontier(rows, effects, short, path: Path) -> tuple[Path, str] | None:
    """Win rate over KL where the members have both, coloured by the factor of the largest effect with few levels."""
    known = [row for row in rows if statistics.value_of(row, "win_rate") is not None
             and statistics.value_of(row, "kl_on_policy") is not None]
    if not known:
        return None
    few = [e.factor for e in effects if len(statistics.levels_of(rows, e.factor)[0]) <= sweep_figures.MOST_LINES]
    by = next((f for f in few if not _numeric(rows, f)), few[0] if few else None)
    labels, label_of = statistics.levels_of(rows, by) if by else (["members"], {r["member"]: "members" for r in rows})
    series = {label: [(row["metrics"]["kl_on_policy"], row["metrics"]["win_rate"]) for row in known
                      if label_of.get(row["member"]) == label] for label in labels}
    caption = ("Win rate over KL, a dot per member" + (f", its colour the {short[by]}" if by else "")
               + "; the curve is best-of-n sampling from the baseline. Members on its left do more with their KL.")
    path = sweep_figures.frontier({k: v for k, v in series.items() if v}, path, by=short[by] if by else "")
    return path, caption


def _images(drawn: Mapping[str, tuple[Path, str]], *names: str) -> list[str]:
    return [pages.image(*drawn[name]) for name in names if name in drawn]


def _markdown(title: str, told: Sequence[str], best, levels, drawn) -> str:
    parts = [f"# {title}", *told, "## Best configurations", pages.markdown_table(*best)]
    if levels[1]:
        parts += ["## Effect of each factor", _LEVELS, pages.markdown_table(*levels)]
    parts += ["## Figures", *(f"![{caption}](figures/{path.name})" for path, caption in drawn.values())]
    return "\n\n".join(parts) + "\n"


def _print(console: Any, best, told: Sequence[str]) -> None:
    table = Table(title="best configurations", title_justify="left")
    headings, rows = best
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if any(isinstance(row[index], str) for row in rows) else "right")
    for row in rows:
        table.add_row(*(pages.number(c) if isinstance(c, float) else "" if c is None else str(c) for c in row))
    console.print(told[0], markup=False, highlight=False)
    console.print(table)
