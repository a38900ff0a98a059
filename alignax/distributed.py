"""Many processes in one run: how they find each other, agree, and wait for each other.

Every process runs the same program on the same files (the run's folder has to be visible to all); process 0 writes.
Small values travel through JAX's coordination service, never through the devices. With one process everything here is a
no-op.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignax import presence, supervise
from alignax.types import ConfigError

ENV = {"coordinator": "ALIGNAX_COORDINATOR", "process_count": "ALIGNAX_PROCESS_COUNT",
       "process_id": "ALIGNAX_PROCESS_ID"}
_WAIT_MS = 24 * 3600 * 1000  # the supervisor ends a wait for a process that is gone; this bound is only the last resort
_calls: Counter[str] = Counter()
_stops: dict[str, int] = {}
_beat: presence.Beat | None = None


def settings(arguments: Any) -> dict[str, Any] | None:
    """What `start` takes, from the flags or the environment (flags first); None for an ordinary run of one process.

    Raises ConfigError where some of the three values are missing or do not fit.
    """
    found = {}
    for name, variable in ENV.items():
        value = getattr(arguments, name, None)
        if value is None and os.environ.get(variable):
            value = os.environ[variable]
        if value is not None:
            found[name] = value
    if getattr(arguments, "distributed", False):
        return found
    if not found:
        return None
    shown = ", ".join(f"--{n.replace('_', '-')} ({v})" for n, v in ENV.items())
    if len(found) < 3:
        raise ConfigError(f"a distributed run needs {shown}; found only {', '.join(found)}. Or --distributed alone, "
                          "where the cluster can be asked")
    try:
        count, index = int(found["process_count"]), int(found["process_id"])
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}") from error
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"process_id={index} of process_count={count}; allowed: 0 to process_count - 1")
    if not str(found["coordinator"]).rpartition(":")[2].isdigit() or ":" not in str(found["coordinator"]):
        raise ConfigError(f"coordinator={found['coordinator']!r}; expected HOST:PORT")
    return {"coordinator": found["coordinator"], "process_count": count, "process_id": index}


def start(found: dict[str, Any], workdir: pathlib.Path | str, *, timeout: int = 300) -> None:
    """Joins the other processes; to be called before anything touches a device.

    found: of `settings`. Raises ConfigError where they do not all come within `timeout` seconds.
    """
    global _beat
    folder, token = supervise.folder_of(workdir), os.environ.get(supervise.TOKEN, "")
    if "process_id" in found:  # known before the meeting, so that a meeting that fails is told with a number
        _beat = presence.Beat(folder, int(found["process_id"]), int(found["process_count"]), token)
    # JAX's own detection of silence ends a process without a word; it comes after the supervisor's.
    heartbeat = max(int(4 * supervise.patience()), 100)
    try:
        jax.distributed.initialize(
            coordinator_address=found.get("coordinator"), num_processes=found.get("process_count"),
            process_id=found.get("process_id"), initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat,
            cluster_detection_method="deactivate" if len(found) == 3 else None)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the processes of the run did not meet within {timeout} seconds ({str(error)[:300]}); "
                          f"settings: {found or 'asked of the cluster'}") from error
    if _beat is None:
        _beat = presence.Beat(folder, jax.process_index(), jax.process_count(), token)


def count() -> int:
    """Number of processes of this run."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def at(where: str) -> None:
    """Notes what this process is doing, for the message of others should it stop (`in sft at step 12`)."""
    if _beat is not None:
        _beat.where = where


def leave(message: str) -> None:
    """Notes why this process ends, at once: others name the reason."""
    if _beat is not None:
        _beat.message = message[:1000]
        _beat.now()


def _client():
    from jax._src import distributed as state  # the coordination service has no public name in JAX 0.10

    return state.global_state.client


def _key(name: str) -> str:
    """A key for one use: all processes call in the same order, so they count alike."""
    _calls[name] += 1
    return f"alignax/{name}/{_calls[name]}"


def barrier(name: str) -> None:
    """Waits until all processes have come here."""
    if count() > 1:
        _client().wait_at_barrier(_key(f"barrier/{name}"), _WAIT_MS)


