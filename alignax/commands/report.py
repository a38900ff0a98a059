"""`alignax report`: figures and tables of a sweep's folder, in one page that needs no server and no network."""

from __future__ import annotations

import pathlib


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "report", help="compare the members of a sweep: tables, figures and one HTML page",
        description="Reads what `alignax sweep` left in a folder and writes report.html (one file with everything in "
                    "it), report.md, tables as LaTeX, and the figures. Members that are not finished are left out and "
                    "named.",
        epilog="exit codes: 0 written, 2 bad input")
    parser.add_argument("folder", metavar="DIR", help="a sweep's folder")
    parser.add_argument("--out", metavar="DIR", default="", help="where to write (default: DIR/report)")
    parser.add_argument("--metric", default="", metavar="NAME",
                        help="the number to compare, a column of results.jsonl (default: win_rate, else the first "
                             "loss on held-out records)")
    better = parser.add_mutually_exclusive_group()
    better.add_argument("--higher", dest="better", action="store_const", const="higher", help="higher is better")
    better.add_argument("--lower", dest="better", action="store_const", const="lower",
                        help="lower is better (default: by the name, for `loss`, `kl` and `perplexity`)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="configurations in the table (default 10)")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Writes the report of what the folder holds; returns the exit code."""
    from alignax.diagnostics import report_sweep
    from alignax.types import ConfigError

    folder = pathlib.Path(arguments.folder)
    # What a folder holds is told by one of its files. (file, what writes its report)
    kinds = (("sweep.json", report_sweep.write),)
    for name, write in kinds:
        if (folder / name).exists():
            page = write(folder, pathlib.Path(arguments.out) if arguments.out else folder / "report",
                         metric=arguments.metric, better=arguments.better or "", top=arguments.top, console=console)
            console.print(f"report: {page}", markup=False, soft_wrap=True, highlight=False)
            return 0
    raise ConfigError(f"{folder} holds nothing to report; expected a folder with {' or '.join(n for n, _ in kinds)}, "
                      "as `alignax sweep` makes it")
