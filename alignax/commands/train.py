"""`alignax train`: run or resume the stages of a config."""

from __future__ import annotations

import json
import pathlib


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "train", help="run or resume the stages of a config",
        description="Runs the stages of a config in a folder. The same command again resumes a run that was stopped "
                    "or killed, and ends at once when the run is finished. Any key can be overridden with "
                    "--config.key=value; an unknown key is refused with the legal ones.",
        epilog="exit codes: 0 finished, 2 bad input, 3 a step was not finite, "
               "75 stopped by SIGTERM and resumable")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config([arg])")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved config, start nothing")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Runs the stages; returns the exit code."""
    from alignax import configs, launch, train

    config = launch.load_config(arguments.config, arguments.overrides)
    configs.check(configs.staged(config))
    if arguments.dry_run:
        console.print(json.dumps(config.to_dict(), indent=2, default=list), markup=False, highlight=False)
        return 0
    summary = train.run(config, arguments.workdir, console=console)
    shown = {k: v for k, v in summary.items() if k != "stages"}
    if shown:
        console.print(json.dumps(shown, indent=2), markup=False, highlight=False)
    console.print(f"result: {pathlib.Path(arguments.workdir) / 'result.json'}", markup=False, soft_wrap=True)
    return 0
