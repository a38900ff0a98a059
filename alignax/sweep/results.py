"""One table of what all members of a sweep came to: results.jsonl, and results.parquet where pyarrow is there."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignax import checkpoint, metrics, presence
from alignax.sweep.folder import MEMBERS, PLAN, STATUS, dropped
from alignax.types import ConfigError

_LEFT_OUT = ("seconds", "fingerprint", "compilations")


def gather(folder: pathlib.Path) -> list[dict[str, Any]]:
    """A row per member, in the plan's order: member, state, reason, factors, metrics.

    state: finished, failed, pending, or dropped at a rung. metrics: every number of result.json by a dotted name: the
    headline's (`win_rate`), a train stage's (`STAGE.eval.loss`), and an evaluation's (`STAGE.POLICY.win_rate`); of a
    dropped member those of its last evaluation, which are no result.
    """
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    status = presence.read_json(folder / STATUS) or {}
    rows = []
    for member in plan["members"]:
        name = member["name"]
        result = presence.read_json(folder / MEMBERS / name / "result.json")
        failed = status.get(name)
        gone = dropped(folder, name)
        state = "finished" if result is not None else "dropped" if gone else "failed" if failed else "pending"
        reason = gone["reason"] if state == "dropped" else failed["reason"] if state == "failed" else ""
        if state == "dropped":
            result = {"stages": {gone["stage"]: {"steps": gone["step"], "eval": gone["evaluated"]}}}
        rows.append({"member": name, "state": state, "reason": reason,
                     "factors": {k: member["factors"][k] for k in plan["factors"] if k in member["factors"]},
                     "metrics": dict(_numbers(result)) if result else {}})
    return rows


def _numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield from _leaves({k: v for k, v in result.items() if k != "stages"}, "")
    for stage, held in result.get("stages", {}).items():
        points = held.get("points", ())
        rest = {k: v for k, v in held.items() if k not in ("points", "headline", *_LEFT_OUT)}
        yield from _leaves(rest, stage)
        for point in points:
            yield from _leaves(point, f"{stage}.{point['policy']}")


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (bool, int, float)) and prefix:
        yield prefix, float(tree)


def history(folder: pathlib.Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the members' metrics.jsonl, each with `member`."""
    return [{"member": name} | row for name in names for row in metrics.read_metrics(folder / MEMBERS / name)]


def write(folder: pathlib.Path, *, with_history: bool = False) -> tuple[list[dict[str, Any]], str]:
    """Writes results.jsonl and results.parquet (and history.jsonl); returns the rows, and why there is no parquet.

    A number that is not finite stands as null in the JSON lines.
    """
    rows = gather(folder)
    _write_lines(folder / "results.jsonl", rows)
    if with_history:
        _write_lines(folder / "history.jsonl", history(folder, [r["member"] for r in rows]))
    try:
        write_parquet(folder / "results.parquet", rows)
    except ConfigError as error:
        return rows, str(error)
    return rows, ""


def _write_lines(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    with checkpoint.disk(str(path)):
        part.write_text("".join(json.dumps(_finite(row)) + "\n" for row in rows), encoding="utf-8")
        part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_parquet(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as columns member, state, reason, factor.KEY and metrics by name; absent values are null.

    A factor whose values are of several kinds is stored as texts. Raises ConfigError where pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path.name} needs pyarrow: pip install 'alignax[data]'; results.jsonl holds the same "
                          "table") from error
    columns: dict[str, list] = {key: [row[key] for row in rows] for key in ("member", "state", "reason")}
    for key in dict.fromkeys(key for row in rows for key in row["factors"]):
        held = [row["factors"].get(key) for row in rows]
        kinds = {float if type(v) in (int, float) else type(v) for v in held if v is not None}
        mixed = len(kinds) > 1 or not kinds <= {float, bool, str}
        columns[f"factor.{key}"] = [v if v is None or not mixed else json.dumps(v) for v in held]
    for key in dict.fromkeys(key for row in rows for key in row["metrics"]):
        columns[key] = [row["metrics"].get(key) for row in rows]
    part = path.with_name(path.name + ".part")
    with checkpoint.disk(str(path)):
        parquet.write_table(pa.table(columns), part)
        part.replace(path)
