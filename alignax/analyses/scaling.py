"""Fits over several runs: gold reward against the KL that it cost, and loss against parameters and tokens."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from matplotlib import ticker
from rich.console import Console

from alignax import examine, metrics
from alignax.analyses.of_run import Result
from alignax.diagnostics import scaling_fits, style
from alignax.types import ConfigError, DataError

_LEAST, _RESAMPLES = 3, 1000
_NAMED = 7  # series that a legend names; beyond it, one entry or a colour scale


def points(folders: Sequence[pathlib.Path]) -> list[dict]:
    """{"run", "policy", "kl", "d", "gold"} of every policy that the runs' evaluate stages compared with a baseline.

    gold: mean gold reward less the baseline's; d = sqrt(KL), 0 where the estimate is not above 0. Raises ConfigError
    for a folder without a result.json.
    """
    out = []
    for folder in folders:
        if not (folder / "result.json").is_file():
            raise ConfigError(f"{folder}: no result.json there; expected the folder of a finished run")
        stages = json.loads((folder / "result.json").read_text(encoding="utf-8")).get("stages", {})
        for stage in stages.values():
            for row in stage.get("points", [])[1:]:
                out.append({"run": folder.resolve().name, "policy": row["policy"], "kl": row["kl_on_policy"],
                            "d": math.sqrt(max(row["kl_on_policy"], 0.0)),
                            "gold": row["gold_reward"] - stage["points"][0]["gold_reward"]})
    return out


def overoptimisation(folders: Sequence[pathlib.Path]) -> Result:
    """Both laws of 2210.10760 over the policies that the runs evaluated, with bootstrap intervals over them.

    Raises ConfigError for fewer than 3 policies at different KL above 0.
    """
    found = points(folders)
    if len({p["d"] for p in found if p["d"] > 0}) < _LEAST:
        raise ConfigError(f"found {len(found)} evaluated policies with {len({p['d'] for p in found if p['d'] > 0})} "
                          f"different KL above 0; needed: {_LEAST} or more. Name several runs (of other strengths), or "
                          "a run whose evaluate stage lists several policies")
    d, gold = (np.asarray([p[key] for p in found]) for key in ("d", "gold"))
    rows, laws = [], {}
    for law in scaling_fits.LAWS:
        fit = scaling_fits.overoptimisation(d, gold, law)
        bounds = scaling_fits.bootstrap(lambda x, y, law=law: scaling_fits.overoptimisation(x, y, law)[:2], d, gold,
                                        resamples=_RESAMPLES)
        laws[law] = {"a": fit.a, "b": fit.b, "peak_d": fit.peak[0], "peak_gold": fit.peak[1], "rmse": fit.rmse,
                     "r2": fit.r2, "interval_low": bounds.low.tolist(), "interval_high": bounds.high.tolist(),
                     "refused": bounds.failed}
        rows.append([law, fit.a, f"[{bounds.low[0]:.3g}, {bounds.high[0]:.3g}]", fit.b,
                     f"[{bounds.low[1]:.3g}, {bounds.high[1]:.3g}]",
                     *(fit.peak if _inside(fit.peak[0], d) else (None, None)), fit.rmse])
    notes = [f"{len(found)} policies; intervals: 95%, bootstrap over policies",
             f"peak: left out where a law has none (b <= 0) or has it outside of the data (0 to d = {d.max():.3g})"]
    return Result({"points": found, "laws": laws}, "gold reward over d = sqrt(KL)",
                  ["law", "a", "95%", "b", "95%", "peak at d", "gold there", "rmse"], rows, notes,
                  lambda path: _draw_gold(found, laws, path))


def _inside(peak_d: float, d: np.ndarray) -> bool:
    """Whether a law's peak lies where there are policies; one beyond them is a guess and is not shown as a number."""
    return 0 < peak_d <= d.max()


