"""The command `alignax`: parses the command line, runs one of `alignax.commands`, turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from alignax.commands import chat, convert, data, evaluate, generate, methods, train

EXIT_ERROR = 2
COMMANDS = (train, generate, chat, evaluate, methods, convert, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignax", description="Preference alignment of language models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides = [a[len("--config."):] for a in argv if a.startswith("--config.")]
    arguments = _parser().parse_args([a for a in argv if not a.startswith("--config.")])
    # Imported late, so that --help answers at once.
    from rich.console import Console

    from alignax import context, launch
    from alignax.types import ConfigError, DataError

    logging.getLogger("absl").setLevel(logging.ERROR)
    console, problems = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width of its own
    try:
        launch.compilation_cache()
        if overrides and not hasattr(arguments, "config"):
            raise ConfigError(f"--config.{overrides[0]}: `alignax {arguments.command}` takes no config to override")
        arguments.overrides, arguments.argv = overrides, argv
        return arguments.execute(arguments, console)
    except (ConfigError, DataError) as error:
        problems.print("[bold red]error:[/] ", end="")
        problems.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return EXIT_ERROR
    except FloatingPointError as error:
        problems.print(f"error: {error}", markup=False, soft_wrap=True)
        return 3
    except context.Preempted as stop:
        problems.print(str(stop), markup=False, soft_wrap=True)
        return context.EXIT_RESUMABLE


if __name__ == "__main__":
    sys.exit(main())
