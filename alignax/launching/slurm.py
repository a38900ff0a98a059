"""Jobs of Slurm through submitit: one run on many machines, or the members of a sweep as an array."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alignax import context, presence
from alignax.launching.job import Job, check_workdir
from alignax.launching.local import python_path
from alignax.launching.options import Slurm
from alignax.launching.slurm_task import Task
from alignax.sweep import processes
from alignax.types import ConfigError

JOBS = "jobs.json"
_FINAL = (2, 3)
_TICK = 1.0


def folder_of(workdir: pathlib.Path | str) -> pathlib.Path:
    """Where scripts, logs and the numbers of jobs lie: beside the run's folder, visible to all machines like it."""
    workdir = pathlib.Path(workdir).absolute()
    return workdir.with_name(workdir.name + ".slurm")


def _submitit() -> Any:
    try:
        from submitit.slurm import slurm
    except ImportError as error:
        raise ConfigError("--backend=slurm needs submitit: pip install 'alignax[slurm]'") from error
    return slurm


def parameters(name: str, options: Slurm) -> dict[str, Any]:
    """What submitit's executor is given."""
    asked = {"partition": options.partition, "account": options.account, "qos": options.qos,
             "constraint": options.constraint, "cpus_per_task": options.cpus_per_task,
             "gpus_per_node": options.gpus_per_node, "mem": f"{options.mem_gb}GB" if options.mem_gb else ""}
    more = {key: value for key, value in asked.items() if value}
    setup = [f"export PYTHONPATH={shlex.quote(python_path())}", *filter(None, [options.setup])]
    return more | {
        "job_name": name, "nodes": options.nodes, "ntasks_per_node": options.tasks(), "time": options.minutes,
        "signal_delay_s": options.notice, "array_parallelism": options.parallel, "setup": setup,
        "stderr_to_stdout": True, "additional_parameters": {"requeue": True},
        # Where one process ends alone, the others say which one; Slurm must not end them before.
        "srun_args": ["--kill-on-bad-exit=0"],
    }


def script(name: str, workdir: str, options: Slurm, members: int = 0) -> str:
    """The batch script that submitit hands to sbatch; members: size of the array, 0 for one run."""
    slurm, folder = _submitit(), folder_of(workdir)
    more = {"map_count": members} if members > 1 else {}
    return slurm._make_sbatch_string(f"python -u -m submitit.core._submit {shlex.quote(str(folder))}", folder,
                                     **parameters(name, options), **more)


def submit(job: Job, options: Slurm) -> str:
    """Submits one run and returns the job's number. Raises ConfigError where a job of this folder is not finished."""
    name = "run"
    return _start(job.name, job.workdir, {name: job.arguments(options.nodes * options.tasks() > 1)}, options)[name]


def submit_members(members: Sequence[Any], name: str, workdir: str, file: str, options: Slurm) -> dict[str, str]:
    """Submits members of a sweep (alignax.sweep.Member) as one array; name -> `ARRAY_INDEX`."""
    many = options.nodes * options.tasks() > 1
    lines = {m.name: [*processes.command(m, file), *["--distributed"] * many] for m in members}
    return _start(name, workdir, lines, options)


def _start(name: str, workdir: str, lines: dict[str, list[str]], options: Slurm) -> dict[str, str]:
    """Submits a command line for each name, together; returns and remembers their numbers."""
    slurm, folder = _submitit(), folder_of(workdir)
    check_workdir(workdir)
    known = known_jobs(workdir)
    if busy := {n: j for n, j in known.items() if n in lines and j in alive([known[n] for n in lines if n in known])}:
        first = next(iter(busy))
        raise ConfigError(f"--workdir={workdir}: job {busy[first]} ({first}) is in Slurm's queue already; wait for it, "
                          f"or end it with scancel {busy[first]}")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for key, words in lines.items():
        end = folder / f"{key}.end.json"
        end.unlink(missing_ok=True)
        tasks.append(Task(words, str(end), options.restarts, options.retries))
    try:
        executor = slurm.SlurmExecutor(folder)
        executor.update_parameters(**parameters(name, options))
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except RuntimeError as error:  # submitit's errors are of this kind too
        raise ConfigError(f"--backend=slurm: {str(error).strip()[:500]}") from error
    numbers = {key: job.job_id for key, job in zip(lines, jobs, strict=True)}
    presence.replace_json(folder / JOBS, known | numbers)
    return numbers