def _draw_gold(found: Sequence[dict], laws: dict, path: pathlib.Path) -> pathlib.Path:
    """The policies, those of a run by one mark, and both laws: faint beyond the data, their peaks marked inside it."""
    figure = style.figure(6.4, 3.8)
    axes = style.axes(figure)
    d = np.asarray([p["d"] for p in found])
    runs_of = list(dict.fromkeys(p["run"] for p in found))
    for run, mark in zip(runs_of, itertools.cycle("os^DvPX")):
        own = [p for p in found if p["run"] == run]
        axes.plot([p["d"] for p in own], [p["gold"] for p in own], mark, color=style.INK, markersize=5, zorder=3,
                  label=run if len(runs_of) <= _NAMED else None)
    names = {"best_of_n": "d (a − b d)", "rl": "d (a − b log d)"}
    for (law, fit), colour, line in zip(laws.items(), style.COLOURS, style.DASHES, strict=False):
        for low, high, alpha in ((1e-3, d.max(), 1.0), (d.max(), 1.15 * d.max(), 0.4)):
            x = np.linspace(low, high, 200)
            axes.plot(x, scaling_fits.LAWS[law](x) @ [fit["a"], fit["b"]], color=colour, linewidth=1.8, linestyle=line,
                      alpha=alpha, label=f"{names[law]}, rmse {fit['rmse']:.2g}" if alpha == 1 else None)
        if _inside(fit["peak_d"], d):
            axes.plot(fit["peak_d"], fit["peak_gold"], "o", markersize=9, markerfacecolor="none", markeredgewidth=1.6,
                      color=colour, label=f"its peak, d = {fit['peak_d']:.2g}", zorder=4)
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.set_xlabel("d = sqrt(KL(policy ‖ reference)), KL in nats per sequence")
    axes.set_ylabel("gold reward less the baseline's")
    style.legend(axes, fontsize=style.NOTE)
    return style.save(figure, path)


def runs(folders: Sequence[pathlib.Path], stage: str) -> list[dict]:
    """{"run", "parameters", "tokens", "loss"} of each run's train stage: scored tokens trained on, last loss on
    held-out records. Raises ConfigError where a run lacks the stage, a held-out loss or rows with its tokens."""
    out = []
    for folder in folders:
        ctx, config = examine.open_run(folder, Console(quiet=True))
        names = [name for name in config.stages if config[name].kind == "train"]
        name = stage or names[0]
        rows = metrics.read_metrics(folder, stage=name)
        held = [r for r in rows if r["split"] == "eval" and "loss" in r]
        sizes = [r["tokens"] for r in rows if r["split"] == "train" and "tokens" in r]  # per update
        if name not in names or not held or not sizes:
            raise ConfigError(f"{folder}: stage {name} has no loss on held-out records or no training rows; train "
                              f"stages: {', '.join(names)}")
        out.append({"run": folder.resolve().name, "tokens": float(np.mean(sizes)) * held[-1]["step"],
                    "loss": held[-1]["loss"],
                    "parameters": sum(leaf.size for leaf in jax.tree.leaves(ctx.initial["model"]))})
    return out


def scaling(folders: Sequence[pathlib.Path], *, stage: str = "") -> Result:
    """L over N, over D, or L(N, D) = E + A/N^alpha + B/D^beta: whichever the runs vary, with bootstrap intervals.

    Raises ConfigError for fewer than 3 runs (5 where both vary).
    """
    found = runs(folders, stage)
    n, d, loss = (np.asarray([r[key] for r in found], float) for key in ("parameters", "tokens", "loss"))
    vary = [np.ptp(x) > 0.02 * x.max() for x in (n, d)]
    least = 5 if all(vary) else _LEAST
    if len(found) < least or not any(vary):
        raise ConfigError(f"found {len(found)} runs, parameters {sorted(set(n.tolist()))}, tokens "
                          f"{sorted({round(x) for x in d.tolist()})}; needed: {_LEAST} or more runs that differ in one "
                          "of them, 5 that differ in both")
    try:
        names, fit, law = _fit(n, d, loss, vary)
        whole = fit(n, d, loss)
        bounds = scaling_fits.bootstrap(fit, n, d, loss, resamples=_RESAMPLES if not all(vary) else 200)
    except DataError as error:
        raise ConfigError(f"no scaling law fits these runs: {error}") from error
    rows = [[name, value, f"[{low:.3g}, {high:.3g}]"]
            for name, value, low, high in zip(names, whole, bounds.low, bounds.high, strict=True)]
    numbers = {"runs": found, "law": law, "fit": dict(zip(names, map(float, whole), strict=True)),
               "interval_low": bounds.low.tolist(), "interval_high": bounds.high.tolist(), "refused": bounds.failed}
    if all(vary):
        draw = lambda path: _draw_both(n, d, loss, scaling_fits.Chinchilla(*whole), path)
    else:
        x, label = (n, "parameters N") if vary[0] else (d, "scored training tokens D")
        draw = lambda path: _draw_one(x, loss, label, scaling_fits.PowerLaw(*whole), path)
    return Result(numbers, f"{law}, {len(found)} runs", ["constant", "value", "95% (bootstrap over runs)"], rows, [],
                  draw)


