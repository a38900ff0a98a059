"""Who works in a run's folder: signs of life in files, and the lock that refuses a second run.

A process is known by host, process namespace, number and time of birth. On the same machine its death is seen at once;
of another machine only its silence can be seen. Clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from alignax.types import ConfigError

LOCK = "run.lock"
STALE_SECONDS = 120.0


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, time of birth) of a process here, or None where it is gone or the system does not say."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def whoami() -> dict[str, Any]:
    """Host, process namespace, number and time of birth of this process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    found = _stat(os.getpid())
    return {"host": platform.node(), "namespace": namespace, "pid": os.getpid(), "born": found[1] if found else 0}


def gone(who: Mapping[str, Any]) -> bool | None:
    """Whether the process `who` (of `whoami`) has ended; None where it lives on another machine and nobody can tell."""
    here = whoami()
    if (who["host"], who["namespace"]) != (here["host"], here["namespace"]):
        return None
    if here["born"]:
        found = _stat(who["pid"])
        return found is None or found[0] in "ZX" or found[1] != who["born"]
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def replace_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """The file's value, or None where it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(folder: pathlib.Path, *, stale_after: float = STALE_SECONDS) -> Iterator[str]:
    """Holds `run.lock` of a folder during the block; yields a line about a dead owner whose lock was taken, or "".

    The file names its owner. It is stale when the owner has ended (seen at once on the same machine), or when a lock of
    another machine has not been refreshed for `stale_after` seconds by the file system's own clock.
    Raises ConfigError, naming owner and file, where somebody alive holds it.
    """
    path, me = folder / LOCK, whoami()
    note = _take(path, me, stale_after)
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(stale_after / 6):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=refresh, name="run.lock", daemon=True)
    thread.start()
    try:
        yield note
    finally:
        stop.set()
        thread.join()
        if read_json(path) == me:
            path.unlink(missing_ok=True)


def _take(path: pathlib.Path, me: Mapping[str, Any], stale_after: float) -> str:
    """Creates the lock, over a stale one if need be."""
    own = path.with_name(f"{LOCK}.{me['host']}.{me['pid']}")
    own.write_text(json.dumps(me), encoding="utf-8")
    try:
        note = ""
        for _ in range(2):
            try:
                os.link(own, path)  # the name and its content appear together, for one process only
                return note
            except FileExistsError:
                note = _evict(path, own, stale_after)
        raise ConfigError(f"{path}: another run took the folder at the same moment; nothing was written")
    finally:
        own.unlink(missing_ok=True)


def _evict(path: pathlib.Path, own: pathlib.Path, stale_after: float) -> str:
    """Removes a stale lock, or raises ConfigError. `own` was just written there: its time is the file system's now."""
    owner = read_json(path)
    try:
        silent = own.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return "the lock of a run that has just ended was taken over"
    known = isinstance(owner, dict) and {"host", "namespace", "pid", "born"} <= owner.keys()
    dead = gone(owner) if known else None
    if dead is False or (dead is None and silent < stale_after):
        who = f"process {owner['pid']} on {owner['host']}" if known else "a process that left no name"
        raise ConfigError(f"{path.parent} is in use by {who}; one run at a time may work in a folder. Wait for it or "
                          f"stop it; if it is surely gone, remove {path}")
    aside = path.with_name(f"{own.name}.old")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return "a stale lock was taken over"
    if read_json(aside) != owner:  # somebody else replaced the stale lock in between: it is theirs
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink(missing_ok=True)
        raise ConfigError(f"{path}: another run took the folder at the same moment; nothing was written")
    aside.unlink(missing_ok=True)
    return f"the lock of process {owner['pid']} on {owner['host']}, which is gone, was taken over" if known else (
        "a stale lock was taken over")


class Beat:
    """Signs of life of one process: `<folder>/<index>.json`, rewritten every `interval` seconds by a thread.

    `where` says what the process is at, `message` why it ends; both travel with the next beat. token: of the supervisor
    that started it.
    """

    def __init__(self, folder: pathlib.Path, index: int, count: int, token: str, interval: float = 1.0):
        self.where, self.message = "starting", ""
        self._path = folder / f"{index}.json"
        self._fixed = whoami() | {"index": index, "count": count, "token": token}
        self._beats, self._guard, self._interval = 0, threading.Lock(), interval
        self._stop = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self.now()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def now(self) -> None:
        """Writes a beat at once."""
        with self._guard, contextlib.suppress(OSError):  # a full disk is told by those who write results
            self._beats += 1
            replace_json(self._path, self._fixed | {"beat": self._beats, "where": self.where, "message": self.message})

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.now()

    def stop(self) -> None:
        """Ends the thread; the last beat stays."""
        self._stop.set()


class Peers:
    """What the other processes' files say, seen from one process. Files that never change are of an earlier session."""

    def __init__(self, folder: pathlib.Path, token: str):
        self._folder, self._token = folder, token
        self._first: dict[str, Any] = {p.name: read_json(p) for p in folder.glob("*.json")} if folder.is_dir() else {}
        self._seen: dict[int, tuple[Any, float]] = {}

    def look(self) -> tuple[dict | None, list[dict]]:
        """(own beat or None, the beats of peers of this session).

        A peer's beat gets the keys `silent` (seconds since it changed, by this machine's clock) and `end` (what its
        supervisor wrote about its end, or None).
        """
        own, peers, now = None, [], time.monotonic()
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            beat = read_json(path)
            if not isinstance(beat, dict) or "beat" not in beat or beat == self._first.get(path.name):
                continue
            if beat["token"] == self._token:
                own = beat
                continue
            index, mark = beat["index"], (beat["token"], beat["beat"])
            if index not in self._seen or self._seen[index][0] != mark:
                self._seen[index] = mark, now
            end = read_json(self._folder / f"{index}.end")
            peers.append(beat | {"silent": now - self._seen[index][1],
                                 "end": end if end and end["token"] == beat["token"] else None})
        return own, peers


def name(beat: Mapping[str, Any]) -> str:
    """`process 1 of 4 (host, pid 123)`."""
    return f"process {beat['index']} of {beat['count']} ({beat['host']}, pid {beat['pid']})"
