"""What the comparison on the quickstart's model says: read at equal KL with paired intervals, one figure, one table."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignax.diagnostics import style
from experiments.papers import harness

LEVELS = (1.0, 3.0, 10.0)
MIDDLE = 3.0
DRAWS = 400
SHOWN = ("dpo", "ipo", "simpo", "kto", "orpo")
BESIDE = ("chosen", "entropy", "length")


def pick(reward: np.ndarray) -> np.ndarray:
    """int [..., seeds]: for each seed the setting that is best on the other seeds, -1 where none is there in all.

    reward: [..., settings, seeds], NaN where a run does not reach the level. Of one seed, its own best.
    """
    seeds = reward.shape[-1]
    there = np.isfinite(reward).all(-1, keepdims=True)
    held = np.where(there, reward, 0)
    others = held if seeds == 1 else (held.sum(-1, keepdims=True) - held) / (seeds - 1)
    others = np.where(there, others, -np.inf)
    return np.where(there.any(-2), others.argmax(-2), -1)


def chosen(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[..., seeds]: of values [..., settings, seeds] those of the settings `index` [..., seeds]; NaN where -1."""
    taken = np.take_along_axis(values, np.maximum(index, 0)[..., None, :], -2)[..., 0, :]
    return np.where(index < 0, np.nan, taken)


