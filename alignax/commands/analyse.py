"""`alignax analyse`: one offline analysis of a finished run, as a table, a figure and a JSON file in its folder."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

from alignax.commands import given

ABOUT = {
    "weights": ("how far a stage moved the weights, group by group",
                "Distances of a preference stage's two ends: norm of the change, share of the weights' norm, cosine, "
                "largest singular value."),
    "landscape": ("the loss on the line between a stage's two ends, and its barrier",
                  "The stage's own loss, margin and log-probs on its pairs at 21 points of the line from where it "
                  "began (0) to where it ended (1), and beyond; with --other between the ends of two runs."),
    "influence": ("which training pairs stand behind a behaviour",
                  "Influence of each pair on a query, at the stage's end: DataInf, the exact empirical Fisher matrix, "
                  "or TracIn's plain product. Needs a loss that is a function of one pair."),
    "probes": ("does the model know the chosen, and does it say so: accuracy over the run's phases",
               "Cognitive accuracy (hidden states along a direction) against expressive accuracy (log-prob per token) "
               "of the starting model and every finished stage."),
    "credit": ("token by token, what the stage rewards: a heat map on text",
               "The log-ratio of every token to where the stage began; the implicit reward of DPO without its beta."),
    "neurons": ("which MLP neurons carry the change: projections, patching, un-aligning",
                "Projects what each neuron writes on a direction found by a probe of chosen against rejected, sorts "
                "the neurons that raise the projection into four groups, patches their mean activations into the "
                "start, and un-aligns the end by interpolation and by scaling keys."),
    "overoptimisation": ("gold reward over the KL that it cost, with fitted laws",
                         "Both laws of 2210.10760 over all policies that the runs' evaluate stages compared; needs 3 "
                         "policies at different KL, from one run or several."),
    "scaling": ("loss over parameters and training tokens, with fitted laws",
                "A power law, or L(N, D) where both vary, over the held-out losses of several runs' train stage."),
}
_OF_RUNS = ("overoptimisation", "scaling")
EPILOG = "Writes DIR/analyses/NAME: result.json, figure.png and figure.svg. exit codes: 0 written, 2 bad input"


def add(commands) -> None:
    """Declares the command with one action per analysis."""
    parser = commands.add_parser("analyse", help="one offline analysis of a finished run",
                                 description="Analyses of runs of `alignax train`.", epilog=EPILOG)
    actions = parser.add_subparsers(dest="analysis", required=True, metavar="NAME")
    for name, (short, about) in ABOUT.items():
        own = actions.add_parser(name, help=short, description=about, epilog=EPILOG)
        if name in _OF_RUNS:
            own.add_argument("folders", nargs="+", metavar="DIR", help="folders of runs; the first one is written to")
            if name == "scaling":
                own.add_argument("--stage", default="", help="the train stage (default: each run's first)")
        else:
            own.add_argument("folder", metavar="DIR", help="the folder of a run with a finished preference stage")
            own.add_argument("--stage", default="", help="the preference stage (default: the last finished)")
            own.add_argument("--prompts", type=int, default=64, metavar="N",
                             help="pairs of different prompts, spread over the training data (default 64)")
        _ADD.get(name, lambda parser: None)(own)
        own.add_argument("--out", default="", metavar="DIR", help="where to write (default: DIR/analyses/NAME)")
        own.add_argument("--json", action="store_true", help="print the numbers as one JSON object and nothing else")
    parser.set_defaults(execute=run)


def _add_landscape(parser) -> None:
    parser.add_argument("--other", default="", metavar="DIR",
                        help="another run: the line leads from this run's end to that one's")


def _add_influence(parser) -> None:
    parser.add_argument("--query", default="chosen", metavar="WHAT",
                        help="chosen (its -log-prob: who displaces it), rejected, or loss (default chosen)")
    parser.add_argument("--method", default="datainf", metavar="NAME", help="datainf, fisher or tracin (default "
                                                                            "datainf)")


def _add_credit(parser) -> None:
    parser.add_argument("--shown", type=int, default=4, metavar="N", help="pairs in table and figure (default 4)")


_ADD = {"landscape": _add_landscape, "influence": _add_influence, "credit": _add_credit}


def run(arguments, console) -> int:
    """Analyses, prints and writes; returns the exit code."""
    from alignax import checkpoint
    from alignax.types import ConfigError

    name = arguments.analysis
    for flag, least in (("prompts", 2), ("shown", 1)):
        if (value := getattr(arguments, flag, least)) < least:
            raise ConfigError(f"--{flag}={value}; allowed: {least} or more")
    folder = pathlib.Path(arguments.folders[0] if name in _OF_RUNS else arguments.folder)
    found = _found(arguments, folder)
    out = pathlib.Path(arguments.out) if arguments.out else folder / "analyses" / name
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"analysis": name} | given.plain(found.numbers)
    checkpoint.write_json(out / "result.json", numbers)
    picture = found.draw(out / "figure.png")
    if arguments.json:
        sys.stdout.write(json.dumps(numbers, allow_nan=False) + "\n")
        return 0
    console.print(table(found))
    for line in (*found.notes, f"figure: {picture}", f"numbers: {out / 'result.json'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _found(arguments, folder: pathlib.Path) -> Any:
    """The Result of the analysis that the line names."""
    from alignax.analyses import credit, influence, landscape, neurons, of_run, probes, scaling, weights

    name = arguments.analysis
    if name in _OF_RUNS:
        folders = [pathlib.Path(one) for one in arguments.folders]
        return scaling.overoptimisation(folders) if name == "overoptimisation" else scaling.scaling(
            folders, stage=arguments.stage)
    stage = of_run.open_stage(folder, arguments.stage, prompts=arguments.prompts)
    if name == "landscape":
        other = of_run.open_stage(pathlib.Path(arguments.other), arguments.stage,
                                  prompts=2) if arguments.other else None
        return landscape.analyse(stage, other=other)
    if name == "influence":
        return influence.analyse(stage, query=arguments.query, method=arguments.method)
    if name == "credit":
        return credit.analyse(stage, shown=arguments.shown)
    return {"weights": weights, "probes": probes, "neurons": neurons}[name].analyse(stage)


def table(found: Any) -> Any:
    """The rich table of a Result: names to the left, numbers with their decimal points below one another."""
    from rich.table import Table
    from rich.text import Text

    from alignax.diagnostics import tables

    out = Table(title=found.title, title_justify="left")
    columns = []
    for heading, cells in zip(found.headings, zip(*found.rows, strict=True), strict=True):
        out.add_column(heading, no_wrap=True, overflow="ellipsis")
        text = any(isinstance(cell, str) for cell in cells)
        columns.append(cells if text else tables.aligned(cells, _digits(cells)))
    for row in zip(*columns, strict=True):
        out.add_row(*map(Text, row))
    return out


def _digits(cells) -> int:
    """Decimals that show the median of a column with three significant digits."""
    sizes = sorted(abs(cell) for cell in cells if cell and math.isfinite(cell))
    return 3 if not sizes else min(8, max(2, 2 - math.floor(math.log10(sizes[len(sizes) // 2]))))