def _fit(n, d, loss, vary):
    """(names of constants, function of rows -> constants, the law in words)."""
    if all(vary):
        start = scaling_fits.chinchilla(n, d, loss)
        return (scaling_fits.Chinchilla._fields, lambda n, d, loss: scaling_fits.chinchilla(n, d, loss, start=start),
                "L = e + a / N^alpha + b / D^beta")
    letter = "N" if vary[0] else "D"
    return (scaling_fits.PowerLaw._fields,
            lambda n, d, loss: scaling_fits.power_law(n if vary[0] else d, loss), f"L = (scale / {letter})^exponent")


def short(count: float) -> str:
    """A count in three digits: 950, 1.2k, 30M, 7B, 1.5T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def _loss_axes(figure, x: np.ndarray, label: str):
    """Log-log axes with plain numbers: losses seldom span a decade, where powers of ten would be 9 x 10^-1."""
    axes = style.axes(figure)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    if x.max() < 20 * x.min():
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(label)
    axes.set_ylabel("loss on held-out records")
    return axes


def _draw_one(x: np.ndarray, loss: np.ndarray, label: str, law, path: pathlib.Path) -> pathlib.Path:
    """The runs, and the power law of the one number that varies."""
    figure = style.figure(5.4, 3.4)
    axes = _loss_axes(figure, x, label)
    axes.plot(x, loss, "o", color=style.INK, markersize=5, label="runs", zorder=3)
    grid = np.geomspace(x.min(), x.max(), 50)
    axes.plot(grid, law(grid), color=style.COLOURS[0], linewidth=1.8,
              label=f"({short(law.scale)} / {label[-1]})^{law.exponent:.3g}")
    style.legend(axes, fontsize=style.NOTE)
    return style.save(figure, path)


def _draw_both(n: np.ndarray, d: np.ndarray, loss: np.ndarray, law, path: pathlib.Path) -> pathlib.Path:
    """The runs over their parameters, and the law at each number of tokens, dark to light by tokens; numbers within 5%
    of one another are one."""
    figure = style.figure(6.0, 3.6)
    axes = _loss_axes(figure, n, "parameters N")
    groups: list[list[int]] = []
    for i in np.argsort(d):
        if groups and d[i] <= 1.05 * d[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    grid = np.geomspace(n.min(), n.max(), 50)
    for own, colour in zip(groups, style.shades(len(groups)), strict=True):
        tokens = np.exp(np.log(d[own]).mean())
        axes.plot(n[own], loss[own], "o", color=colour, markersize=5, zorder=3)
        axes.plot(grid, law(grid, tokens), color=colour, linewidth=1.6,
                  label=f"D = {short(tokens)}" if len(groups) <= _NAMED else None)
    if len(groups) <= _NAMED:
        style.legend(axes, fontsize=style.NOTE, title="scored training tokens", title_fontsize=style.NOTE)
    else:
        style.colour_scale(figure, [axes], np.log10(d.min()), np.log10(d.max()), "log10 of scored training tokens")
    return style.save(figure, path)
