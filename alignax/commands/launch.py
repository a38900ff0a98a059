"""`alignax launch`: the same config on processes here, on Slurm, on TPU pods."""

from __future__ import annotations

import argparse
import pathlib


def add(commands) -> None:
    """Declares the command and its arguments."""
    from alignax.launching import options

    parser = commands.add_parser(
        "launch", help="run a config on several processes, a Slurm cluster or TPU pods",
        description="Starts `alignax train` with the same config, overrides and folder where machines are. local runs "
                    "it here and ends with its exit code; the others submit it and end. --dry-run prints what would be "
                    "submitted: the batch script, the manifest, the command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"options of the backends (--option KEY=VALUE):\n{options.table()}\n\n"
               "exit codes: those of `alignax train` (local), 0 submitted, 2 bad input, else the tool's own")
    parser.add_argument("--backend", required=True, metavar="NAME", help=", ".join(options.BACKENDS))
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]",
                        help="a Python file with get_config([arg]); relative paths hold where the command runs, too")
    parser.add_argument("--workdir", required=True, metavar="DIR",
                        help="the run's folder, on a file system that all its processes see")
    parser.add_argument("--processes", type=int, default=None, metavar="N",
                        help="processes of the run (local: on this machine; slurm: nodes times tasks_per_node)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the backend, see below; may be repeated")
    parser.add_argument("--name", default="", metavar="NAME", help="of the job (default: from the folder's name)")
    parser.add_argument("--members", action="store_true",
                        help="one job for each member of the config's sweep, in DIR/members (not local, gcloud)")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,...",
                        help="with --members: as in `alignax sweep`")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="with --members: as in `alignax sweep`")
    parser.add_argument("--dry-run", action="store_true", help="check the config, print what would be submitted")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Launches, or prints what would be launched; returns the exit code."""
    from alignax import configs, launch
    from alignax.launching import job, local, slurm
    from alignax.launching import options as kinds
    from alignax.types import ConfigError

    options = kinds.parse(arguments.backend, _with_processes(arguments))
    name = arguments.name or job.name_of(arguments.workdir)
    if (arguments.sweep or arguments.seeds) and not arguments.members:
        raise ConfigError("--sweep and --seeds need --members")
    job.check_workdir(arguments.workdir)
    if arguments.members:
        return _members(arguments, options, name, console)
    one = job.Job(name, arguments.config, arguments.workdir, tuple(arguments.overrides))
    configs.check(configs.staged(launch.load_config(arguments.config, arguments.overrides)))
    if isinstance(options, kinds.Local):
        if arguments.dry_run:
            for extra in local.environments(options, "PORT"):
                shown = [f"{k}={v}" for k, v in extra.items() if k != "PYTHONPATH"]
                _out(" ".join([*shown, one.shell(False, "python")]), console)
            return 0
        return local.run(one, options)
    if isinstance(options, kinds.Slurm):
        if arguments.dry_run:
            _out(slurm.script(name, arguments.workdir, options), console)
            _out(f"# the job runs: {one.shell(options.nodes * options.tasks() > 1, 'python')}", console)
            return 0
        number = slurm.submit(one, options)
        _out(slurm.describe(arguments.workdir, {"run": number}), console)
        return 0
    return _pods([one], options, arguments.dry_run, console)


def _with_processes(arguments) -> list[str]:
    """The options, with --processes where the backend has such a number."""
    from alignax.types import ConfigError

    given = list(arguments.option)
    if arguments.processes is not None:
        key = {"local": "processes", "slurm": "tasks_per_node"}.get(arguments.backend)
        if key is None:
            raise ConfigError(f"--processes={arguments.processes} --backend={arguments.backend}: the machines are what "
                              "the options name; allowed with: local, slurm")
        nodes = [text.partition("=")[2] for text in given if text.startswith("nodes=")]
        machines = int(nodes[-1]) if nodes and nodes[-1].isdecimal() and int(nodes[-1]) else 1
        if arguments.processes < 1 or arguments.processes % machines:
            raise ConfigError(f"--processes={arguments.processes}; allowed: multiples of {machines}, the number of "
                              "nodes")
        given.append(f"{key}={arguments.processes // machines}")
    return given


def _members(arguments, options, name: str, console) -> int:
    """One job for each member that is not finished."""
    from alignax import checkpoint, presence, sweep
    from alignax.commands.sweep import members_of
    from alignax.launching import options as kinds
    from alignax.launching import slurm
    from alignax.types import ConfigError

    if arguments.backend in ("local", "gcloud"):
        raise ConfigError(f"--members --backend={arguments.backend}: one run at a time; allowed: slurm, xpk, jobset, "
                          "skypilot. On this machine: alignax sweep")
    folder, file = pathlib.Path(arguments.workdir), arguments.config.partition(":")[0]
    members = members_of(arguments.config, folder, axes=arguments.sweep, seeds=arguments.seeds,
                         overrides=arguments.overrides)
    plan = sweep.plan_of(members, "own")
    known = sweep.claim(folder, plan)
    left = [m for m in members if not sweep.finished(folder, m.name)]
    array = isinstance(options, kinds.Slurm)
    jobs = [] if array else [_job_of(member, name, file) for member in left]
    if arguments.dry_run:
        if array:
            _out(slurm.script(name, arguments.workdir, options, len(left)), console)
            return 0
        return _pods(jobs, options, True, console)
    folder.mkdir(parents=True, exist_ok=True)
    with presence.locked(folder):
        if not (sweep.claim(folder, plan) or known):
            checkpoint.write_json(folder / sweep.PLAN, plan)
        if not left:
            _out(f"all {len(members)} members are finished", console)
            return 0
        if array:
            numbers = slurm.submit_members(left, name, arguments.workdir, file, options)
            _out(slurm.describe(arguments.workdir, numbers), console)
            return 0
    return _pods(jobs, options, False, console)


def _job_of(member, name: str, file: str):
    from alignax.launching import job

    spec = f"{file}:{member.argument}" if member.argument else file
    return job.Job(job.name_of(f"{name}-{member.name}"), spec, str(member.folder), tuple(member.overrides))


def _pods(jobs, options, dry_run: bool, console) -> int:
    """Submits the jobs one after another, up to the first that the tool refuses."""
    from alignax.launching import pods
    from alignax.types import ConfigError

    names = [one.name for one in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two members would get the job name {min(twice)}; give a shorter --name")
    for one in jobs:
        made = pods.submission(one, options)
        if dry_run:
            _out(made.text().rstrip("\n"), console)
        elif code := pods.submit(made):
            return code
    return 0


def _out(text: str, console) -> None:
    """Lines as they are: a manifest is for programs."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
