"""Checkpoints through orbax: asynchronous, atomic, sealed with checksums; the last two and the k best kept."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import pathlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from alignax.types import ConfigError

EXIT_DISK = 74
_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)
_DISK_WORDS = ("No space left", "File too large", "Disk quota", "Read-only file system", "Input/output error")


class DiskError(OSError):
    """Something of the run could not be written; the message names what, where, the cause and the last good state."""


@contextlib.contextmanager
def disk(what: str, advice: str = "free space there and run the same command again") -> Iterator[None]:
    """Turns the errors of a disk that is full, failing or not writable into a DiskError that says what was written."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if not ((isinstance(error, OSError) and error.errno in _DISK) or (
                isinstance(error, (OSError, ValueError, RuntimeError)) and any(w in str(error) for w in _DISK_WORDS))):
            raise
        cause = next((w for w in _DISK_WORDS if w in str(error)), None) or str(error)
        raise DiskError(f"{what} could not be written ({cause}); {advice}") from error


class Checkpoints:
    """A thin wrapper of orbax's CheckpointManager over one folder.

    keep_best: how many of the best checkpoints by `metric` (smallest first where `lower_is_better`) stay besides
    the last two. A checkpoint counts once its seal is written: the SHA-256 of each of its files, in
    `<folder>.seals/<step>.json`, computed after orbax has committed it. Opening the folder checks the newest ones:
    a step that was never sealed was interrupted and is removed; one that differs from its seal is put aside as
    `<folder>.damaged/<step>`, and the one before it is used. `notes` holds a line on each.

    In a run of many processes all of them open, save, restore and close alike; process 0 checks and seals.
    """

    def __init__(self, folder: pathlib.Path | str, *, keep_best: int = 0, metric: str = "loss",
                 lower_is_better: bool = True):
        keep = [policies.LatestN(2)]
        if keep_best:
            keep.append(policies.BestN(get_metric_fn=lambda m: float(m[metric]), reverse=lower_is_better,
                                       n=keep_best, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
            enable_async_checkpointing=True)
        self.folder = pathlib.Path(folder).absolute()
        self.notes: list[str] = []
        self._main = jax.process_index() == 0
        self._sealing: threading.Thread | None = None
        self._failed: BaseException | None = None
        if self._main:
            self._inspect()
        if jax.process_count() > 1:  # nobody lists the steps before they are checked
            jax.experimental.multihost_utils.sync_global_devices(f"inspect {self.folder}")
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "plan"))

    def _seal_path(self, step: int) -> pathlib.Path:
        return self.folder.with_name(self.folder.name + ".seals") / f"{step}.json"

    def _inspect(self) -> None:
        """Removes what was interrupted, puts aside what is damaged, from the newest on until one is whole."""
        steps = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()] if self.folder.is_dir() else []
        for step in sorted(steps, reverse=True):
            place, seal = self.folder / str(step), self._seal_path(step)
            if not seal.exists():
                self.notes.append(f"checkpoint of step {step}: it was interrupted before it was sealed; not used")
                shutil.rmtree(place)
                continue
            wrong = differences(json.loads(seal.read_text(encoding="utf-8")), checksums(place))
            if not wrong:
                return
            aside = self.folder.with_name(self.folder.name + ".damaged") / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            place.rename(aside)
            seal.unlink()
            self.notes.append(f"checkpoint of step {step} is damaged ({'; '.join(wrong[:3])}); it was put aside as "
                              f"{aside} and the one before it is used")

    def save(self, step: int, state: Any, plan: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Starts an asynchronous save of a pytree and a JSON-able plan position; `wait` blocks until it is down.

        Raises DiskError where this save, or the one before it, cannot be written.
        """
        self.wait()
        with disk(f"the checkpoint of step {step} in {self.folder}", self._advice()):
            self._manager.save(step, metrics=dict(metrics) if metrics else None, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), plan=ocp.args.JsonSave(dict(plan))))
        self._sealing = threading.Thread(target=self._seal, args=(step,), name=f"seal of step {step}")
        self._sealing.start()

    def _seal(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if self._main:
                path = self._seal_path(step)
                write_json(path, checksums(self.folder / str(step)))
                for other in path.parent.glob("*.json"):
                    if not (self.folder / other.stem).exists():
                        other.unlink()
        except BaseException as error:  # raised again by `wait`, in the thread that trains
            self._failed = error

    def _advice(self) -> str:
        seals = [int(p.stem) for p in self._seal_path(0).parent.glob("*.json")]
        return (f"last good checkpoint: {f'step {max(seals)}' if seals else 'none'}; free space there and run the same "
                "command again")

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """State and plan of a step, in the shapes, dtypes and shardings of `like`.

        Raises ConfigError when the stored tree has another structure: the checkpoint is of another configuration.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            out = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), plan=ocp.args.JsonRestore()))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder}/{step}: the checkpoint does not fit this configuration "
                              f"({str(error)[:300]})") from error
        return out["state"], dict(out["plan"])

    def wait(self) -> None:
        """Blocks until pending saves are on disk and sealed. Raises DiskError where one could not be written."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            with disk(f"a checkpoint in {self.folder}", self._advice()):
                raise failed

    def close(self) -> None:
        """Waits for pending saves and releases the folder."""
        self.wait()
        self._manager.close()


def checksums(folder: pathlib.Path) -> dict[str, list]:
    """relative path -> [bytes, SHA-256] of every file below `folder`."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        out[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return out


def differences(stored: Mapping[str, list], found: Mapping[str, list]) -> list[str]:
    """What is wrong with the files `found` against those `stored` (both of `checksums`), a line each."""
    wrong = []
    for name in sorted(stored.keys() | found.keys()):
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name not in stored:
            wrong.append(f"{name} was not there")
        elif stored[name][0] != found[name][0]:
            wrong.append(f"{name} has {found[name][0]} bytes instead of {stored[name][0]}")
        elif stored[name][1] != found[name][1]:
            wrong.append(f"{name} has other contents")
    return wrong


def save_tree(folder: pathlib.Path | str, tree: Any) -> None:
    """Writes a parameter tree as one atomic orbax checkpoint; an existing one is replaced."""
    with disk(f"parameters in {folder}"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), tree, force=True)


def load_tree(folder: pathlib.Path | str, like: Any, shardings: Any = None) -> Any:
    """Reads a tree saved by `save_tree` into the structure and dtypes of `like`. Raises ConfigError where they differ.

    shardings: a tree like it; every array is then read into its shards, in runs of many processes too."""
    folder = pathlib.Path(folder).absolute()
    if not folder.exists():
        raise ConfigError(f"{folder}: no parameters are stored there")
    if shardings is not None:
        like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, shardings)
    elif jax.process_count() > 1:  # an array on one process's device is no target that all could restore to
        like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}: the parameters do not fit this model ({str(error)[:300]})") from error


def stored_tree(folder: pathlib.Path | str) -> Any:
    """Shapes and dtypes (jax.ShapeDtypeStruct) of a tree saved by `save_tree`; no array is read.

    Raises ConfigError where none is stored.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder).item_metadata
    except (ValueError, OSError) as error:
        raise ConfigError(f"{folder}: no parameters are stored there") from error
    if found is None:
        raise ConfigError(f"{folder}: no parameters are stored there")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.tree)


def write_json(path: pathlib.Path | str, value: Any) -> None:
    """Writes JSON through a temporary file and a rename, so that a reader never sees half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with disk(str(path)):
        part.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
        part.replace(path)
