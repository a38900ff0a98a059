"""The parent of a process of a distributed run: it watches its own worker and the others, and says who stopped.

JAX ends a process at once, by abort, when the coordinator is gone, and a collective may wait for ever for a process
that hangs. Neither can report anything. So each process of a distributed `alignax train` is two: the worker, which
trains, and this parent, which uses no device, forwards signals, and ends the worker when another one has stopped.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence

from alignax import presence

EXIT_PEER = 69
TOKEN = "ALIGNAX_SUPERVISOR"
SILENCE = "ALIGNAX_HEARTBEAT_SECONDS"
RESUMABLE = 75  # context.EXIT_RESUMABLE, which stands in a higher layer
_GRACE = 15.0  # for a worker to end by itself when a peer has ended
_TICK = 0.25


def is_worker() -> bool:
    """Whether this process was started by `run`."""
    return bool(os.environ.get(TOKEN))


def folder_of(workdir: pathlib.Path | str) -> pathlib.Path:
    """Where the processes of a run leave their signs of life: beside its folder, which a refused run never creates."""
    workdir = pathlib.Path(workdir).absolute()
    return workdir.with_name(workdir.name + ".processes")


def patience() -> float:
    """Seconds of silence after which a process counts as stopped (ALIGNAX_HEARTBEAT_SECONDS, 30 by default)."""
    return float(os.environ.get(SILENCE) or 30.0)


def follow_parent() -> None:
    """In a child, before it starts: die with its parent, also where that is killed (Linux)."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run(arguments: Sequence[str], workdir: pathlib.Path | str, say: Callable[[str], None]) -> int:
    """Runs `python -m alignax.cli arguments` as the worker of this host, and returns the exit code.

    The worker's own code where it ended by itself; 69 where another process stopped or failed, after a message that
    names it (`say`); 75 where others were preempted. SIGTERM and SIGINT are passed on to the worker.
    """
    folder, token = folder_of(workdir), uuid.uuid4().hex
    peers = presence.Peers(folder, token)
    worker = subprocess.Popen([sys.executable, "-m", "alignax.cli", *arguments], env=os.environ | {TOKEN: token},
                              preexec_fn=follow_parent)
    former = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        former[number] = signal.signal(number, lambda n, _: worker.send_signal(n))
    try:
        code, blamed = _watch(worker, peers, say)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    own, _ = peers.look()
    if own is not None:
        message = blamed or own["message"] or (f"ended by signal {-code}" if code < 0 else "")
        with contextlib.suppress(OSError):
            presence.replace_json(folder / f"{own['index']}.end", {"token": token, "code": code, "message": message,
                                                                   "blames": bool(blamed)})
        if code == 0 and own["index"] == 0:
            _tidy(folder, peers, own["count"])
    return 128 - code if code < 0 else code


def _watch(worker: subprocess.Popen, peers: presence.Peers, say) -> tuple[int, str]:
    """(exit code, message about the peer that is to blame or "")."""
    ended_since: float | None = None
    while True:
        code = worker.poll()
        own, others = peers.look()
        stopped = _stopped(others)
        if code is not None:
            return _judge(code, peers, stopped, say)
        if stopped is not None:
            ended_since = ended_since or time.monotonic()
            # A peer that ended in order may only be quicker; a dead one will not be waited for.
            patient = stopped["end"] is not None and stopped["end"]["code"] == RESUMABLE
            if time.monotonic() - ended_since > (_GRACE if patient else 1.0):
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
                return _blame(stopped, say)
        time.sleep(_TICK)


def _stopped(others: list[dict]) -> dict | None:
    """The peer to blame: first one that failed by itself, then one that is dead or silent, then one preempted."""
    ranks = []
    for beat in others:
        end = beat["end"]
        if end is not None and end["code"] == 0:
            continue
        if end is not None:
            # JAX's abort is the consequence of somebody else's end.
            follows = end["blames"] or end["code"] == -signal.SIGABRT
            rank = 3 if follows else 2 if end["code"] == RESUMABLE else 0
        elif presence.gone(beat) or beat["silent"] > patience():
            rank = 1
        else:
            continue
        ranks.append((rank, beat["index"], beat))
    return min(ranks, key=lambda r: r[:2])[2] if ranks else None


def _judge(code: int, peers: presence.Peers, stopped: dict | None, say) -> tuple[int, str]:
    """The worker has ended: by its own fault, or because a peer left it in the lurch?"""
    if code in (0, 2, 3, RESUMABLE, 71, 74, -signal.SIGKILL):
        return code, ""  # killed from outside, as by the kernel when memory runs out: no peer's end does that
    # An abort or a broken collective: whoever caused it may be known only after some silence.
    deadline = time.monotonic() + (patience() + 2 if code in (EXIT_PEER, -signal.SIGABRT) else 2)
    while stopped is None and time.monotonic() < deadline:
        time.sleep(_TICK)
        stopped = _stopped(peers.look()[1])
    if stopped is None:
        return code, ""
    return _blame(stopped, say)


def _blame(beat: dict, say) -> tuple[int, str]:
    """Says who stopped; returns the exit code and the message."""
    end = beat["end"]
    if end is not None and end["code"] == RESUMABLE:
        message = f"{presence.name(beat)} was told to stop; run the same command again"
        say(message)
        return RESUMABLE, message
    if end is not None and end["blames"]:
        why = f"ended: {end['message']}"
    elif end is not None:
        how = f"was ended by signal {-end['code']}" if end["code"] < 0 else f"ended with code {end['code']}"
        why = f"{how} {beat['where']}" + (f": {end['message']}" if end["message"] else "")
    elif presence.gone(beat):
        why = f"was killed {beat['where']}"
    else:
        why = f"has given no sign of life for {beat['silent']:.0f} seconds; it was last seen {beat['where']}"
    message = f"{presence.name(beat)} {why}"
    say(f"{message}. This process ends too; run the same command again on all hosts to resume")
    return EXIT_PEER, message


def _tidy(folder: pathlib.Path, peers: presence.Peers, count: int) -> None:
    """Process 0 removes the signs of life once all have ended well; left alone where that takes long."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        _, others = peers.look()
        if len(others) == count - 1 and all(b["end"] is not None for b in others):
            shutil.rmtree(folder, ignore_errors=True)
            return
        time.sleep(_TICK)
