"""Checkpoints through orbax: asynchronous, atomic, the last one and the k best kept."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from alignax.types import ConfigError


class Checkpoints:
    """A thin wrapper of orbax's CheckpointManager over one folder.

    keep_best: how many of the best checkpoints by `metric` (smallest first where `lower_is_better`) stay besides
    the last one. A save that was interrupted leaves no visible checkpoint.
    """

    def __init__(self, folder: pathlib.Path | str, *, keep_best: int = 0, metric: str = "loss",
                 lower_is_better: bool = True):
        keep = [policies.LatestN(1)]
        if keep_best:
            keep.append(policies.BestN(get_metric_fn=lambda m: float(m[metric]), reverse=lower_is_better,
                                       n=keep_best, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
            enable_async_checkpointing=True)
        self.folder = pathlib.Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "plan"))

    def save(self, step: int, state: Any, plan: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Starts an asynchronous save of a pytree and a JSON-able plan position; `wait` blocks until it is down."""
        self._manager.save(step, metrics=dict(metrics) if metrics else None, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), plan=ocp.args.JsonSave(dict(plan))))

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
        """Blocks until pending saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves and releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_tree(folder: pathlib.Path | str, tree: Any) -> None:
    """Writes a parameter tree as one atomic orbax checkpoint; an existing one is replaced."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), tree, force=True)


def load_tree(folder: pathlib.Path | str, like: Any) -> Any:
    """Reads a tree saved by `save_tree` into the structure of `like`. Raises ConfigError where they differ."""
    folder = pathlib.Path(folder).absolute()
    if not folder.exists():
        raise ConfigError(f"{folder}: no parameters are stored there")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}: the parameters do not fit this model ({str(error)[:300]})") from error


def write_json(path: pathlib.Path | str, value: Any) -> None:
    """Writes JSON through a temporary file and a rename, so that a reader never sees half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    part.replace(path)