class Curves:
    """The population of one loss: [settings, seeds, marks] curves, and their redraws over prompts."""

    def __init__(self, row: Mapping[str, Any]):
        self.gold, self.kl = (np.asarray(row[name], float) for name in ("gold", "kl"))
        self.beside = {name: np.asarray(row[name], float) for name in BESIDE}
        self.diverged = int((np.asarray(row["diverged"]) > 0).sum())

    @functools.cached_property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """(KL, gold reward), means over prompts."""
        return self.kl.mean(-1), self.gold.mean(-1)

    def reward(self, level: float) -> np.ndarray:
        """[settings, seeds]: gold reward where the KL first reaches the level; NaN where it does not."""
        return harness.at_kl(*self.means, level)

    def read(self, level: float) -> dict[str, np.ndarray]:
        """reward and the numbers beside it, [seeds] each, each seed under the setting that is best on the others."""
        reward = self.reward(level)
        index = pick(reward)
        out = {"reward": chosen(reward, index)}
        return out | {name: chosen(harness.at_kl(self.means[0], curve, level), index)
                      for name, curve in self.beside.items()}

    def redrawn(self, level: float, weights: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """[draws]: the mean reward at the level over redrawn prompts (weights [draws, M]) and seeds (int [draws, n]),
        the setting chosen anew in each draw."""
        kl, gold = (np.moveaxis(values @ weights.T, -1, 0) for values in (self.kl, self.gold))
        reward = harness.at_kl(kl, gold, level)
        values = chosen(reward, pick(reward))
        return np.take_along_axis(values, seeds, 1).mean(1)


class Report:
    """All curves, read at equal KL.

    rows: name -> line of the results. entries: name -> what it is (quickstart_runs.Entry), in the table's order of
    losses. reference: whose reward the differences are from; control, best_of_n: names of the controls.
    """

    def __init__(self, rows: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Any], sizes: Any, reference: str,
                 control: str, best_of_n: str):
        self.rows, self.entries, self.sizes = rows, entries, sizes
        self.reference, self.control, self.best = reference, control, rows[best_of_n]
        self.curves = {name: Curves(rows[name]) for name in entries}
        rng = np.random.default_rng(3)
        self.weights = rng.multinomial(sizes.prompts, np.full(sizes.prompts, 1 / sizes.prompts), DRAWS) / sizes.prompts
        self.seeds = rng.integers(sizes.seeds, size=(DRAWS, sizes.seeds))
        self.found = {name: {level: curves.read(level) for level in LEVELS} for name, curves in self.curves.items()}
        self.draws = {name: {level: curves.redrawn(level, self.weights, self.seeds) for level in LEVELS}
                      for name, curves in self.curves.items()}

    def value(self, name: str, level: float, key: str = "reward") -> float:
        """The mean over seeds; NaN where a seed has none."""
        return float(self.found[name][level][key].mean())

    def interval(self, draws: np.ndarray) -> tuple[float, float]:
        """95% interval of the redraws; NaN where more than a tenth of them do not reach the level."""
        known = draws[np.isfinite(draws)]
        if known.size < 0.9 * draws.size:
            return float("nan"), float("nan")
        low, high = np.percentile(known, (2.5, 97.5))
        return float(low), float(high)

    def behind(self, name: str, level: float = MIDDLE) -> tuple[float, tuple[float, float]]:
        """(reward minus the reference's at the level, its interval): prompts and seeds are the same for both."""
        return (self.value(name, level) - self.value(self.reference, level),
                self.interval(self.draws[name][level] - self.draws[self.reference][level]))

    @property
    def order(self) -> list[str]:
        """Names by reward at KL 3, those that do not reach it last, by their reward at KL 1."""
        rank = lambda v: np.nan_to_num(v, nan=-99)
        return sorted(self.entries, key=lambda n: (-rank(self.value(n, MIDDLE)), -rank(self.value(n, 1.0))))

    def table(self) -> str:
        """The aligned Markdown table of every loss."""
        head = ["loss", "strength", *(f"reward, KL {level:g}" for level in LEVELS),
                f"minus {self.reference}, KL {MIDDLE:g}", "change of log p(chosen)", "entropy", "length", "largest KL"]
        lines = [head]
        for name in self.order:
            entry, curves = self.entries[name], self.curves[name]
            difference = "" if name == self.reference else _with(*self.behind(name), sign="+")
            lines.append([name, f"{entry.key} {', '.join(f'{v:g}' for v in entry.values[:self.sizes.strengths])}",
                          *(_with(self.value(name, v), self.interval(self.draws[name][v])) for v in LEVELS), difference,
                          *(_number(self.value(name, MIDDLE, key), digits) for key, digits in
                            zip(BESIDE, (1, 2, 1), strict=True)), _number(float(curves.means[0].mean(1).max()), 1)])
        wide = [max(len(line[i]) for line in lines) for i in range(len(head))]
        pad = lambda line: [cell.ljust(w) if i < 2 else cell.rjust(w)
                            for i, (cell, w) in enumerate(zip(line, wide, strict=True))]
        padded = [pad(line) for line in lines]
        rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(wide)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])

    def statements(self) -> list[str]:
        """What the numbers say, counted from them."""
        losses = [n for n in self.entries if n not in (self.control, "sft")]
        reached = {level: [n for n in losses if np.isfinite(self.value(n, level))] for level in LEVELS}
        counts = ", ".join(f"{len(reached[level])} reach KL {level:g}" for level in LEVELS)
        out = [f"Of {len(losses)} losses {counts}, with some setting in every seed."]
        if self.reference in reached[MIDDLE]:
            away = {n: self.behind(n) for n in reached[MIDDLE] if n != self.reference}
            above = [n for n, (_, (low, _)) in away.items() if low > 0]
            below = [n for n, (_, (_, high)) in away.items() if high < 0]
            out.append(f"At KL {MIDDLE:g} the interval of the difference from {self.reference} lies above 0 for "
                       f"{_listed(above)}, below 0 for {_listed(below)}, and holds 0 for the other "
                       f"{len(away) - len(above) - len(below)}. {len(away)} comparisons are made at once: one or two "
                       "such intervals are expected by chance.")
            means = [self.value(n, MIDDLE) for n in reached[MIDDLE]]
            own = self.curves[self.reference].reward(MIDDLE).mean(1)
            own = own[np.isfinite(own)]
            out.append(f"Rewards at KL {MIDDLE:g} lie between {min(means):.2f} and {max(means):.2f} over losses, and "
                       f"between {own.min():.2f} and {own.max():.2f} over the {own.size} settings of {self.reference} "
                       "that reach it.")
            ends = {n: self.curves[n].means[1][..., -1].mean(1) for n in losses}
            out.append("At the end of training, whatever the KL, the settings of one loss lie up to "
                       f"{max(np.ptp(v) for v in ends.values()):.2f} apart: a comparison at one setting ranks "
                       "settings.")
            down = [n for n in reached[MIDDLE] if self.value(n, MIDDLE, "chosen") < 0]
            out.append(f"At KL {MIDDLE:g} the chosen completions have become less likely under {len(down)} of the "
                       f"{len(reached[MIDDLE])}.")
        if self.control in self.curves:
            control = self.curves[self.control]
            at = [f"{self.value(self.control, level):.2f} at KL {level:g}" for level in LEVELS
                  if np.isfinite(self.value(self.control, level))]
            start = float(control.means[1][..., 0].mean())
            out.append(f"Labels turned at random give {_listed(at)}; the SFT model's own reward is {start:.2f}.")
        stopped = {n: c.diverged for n, c in self.curves.items() if c.diverged}
        out.append(f"Runs that stopped at a step that was not finite: "
                   f"{', '.join(f'{n} {count}' for n, count in stopped.items()) or 'none'}.")
        return out

    def figure(self, path: Path) -> Path:
        """The page of figures as PNG: frontiers, controls, and every loss at equal KL."""
        names = self.order
        height = 0.21 * len(names) + 0.9
        figure = style.figure(11.8, 3.9 + height)
        top, bottom = figure.subfigures(2, 1, height_ratios=(3.9, height))
        upper, lower = top.add_gridspec(1, 2), bottom.add_gridspec(1, 4, width_ratios=(3, 1.3, 1.3, 1.3))
        left, right = style.axes(top, upper[0]), style.axes(top, upper[1])
        labels = [n for n in SHOWN if n in self.curves]
        self._frontier(left, labels, "frontiers: setting chosen on other seeds")
        self._frontier(right, [n for n in (self.reference, "sft", self.control) if n in self.curves], "controls")
        rows = np.arange(len(names))[::-1]
        places = dict(zip(("reward", *BESIDE), (lower[i] for i in range(4)), strict=True))
        titles = {"reward": "gold reward at equal KL, 95% intervals", "chosen": "change of\nlog p(chosen), nats",
                  "entropy": "entropy,\nnats per token", "length": "length,\ntokens"}
        for key, place in places.items():
            axes = style.axes(bottom, place)
            for number, (level, colour, mark) in enumerate(zip(LEVELS, style.COLOURS, "os^", strict=False)):
                # One under another, so that intervals do not cover each other.
                lines = rows + (0.24 * (1 - number) if key == "reward" else 0)
                values = np.asarray([self.value(n, level, key) for n in names])
                if not np.isfinite(values).any():
                    continue
                if key == "reward":
                    ends = np.asarray([self.interval(self.draws[n][level]) for n in names])
                    for y, value, (low, high) in zip(lines, values, ends, strict=True):
                        if np.isfinite([value, low]).all():
                            axes.plot([low, high], [y, y], color=colour, linewidth=1)
                axes.plot(values, lines, mark, color=colour, markersize=4, linestyle="none", label=f"KL {level:g}")
            axes.set_yticks(rows, names if key == "reward" else [""] * len(names), fontsize=style.NOTE)
            axes.set_ylim(-0.8, len(names) - 0.2)
            axes.set_xlabel(titles[key], fontsize=style.TICK)
            if key == "reward" and axes.get_legend_handles_labels()[0]:
                style.legend(axes, loc="lower right", fontsize=style.NOTE)
            if key == "chosen":
                axes.axvline(0, color=style.MUTED, linewidth=0.8)
        return style.save(figure, path, vector=False, dpi=90)

    def _frontier(self, axes: Any, names: Sequence[str], title: str) -> None:
        levels = np.concatenate([[0.0], np.linspace(0.25, LEVELS[-1], 40)])
        start = float(np.mean([c.means[1][..., 0].mean() for c in self.curves.values()]))
        labels, drawn = [], [0.0]
        for number, (name, colour, line) in enumerate(zip(names, style.COLOURS, (*style.DASHES, "-"), strict=False)):
            at = [self.curves[name].reward(level) for level in levels[1:]]
            values = np.asarray([start, *(chosen(reward, pick(reward)).mean() for reward in at)])
            known = np.isfinite(values)
            axes.plot(levels[known], values[known], color=colour, linestyle=line, linewidth=1.8)
            for level in LEVELS:
                low, high = self.interval(self.draws[name][level])
                if np.isfinite(low) and np.isfinite(self.value(name, level)):
                    beside = level + 0.07 * (number - (len(names) - 1) / 2)  # so that intervals do not hide each other
                    axes.plot([beside, beside], [low, high], color=colour, linewidth=1.2)
                    drawn += [low, high]
            labels.append((name, colour, float(values[known][-1])))
            drawn += values[known].tolist()
        kl, gold = np.asarray(self.best["kl"]), np.asarray(self.best["gold"]).mean(1)
        axes.plot(kl, gold, color=style.INK, linewidth=1.4, linestyle=":", marker=".", markersize=4)
        labels.append((f"best of n (to {self.best['n'][-1]})", style.INK, float(gold[-1])))
        axes.set_xlim(0, LEVELS[-1] * 1.03)
        axes.set_ylim(min(drawn) - 0.1, max(*drawn, float(gold.max())) * 1.06 + 0.05)
        axes.set_xlabel("KL(policy ‖ SFT model), nats per completion")
        axes.set_ylabel("gold reward")
        style.title(axes, title)
        style.end_labels(axes, labels, size=style.NOTE)

    def text(self, command: str, figure: str, missing: Sequence[str]) -> str:
        """The page docs/comparison.md."""
        sizes = self.sizes
        runs = sizes.strengths * len(sizes.rates) * sizes.seeds
        minutes = sum(row["cpu_seconds"] for row in self.rows.values()) / 60
        absent = f" Not run yet: {', '.join(missing)}." if missing else ""
        bound = next((f"best of {n} costs {k:.1f} nats and earns {np.mean(g):.2f}" for n, k, g in
                      zip(reversed(self.best["n"]), reversed(self.best["kl"]), reversed(self.best["gold"]), strict=True)
                      if k <= MIDDLE), "")
        lines = [
            "# Preference losses at equal KL", "",
            f"Made by `{command}`; do not edit by hand.{absent} All populations together took {minutes:.0f} "
            "minutes of processor time, of two shared cores.", "",
            "The model is the quickstart's (2 layers, width 96), the data its pairs of sampled stories, the gold "
            "reward positive minus negative words. Strengths are not comparable between losses, so every loss has "
            "four of its own, and losses are compared at the KL from the SFT model that they spend.", "",
            f"- Budget, the same for every loss: {sizes.strengths} strengths x {len(sizes.rates)} learning rates "
            f"({', '.join(f'{r:g}' for r in sizes.rates)}) x {sizes.seeds} seeds = {runs} runs of {sizes.marks[-1]} "
            f"updates of {sizes.pairs} pairs (AdamW, clipped at 1, a rate that rises for {sizes.marks[0]} updates and "
            "then stays). Losses without a strength multiply the rates instead. Of every prompt's pairs only the one "
            "whose rewards differ most is used.",
            f"- A run is measured after {', '.join(map(str, sizes.marks))} updates, on one completion at temperature "
            f"1 for each of {sizes.prompts} held-out prompts. The KL is exact over the vocabulary at the sampled "
            "prefixes; values between two measurements are in proportion.",
            "- The setting of a seed is the one with the best reward at that KL on the other seeds, among those that "
            "reach the KL in every seed; a dash: none does.",
            f"- Intervals (95%) redraw prompts and seeds {DRAWS} times, the same for every loss, and choose the "
            "setting anew in each; with three seeds they say more about prompts than about seeds.",
            "- Seeds are paired: one seed has the same labels, order of pairs and random numbers for every loss. "
            "Labels are drawn by Bradley-Terry from the gold reward; no loss sees the reward (those that take scores "
            "get 1 and 0).",
            f"- Controls: SFT on the chosen, DPO on labels turned at random, best-of-n by the gold reward ({bound}; "
            "its KL is the bound log n - (n - 1) / n, and KL 10 would take n of about 60 thousand).", "",
            f"![Frontiers of gold reward over KL, and every loss at equal KL]({figure})", "",
            f"Columns after the differences are at KL {MIDDLE:g}: mean change of the log-prob of chosen training "
            "completions, entropy of the next token in nats, tokens of a completion. The last is the largest mean KL "
            "that any setting came to.", "", self.table(), ""]
        lines += ["What the numbers say:", "", *(f"- {line}" for line in self.statements()), "",
                  "Why these strengths:", ""]
        why: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            why.setdefault(entry.why, []).append(name)
        lines += [f"- {'; '.join(names)}: {reason}." for reason, names in why.items()]
        lines += ["", "What a small model can show: which differences come from the losses at equal KL on short, clean "
                  "text with a reward that counts words. It does not rank losses for language models at large.", ""]
        return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def _with(value: float, interval: tuple[float, float], sign: str = "") -> str:
    if not np.isfinite(value):
        return "-"
    low, high = interval
    ends = f" ({low:{sign}.2f} to {high:{sign}.2f})" if np.isfinite([low, high]).all() else ""
    return f"{value:{sign}.2f}{ends}"
