"""`alignax sweep --trials N`: batches of members that optuna chooses, each told what those before it came to."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def settings_of(arguments, module) -> tuple[Any, Callable]:
    """(the Search, the config file's search(trial)). Raises ConfigError for what does not go together."""
    from alignax.sweep import search
    from alignax.types import ConfigError

    if not hasattr(module, "search"):
        raise ConfigError(f"--trials={arguments.trials} --config={arguments.config}: it defines no search(trial)")
    if arguments.sweep:
        raise ConfigError(f"--trials={arguments.trials} --sweep={arguments.sweep[0]}: a search chooses the values; "
                          "allowed: one of the two")
    if arguments.at_once < 1:
        raise ConfigError(f"--at-once={arguments.at_once}; allowed: at least 1")
    metric, _, mode = arguments.metric.partition(":")
    if not metric or mode not in search.MODES:
        raise ConfigError(f"--metric={arguments.metric}; expected NAME:max or NAME:min, with a number of results.jsonl")
    return search.Search(metric, mode, arguments.at_once), module.search


def stored_trials(folder: pathlib.Path) -> list[Any]:
    """The trials that the folder's plan holds, in order."""
    from alignax import presence, sweep
    from alignax.sweep import search

    plan = presence.read_json(folder / sweep.PLAN) or {}
    return [search.Trial(**record) for record in plan.get("trials", ())]


def values_of(search: Any, count: int, members: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What each of `count` trials came to: the mean of the metric over its members, `dropped`, or None.

    Raises ConfigError where members are finished and none has the metric.
    """
    from alignax.types import ConfigError

    found: list[Any] = []
    finished = [row for row in rows if row["state"] == "finished"]
    names = sorted({name for row in finished for name in row["metrics"]})
    if finished and search.metric not in names:
        raise ConfigError(f"--metric={search.metric} is no number of results.jsonl; allowed: {', '.join(names)}")
    by_name = {row["member"]: row for row in rows}
    for number in range(count):
        own = [by_name[m.name] for m in members if m.name.split("-")[0] == f"{number:04d}" and m.name in by_name]
        values = [row["metrics"].get(search.metric) for row in own if row["state"] == "finished"]
        whole = values and len(values) == len(own) and all(value is not None for value in values)
        dropped = any(row["state"] == "dropped" for row in own)
        found.append(sum(values) / len(values) if whole else "dropped" if dropped else None)
    return found
