"""Processes of one run on this machine, which meet at a free port of the loopback address."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from alignax import context, distributed, supervise
from alignax.launching.job import Job
from alignax.launching.options import Local

# The child asks for its own end with its parent's.
CHILD = "import sys; from alignax import cli, supervise; supervise.follow_parent(); sys.exit(cli.main())"
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_TICK = 0.1


def python_path() -> str:
    """PYTHONPATH with which another process finds this alignax, installed or not."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))


def environments(options: Local, port: int | str) -> list[dict[str, str]]:
    """What each process gets beside this one's environment; one process needs nobody to meet."""
    out = []
    for index in range(options.processes):
        given = {"PYTHONPATH": python_path()}
        if options.processes > 1:
            values = (f"127.0.0.1:{port}", str(options.processes), str(index))
            given |= dict(zip(distributed.ENV.values(), values, strict=True))
        if options.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            ids = visible.split(",") if visible else [str(i) for i in range(options.processes * options.gpus)]
            given["CUDA_VISIBLE_DEVICES"] = ",".join(ids[index * options.gpus:(index + 1) * options.gpus])
        out.append(given)
    return out


def run(job: Job, options: Local) -> int:
    """Runs the job and returns its exit code (exit_code); SIGTERM is passed on, and the processes then save.

    Their output goes where this process's goes; only process 0 writes more than errors.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-c", CHILD, *job.arguments(distributed=False)]
    running: list[subprocess.Popen] = []
    with context.Stop().listening() as stop:
        told = False
        try:
            running += [subprocess.Popen(command, env=os.environ | extra) for extra in environments(options, port)]
            while any(p.poll() is None for p in running):
                if stop.requested and not told:
                    told = True
                    _tell(running, signal.SIGTERM)
                time.sleep(_TICK)
        finally:
            _tell(running, signal.SIGTERM)
            for process in running:
                process.wait()
    return exit_code([p.returncode for p in running])


def _tell(running: Sequence[subprocess.Popen], number: int) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def exit_code(codes: Sequence[int]) -> int:
    """One code for a run: that of the process which failed by itself, 69 and 75 only where nothing says more."""
    failed = [128 - code if code < 0 else code for code in codes if code]
    own = [code for code in failed if code not in (supervise.EXIT_PEER, supervise.RESUMABLE)]
    return own[0] if own else min(failed, default=0)
