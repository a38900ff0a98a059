"""Members as processes of their own, `alignax train` each: slower than one program, but any config can run so."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from alignax import context
from alignax.sweep.folder import LOGS
from alignax.sweep.members import Member
from alignax.types import ConfigError

# Exit codes of `alignax train` that the same command would give again: bad input, a step that is not finite.
FINAL_CODES = (2, 3)
_TICK = 0.1
# The child asks for its own end with its parent's: this process runs threads, and may not fork to ask before.
_CHILD = "import sys; from alignax import cli, supervise; supervise.follow_parent(); sys.exit(cli.main())"
_ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(member: Member, file: str) -> list[str]:
    """The command line that runs one member alone."""
    spec = f"{file}:{member.argument}" if member.argument else file
    return ["train", "--config", spec, "--workdir", str(member.folder), *(f"--config.{o}" for o in member.overrides)]


def run_processes(members: Sequence[Member], folder: pathlib.Path, file: str, *, jobs: int,
                  ended: Callable[[str, str, bool], None]) -> None:
    """Runs the members, `jobs` at a time, each in a process whose output goes to logs/NAME.txt.

    ended(name, reason, final) is called as each one stops: reason is "" where it has a result; final says that it
    would fail again. SIGTERM is passed on, and context.Preempted then tells that everything is saved; whatever else
    ends this function, Ctrl-C too, ends the processes in the same way.
    Raises ConfigError for jobs < 1.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs={jobs}; allowed: at least 1")
    logs = folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    # A checkout that is not installed has to be found by the children too.
    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    waiting, running = list(members), {}
    with context.Stop().listening() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not stop.requested:
                    member = waiting.pop(0)
                    running[member.name] = member, _start(member, file, logs, paths)
                for name, (_, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[name]
                        if not (stop.requested and code == context.EXIT_RESUMABLE):
                            ended(name, "" if code == 0 else _reason(logs / f"{name}.txt", code),
                                  code in FINAL_CODES)
                if stop.requested:
                    _end(running, signal.SIGTERM)
                    raise context.Preempted("stopped; run the same command again to go on with the members that are "
                                            "not finished")
                time.sleep(_TICK)
        finally:
            _end(running, signal.SIGTERM)


def _start(member: Member, file: str, logs: pathlib.Path, paths: str) -> subprocess.Popen:
    with (logs / f"{member.name}.txt").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", _CHILD, *command(member, file)], stdout=log,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env=os.environ | {"PYTHONPATH": paths})


def _end(running: dict[str, tuple[Member, subprocess.Popen]], number: int) -> None:
    """Tells the processes to stop and waits until they have saved."""
    for _, process in running.values():
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
    for _, process in running.values():
        process.wait()
    running.clear()


def _reason(log: pathlib.Path, code: int) -> str:
    """What a member said last: its line `error: ...`, or else its last line, and how it ended."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:")][-1:] or lines[-1:] or ["it printed nothing"]
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said[0].removeprefix('error:').strip()} ({how}; {log.parent.name}/{log.name})"
