"""What runs in a Slurm job, once for each process: `alignax train`, and putting the job back into the queue.

Slurm signals every process of a step: SIGUSR2 some time before the time limit (submitit asks for it), SIGTERM before
it preempts or cancels. Both make the run save and end with 75. A job that is running then is queued again under its
own number, and the same command resumes; one that was cancelled is not, and one that is preempted Slurm queues itself.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

from alignax import presence, supervise
from alignax.launching.local import CHILD

NOTICE = signal.SIGUSR2
_TICK = 0.2
_END = 60.0  # seconds in which Slurm ends a job that it has taken back
_LATER = 5.0  # seconds that other processes leave to the first one
RETRIED = (supervise.EXIT_PEER, 128 + signal.SIGKILL, 128 + signal.SIGABRT)


@dataclasses.dataclass
class Task:
    """A callable that submitit stores and every process of the job runs; it ends with the run's exit code.

    arguments: the words after `alignax`. end: the file for the exit code, written where the job is not queued again.
    restarts, retries: Slurm's count of restarts up to which a run that was told to stop, or that lost a process, is
    queued again.
    """

    arguments: list[str]
    end: str
    restarts: int
    retries: int

    def __call__(self) -> None:
        told: list[int] = []
        for number in (NOTICE, signal.SIGTERM):  # in place of submitit's own, which know nothing of the child
            signal.signal(number, lambda n, _: told.append(n))
        child = subprocess.Popen([sys.executable, "-c", CHILD, *self.arguments], preexec_fn=_deaf)
        passed_on = False
        while (code := child.poll()) is None:
            if NOTICE in told and not passed_on:  # SIGTERM the child has got from Slurm itself
                passed_on = True
                child.terminate()
            time.sleep(_TICK)
        code = 128 - code if code < 0 else code
        if not self._again(code, told) and _rank() == 0:
            presence.replace_json(pathlib.Path(self.end), {"code": code})
        sys.stdout.flush()
        # Not an error of Python: its trace would bury the run's own message.
        raise SystemExit(code)

    def _again(self, code: int, told: list[int]) -> bool:
        """Queues the job again where that is worth it, and then waits to be ended by Slurm.

        told: grows with every signal.
        """
        limit = self.restarts if code == supervise.RESUMABLE else self.retries if code in RETRIED else 0
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) >= limit:
            return False
        before = len(told)
        if _rank() and _ended(told, before, _LATER):
            return True
        job = _number()
        if _state(job) != "RUNNING":  # cancelled, preempted, or taken back by the first process
            return False
        subprocess.run(["scontrol", "requeue", job], check=False, timeout=60)  # may itself be ended by its success
        return _ended(told, before, _END)


def _ended(told: list[int], before: int, limit: float) -> bool:
    """Waits for a further signal, at most `limit` seconds; whether one came."""
    deadline = time.monotonic() + limit
    while len(told) == before and time.monotonic() < deadline:
        time.sleep(_TICK)
    return len(told) > before


def _deaf() -> None:
    """In the child before it starts: the notice is for this process, and would end those that know nothing of it."""
    signal.signal(NOTICE, signal.SIG_IGN)
    supervise.follow_parent()


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID") or 0)


def _number() -> str:
    """This job's number as Slurm's commands take it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _state(job: str) -> str:
    """RUNNING, or what else the controller says of the job, "" where it does not answer."""
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True,
                          timeout=60)
    return done.stdout.strip()
