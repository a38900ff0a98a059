"""`alignax report`: what a run or a sweep did, in one page that needs no server and no network."""

from __future__ import annotations

import pathlib


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "report", help="what a run did to the model, or how the members of a sweep compare, on one HTML page",
        description="Of a run of `alignax train`: three curves (chosen, rejected, unseen) against the baseline "
                    "-KL(start||policy) on fresh samples of the start, the pull on either side, where the mass went, "
                    "and a verdict with its rule for each of the three properties of preference training. Of a folder "
                    "of `alignax sweep`: report.html (one file with everything in it), report.md, tables as LaTeX, "
                    "and the figures; members that are not finished are left out and named.",
        epilog="exit codes: 0 written, 2 bad input")
    parser.add_argument("folder", metavar="DIR", help="a run's or a sweep's folder")
    parser.add_argument("--out", metavar="DIR", default="", help="where to write (default: DIR/report)")
    of_run = parser.add_argument_group("of a run")
    of_run.add_argument("--stage", default="", help="one preference stage (default: all that are finished)")
    of_run.add_argument("--prompts", type=int, default=48, metavar="N",
                        help="training prompts that are looked at, over which intervals are taken (default 48)")
    of_run.add_argument("--samples", type=int, default=4, metavar="N",
                        help="fresh samples of each prompt, for the baseline (default 4)")
    of_sweep = parser.add_argument_group("of a sweep")
    of_sweep.add_argument("--metric", default="", metavar="NAME",
                        help="the number to compare, a column of results.jsonl (default: win_rate, else the first "
                             "loss on held-out records)")
    better = of_sweep.add_mutually_exclusive_group()
    better.add_argument("--higher", dest="better", action="store_const", const="higher", help="higher is better")
    better.add_argument("--lower", dest="better", action="store_const", const="lower",
                        help="lower is better (default: by the name, for `loss`, `kl` and `perplexity`)")
    of_sweep.add_argument("--top", type=int, default=10, metavar="N", help="configurations in the table (default 10)")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Writes the report of what the folder holds; returns the exit code."""
    from alignax import configs
    from alignax.diagnostics import report_sweep
    from alignax.types import ConfigError

    folder = pathlib.Path(arguments.folder)
    if not (folder / "sweep.json").exists() and configs.is_run(folder):
        return _of_run(arguments, folder, console)
    if arguments.stage:
        raise ConfigError(f"--stage={arguments.stage}: goes with the folder of a run, and {folder} is none")
    # What a folder holds is told by one of its files. (file, what writes its report)
    kinds = (("sweep.json", report_sweep.write),)
    for name, write in kinds:
        if (folder / name).exists():
            page = write(folder, pathlib.Path(arguments.out) if arguments.out else folder / "report",
                         metric=arguments.metric, better=arguments.better or "", top=arguments.top, console=console)
            console.print(f"report: {page}", markup=False, soft_wrap=True, highlight=False)
            return 0
    raise ConfigError(f"{folder} holds nothing to report; expected a folder with {' or '.join(n for n, _ in kinds)}, "
                      "as `alignax sweep` makes it, or the folder of a run of `alignax train`")


def _of_run(arguments, folder: pathlib.Path, console) -> int:
    """The report of a run."""
    from rich.console import Console

    from alignax import examine, metrics
    from alignax.diagnostics import report_run
    from alignax.types import ConfigError

    for flag, value in (("metric", arguments.metric), (arguments.better, arguments.better)):
        if value:
            raise ConfigError(f"--{flag}: compares the members of a sweep, and {folder} is a run")
    for flag, value in (("prompts", arguments.prompts), ("samples", arguments.samples)):
        if value < 1 + (flag == "prompts"):
            raise ConfigError(f"--{flag}={value}; allowed: {1 + (flag == 'prompts')} or more")
    ctx, config = examine.open_run(folder, Console(quiet=True))
    stages = [examine.stage(ctx, config, name, prompts=arguments.prompts, samples=arguments.samples)
              for name in examine.choose(folder, config, arguments.stage)]
    page = report_run.write(pathlib.Path(arguments.out) if arguments.out else folder / "report", stages,
                            metrics.read_metrics(folder), title=f"Report of the run {folder.resolve().name}",
                            console=console)
    console.print(f"report: {page}", markup=False, soft_wrap=True, highlight=False)
    return 0
