"""A sweep's folder: the plan that claims it, which members are done, and why others failed.

    sweep.json        the plan: every member with its factors, its command line and its resolved config
    members/NAME/     one run each, as `alignax train` leaves it
    status.json       attempts and reasons of members that failed
    members/NAME/dropped.json   in place of a result: where and why a population dropped the member
    results.jsonl     one line per member (and results.parquet)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from alignax import checkpoint, configs, presence
from alignax.sweep.members import Member
from alignax.types import ConfigError

PLAN, STATUS, MEMBERS, LOGS = "sweep.json", "status.json", "members", "logs"
_SHOWN = 8


def plan_of(members: Sequence[Member], base: str, rules: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What sweep.json holds. base: whether members of different seeds share their first stages (shared, own); rules:
    what decides which members train on, by name (halving, early_stop), where something does."""
    order = dict.fromkeys(key for member in members for key in member.factors)  # JSON objects come back sorted
    return {"base": base, "factors": list(order), "members": [member.record() for member in members],
            "rules": {name: _plain(rule) for name, rule in (rules or {}).items() if rule is not None}}


def _plain(rule: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(rule).items()}


def claim(folder: pathlib.Path, plan: Mapping[str, Any]) -> bool:
    """Whether `folder` already holds this very sweep; False where it is new or empty. Writes nothing.

    Raises ConfigError where it holds another sweep, listing what differs, or anything that is no sweep.
    """
    stored = folder / PLAN
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--workdir={folder} is a file; it has to be a folder, or not to exist")
    if not stored.exists():
        if folder.exists() and any(p.name != PLAN + ".part" and not p.name.startswith(presence.LOCK)
                                   for p in folder.iterdir()):
            raise ConfigError(f"--workdir={folder} is not empty and holds no sweep of alignax; nothing was written")
        return False
    old = json.loads(stored.read_text(encoding="utf-8"))
    lines = [f"first stages of members of different seeds (--base): stored {old['base']}, given {plan['base']}"] * (
        old["base"] != plan["base"])
    one, two = (configs.flat(side.get("rules", {})) for side in (old, plan))
    lines += [f"{key}: stored {one.get(key, 'absent')!r}, given {two.get(key, 'absent')!r}"
              for key in sorted(one.keys() | two.keys()) if one.get(key, "absent") != two.get(key, "absent")]
    lines += _differences(old["members"], json.loads(json.dumps(plan))["members"])
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ConfigError(f"--workdir={folder} holds another sweep; choose another folder. Nothing was written. "
                          "Differences:\n  " + "\n  ".join(lines[:_SHOWN] + more))
    return True


def _differences(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[str]:
    """One line for every member that only one side has, and for every key of a member that differs."""
    before, after = ({member["name"]: member for member in side} for side in (old, new))
    lines = [f"member {name}: stored, not given" for name in before if name not in after]
    lines += [f"member {name}: given, not stored" for name in after if name not in before]
    alike: dict[str, list[str]] = {}  # what differs -> the members of which it is true
    for name in (name for name in after if name in before):
        one, two = (configs.flat({key: side[name][key] for key in ("factors", "config")}) for side in (before, after))
        for key in sorted(one.keys() | two.keys()):
            was, now = one.get(key, "absent"), two.get(key, "absent")
            if was != now:
                alike.setdefault(f"{key}: stored {was!r}, given {now!r}", []).append(name)
    for text, names in alike.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"member{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}: {text}")
    return lines


def finished(folder: pathlib.Path, name: str) -> bool:
    """Whether a member has its result."""
    return (folder / MEMBERS / name / "result.json").exists()


def dropped(folder: pathlib.Path, name: str) -> Mapping[str, Any] | None:
    """Where and why a population dropped a member that has no result; None where it did not."""
    from alignax import population  # config files import this package for its algebra only

    return None if finished(folder, name) else presence.read_json(folder / MEMBERS / name / population.DROPPED)


def left(folder: pathlib.Path, members: Sequence[Any]) -> list[Any]:
    """The members that neither have a result nor were dropped."""
    return [m for m in members if not finished(folder, m.name) and not dropped(folder, m.name)]


class Progress:
    """Attempts and failures of the members, kept in status.json; a new invocation starts counting again."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._failed: dict[str, dict] = presence.read_json(folder / STATUS) or {}
        for entry in self._failed.values():
            entry["attempts_now"] = 0

    def failed(self, name: str, reason: str, *, final: bool = False) -> None:
        """Notes an attempt that did not reach a result. final: another one would end alike."""
        entry = self._failed.setdefault(name, {"attempts": 0, "attempts_now": 0})
        self._failed[name] = {"attempts": entry["attempts"] + 1, "attempts_now": entry["attempts_now"] + 1,
                              "reason": reason, "final": final}
        self._write()

    def settle(self) -> None:
        """Forgets the failures of members that are finished by now."""
        self._failed = {n: e for n, e in self._failed.items() if not finished(self._folder, n)}
        self._write()

    def attempts(self, name: str) -> int:
        """Failed attempts of this invocation."""
        return self._failed.get(name, {}).get("attempts_now", 0)

    def final(self, name: str) -> bool:
        """Whether this invocation has seen the member fail in a way that repeats itself."""
        entry = self._failed.get(name, {})
        return bool(entry.get("attempts_now") and entry["final"])

    def reason(self, name: str) -> str:
        """Why the last attempt failed, or ""."""
        return self._failed.get(name, {}).get("reason", "")

    def _write(self) -> None:
        checkpoint.write_json(self._folder / STATUS, self._failed)