def from_main(name: str, value: Any = None) -> Any:
    """Process 0's `value` (anything that JSON holds) on all processes; the others' argument is ignored."""
    if count() == 1:
        return value
    key = _key(f"main/{name}")
    if is_main():
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, _WAIT_MS))


def agree(name: str, value: Any) -> None:
    """Raises ConfigError on every process where `value` (JSON) is not the same on all, naming those that differ."""
    if count() == 1:
        return
    key, text = _key(f"agree/{name}"), json.dumps(value, sort_keys=True, default=str)
    client = _client()
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    given = [client.blocking_key_value_get(f"{key}/{i}", _WAIT_MS) for i in range(count())]
    differ = [i for i, other in enumerate(given) if other != given[0]]
    if differ:
        raise ConfigError(f"{name}: process {differ[0]} has {given[differ[0]][:200]}, process 0 has {given[0][:200]} "
                          f"({len(differ)} of {count()} processes differ); all must get the same")


def stop_at(scope: str, step: int, requested: bool) -> bool:
    """Whether to stop after `step`: at the same step on all processes, a little after one of them asked.

    scope: one stage. requested: whether this process was told to stop. To be called after every step's dispatch, when
    the metrics of the step before have been read: processes are then at most one step apart, so a step that lies two
    ahead is reached by nobody before it is announced.
    """
    if count() == 1:
        return requested
    key = f"alignax/stop/{scope}"
    if scope not in _stops:
        if requested:
            try:
                _client().key_value_set(key, str(step + 2))
            except jax.errors.JaxRuntimeError:
                pass  # another process announced first: its step holds
        try:
            _stops[scope] = int(_client().key_value_try_get(key))
        except jax.errors.JaxRuntimeError:
            return False  # nobody asked
    return step >= _stops[scope]


def stop_now(requested: bool) -> bool:
    """Whether any process was told to stop, for work that writes nothing before its end (sampling)."""
    if count() == 1:
        return requested
    try:
        if requested:
            _client().key_value_set("alignax/stop/now", "1", allow_overwrite=True)
        return bool(_client().key_value_try_get("alignax/stop/now"))
    except jax.errors.JaxRuntimeError:
        return requested


def await_file(path: pathlib.Path, *, timeout: float = 120.0) -> None:
    """Waits until a file that process 0 has written is seen here with its whole length (a network file system may lag).

    Raises ConfigError after `timeout` seconds: the folder is not shared.
    """
    if count() == 1:
        return
    size = from_main("file", path.stat().st_size if is_main() else None)
    deadline = time.monotonic() + timeout
    while not path.exists() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise ConfigError(f"{path}: process 0 wrote {size} bytes, which process {jax.process_index()} does not "
                              "see; the run's folder has to lie on a file system that all processes share")
        time.sleep(0.2)


def own_blocks(mesh: Mesh) -> list[int]:
    """Which of the data * fsdp equal blocks of a batch lie on this process's devices, ascending."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return sorted({index[0].start or 0 for index in cut.addressable_devices_indices_map((ways,)).values()})


def join_blocks(local, mesh: Mesh):
    """The global batch of the blocks that each process laid out: leaves [own blocks * n, ...] -> [all blocks * n, ...].

    local: a tree of NumPy arrays whose leading axes hold this process's `own_blocks`, in that order. No array travels.
    """
    ways, own = mesh.shape["data"] * mesh.shape["fsdp"], own_blocks(mesh)
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def one(leaf):
        each = leaf.shape[0] // len(own)

        def piece(index):
            start = own.index((index[0].start or 0) // each) * each
            return leaf[start:start + each]

        return jax.make_array_from_callback((ways * each,) + leaf.shape[1:], cut, piece)

    return jax.tree.map(one, local)


def replicated_over(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicated(tree, mesh: Mesh):
    """NumPy values on every device, by an explicit transfer; all processes give the same ones."""
    whole = replicated_over(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)
    return jax.tree.map(lambda a: jax.make_array_from_callback(np.shape(a), whole, lambda index: np.asarray(a)[index]),
                        tree)


def to_host(tree):
    """NumPy copies of a tree of global arrays, on every process alike; what is cut over processes is gathered."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(jax.device_get(leaf))

    return jax.tree.map(one, tree)