def known_jobs(workdir: str) -> dict[str, str]:
    """name -> number of the jobs that were submitted for this folder last."""
    return presence.read_json(folder_of(workdir) / JOBS) or {}


def log_of(workdir: str, number: str) -> pathlib.Path:
    """What the first process of a job wrote; it is written on where the job is started again."""
    return folder_of(workdir) / f"{number}_0_log.out"


def alive(numbers: Iterable[str]) -> set[str]:
    """Which of these jobs wait, run or are being ended. Raises ConfigError where the controller does not answer."""
    numbers = set(numbers)
    if not numbers:
        return set()
    roots = sorted({n.partition("_")[0] for n in numbers})
    found = set()
    for root in roots:  # asked one by one: a number that the controller has forgotten is an error
        try:
            done = subprocess.run(["squeue", "--noheader", "--array", f"--jobs={root}", "--format=%i"],
                                  capture_output=True, text=True, timeout=60)
        except OSError as error:
            raise ConfigError("--backend=slurm: no squeue here; jobs are submitted on a machine of the cluster") from (
                error)
        if done.returncode and "Invalid job id" not in done.stderr:
            raise ConfigError(f"--backend=slurm: squeue: {done.stderr.strip()[:300]}")
        found |= set(done.stdout.split())
    return numbers & found


def run_members(members: Sequence[Any], name: str, workdir: str, file: str, options: Slurm,
                ended: Callable[[str, str, bool], None], say: Callable[[str], None]) -> None:
    """Submits what is not in the queue yet, and waits for all; the jobs outlive this process.

    ended(name, reason, final) as in sweep.run_processes. SIGTERM ends the waiting only (context.Preempted).
    """
    known = known_jobs(workdir)
    still = alive(known[m.name] for m in members if m.name in known)
    numbers = {m.name: known[m.name] for m in members if known.get(m.name) in still}
    if numbers:
        say(f"{len(numbers)} members are in Slurm's queue already")
    if new := [m for m in members if m.name not in numbers]:
        numbers |= submit_members(new, name, workdir, file, options)
        say(f"submitted {len(new)} members as job {numbers[new[0].name].partition('_')[0]}")
    waiting = dict(numbers)
    with context.Stop().listening() as stop:
        while waiting:
            gone = set(waiting.values()) - alive(waiting.values())
            for key in [k for k, number in waiting.items() if number in gone]:
                ended(key, *outcome(workdir, key, waiting.pop(key)))
            if stop.requested:
                raise context.Preempted(f"stopped waiting; {len(waiting)} jobs go on. The same command waits for them, "
                                        "scancel ends them")
            if waiting:
                time.sleep(_TICK)


def outcome(workdir: str, name: str, number: str) -> tuple[str, bool]:
    """(why a job that is gone did not finish, whether it would fail again); ("", False) where it did."""
    code = (presence.read_json(folder_of(workdir) / f"{name}.end.json") or {}).get("code")
    if code == 0:
        return "", False
    log = log_of(workdir, number)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("error:")][-1:] or [
        line for line in lines if line.strip() and not re.match(r"(submitit|srun|slurmstepd)\b", line)][-1:]
    text = said[0].removeprefix("error:").strip() if said else "it printed nothing"
    how = "ended by Slurm" if code is None else f"exit code {code}"
    return f"{text} ({how}; {log.parent.name}/{log.name})", code in _FINAL


def describe(workdir: str, numbers: dict[str, str]) -> str:
    """One line for the user about jobs that were just submitted."""
    roots = sorted({n.partition("_")[0] for n in numbers.values()})
    logs = log_of(workdir, next(iter(numbers.values())))
    return (f"submitted job {', '.join(roots)}; squeue --jobs={','.join(roots)} shows it, scancel {' '.join(roots)} "
            f"ends it; output: {logs}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""))

