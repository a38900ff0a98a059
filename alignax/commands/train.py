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
               "75 stopped by SIGTERM and resumable, 71 out of memory, 74 the disk cannot be written, 69 another "
               "process of a distributed run stopped (the message names it). After 69, 71, 74 and a kill, too, the "
               "same command resumes")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config([arg])")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved config, start nothing")
    group = parser.add_argument_group(
        "many processes", "The same command on every host, with --distributed, or with all of the other three; each "
        "may be given as an environment variable: ALIGNAX_COORDINATOR, ALIGNAX_PROCESS_COUNT, ALIGNAX_PROCESS_ID. The "
        "run's folder has to be visible to all hosts. ALIGNAX_HEARTBEAT_SECONDS (30): silence after which a process "
        "counts as stopped.")
    group.add_argument("--distributed", action="store_true",
                       help="let JAX ask the cluster for the other processes (Slurm, TPU pods, Open MPI, Kubernetes)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, the same for all")
    group.add_argument("--process-count", type=int, metavar="N", help="number of processes of the run")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Runs the stages; returns the exit code."""
    from rich.console import Console

    from alignax import configs, distributed, launch, supervise, train

    many = distributed.settings(arguments)
    if many is not None and not arguments.dry_run:
        if not supervise.is_worker():
            say = lambda text: Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
            return supervise.run(arguments.argv, arguments.workdir, say)
        distributed.start(many, arguments.workdir)
        if not distributed.is_main():
            console = Console(quiet=True)
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
