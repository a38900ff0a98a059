"""The command `alignax`: parses the command line, runs one of `alignax.commands`, turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from alignax.commands import (
    analyse,
    chat,
    convert,
    data,
    evaluate,
    generate,
    launch,
    methods,
    plan,
    report,
    score,
    sweep,
    train,
)

EXIT_ERROR = 2
COMMANDS = (train, launch, sweep, report, analyse, plan, generate, chat, evaluate, score, methods, convert, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignax", description="Preference alignment of language models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return _worker(argv) if os.environ.get("ALIGNAX_SUPERVISOR") else _main(argv)


def _worker(argv: Sequence[str] | None) -> int:
    """One process of a distributed run.

    Where it fails it must not enter JAX's own end, which waits for the others. An error of no known kind is a device's
    or a collective's, and the supervisor looks whether another process caused it.
    """
    from alignax import distributed, supervise

    try:
        code = _main(argv)
    except Exception as error:
        distributed.leave(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        code = supervise.EXIT_PEER
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides = [a[len("--config."):] for a in argv if a.startswith("--config.")]
    arguments = _parser().parse_args([a for a in argv if not a.startswith("--config.")])
    # Imported late, so that --help answers at once.
    from rich.console import Console

    from alignax import checkpoint, context, distributed, launch, memory
    from alignax.types import ConfigError, DataError

    logging.getLogger("absl").setLevel(logging.ERROR)
    console, problems = Console(), Console(stderr=True)

    def say(text: str) -> None:
        distributed.leave(text)
        problems.print(text, markup=False, highlight=False, soft_wrap=True)

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
        say(str(error))
        return EXIT_ERROR
    except FloatingPointError as error:
        say(f"error: {error}")
        return 3
    except (checkpoint.DiskError, memory.OutOfMemory) as error:
        say(f"error: {error}")
        return checkpoint.EXIT_DISK if isinstance(error, checkpoint.DiskError) else memory.EXIT_MEMORY
    except context.Preempted as stop:
        say(str(stop))
        return context.EXIT_RESUMABLE


if __name__ == "__main__":
    sys.exit(main())
