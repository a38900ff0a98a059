"""From the points of a sweep to its members: names, seeds, and resolved configs, all refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignax import configs
from alignax.sweep.algebra import Point
from alignax.types import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,119}")
Load = Callable[[str, Sequence[str]], Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    config: the resolved config, in the general form (configs.staged). folder: where it runs. argument, overrides: what
    `alignax train --config FILE:ARGUMENT --config.OVERRIDE ...` needs to run it alone. factors: name -> value, the
    settings or what the point gives in their place, by which the report tells members apart; `seed` is among them
    where the sweep sets it.
    """

    name: str
    config: Any
    folder: pathlib.Path
    argument: str
    overrides: tuple[str, ...]
    factors: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        """The config as JSON holds it."""
        return configs.plain_of(self.config)

    def record(self) -> dict[str, Any]:
        """What the sweep's folder remembers of it."""
        return {"name": self.name, "argument": self.argument, "overrides": list(self.overrides),
                "factors": dict(self.factors), "config": self.plain()}


def resolve(points: Sequence[Point], load: Load, folder: pathlib.Path, *, argument: str = "",
            overrides: Sequence[str] = (), seeds: int = 0) -> list[Member]:
    """The members of a sweep in `folder`.

    load(argument, overrides): the config of the file, with overrides `key=value`; it raises ConfigError for unknown
    keys and wrong types. argument, overrides: those of all members. seeds: every point runs with so many seeds, from
    the config's own upwards (0: each point once, with the seed that it has). Points without a name are numbered.
    Raises ConfigError, naming the member, for anything a run would be refused for, a setting that the config does not
    take as given, and for two members of one name or one config.
    """
    given = {text.partition("=")[0] for text in overrides}
    width = len(str(max(len(points) - 1, 1)))
    members: dict[str, Member] = {}
    same: dict[str, str] = {}  # config -> member
    apart: dict[str, str] = {}  # factors -> member
    for index, point in enumerate(points):
        name = point.name or f"{index:0{width}d}"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"sweep: member {name!r}; allowed in names: letters, digits and . _ + = -")
        if seeds and "seed" in point.settings:
            raise ConfigError(f"sweep: member {name} sets the seed, and --seeds={seeds} would set it again")
        if both := sorted(given & point.settings.keys()):
            raise ConfigError(f"sweep: member {name} sets {both[0]}, and so does --config.{both[0]}")
        first = _member(point, name, load, folder, argument, overrides)
        copies = [first]
        if seeds:
            start = int(first.config.seed)
            copies = [_member(_seeded(point, start + i), f"{name}-s{start + i}", load, folder, argument, overrides)
                      for i in range(seeds)]
        for member in copies:
            if member.name in members:
                raise ConfigError(f"sweep: two members have the name {member.name!r}")
            key = json.dumps(member.plain(), sort_keys=True)
            if key in same:
                raise ConfigError(f"sweep: members {same[key]} and {member.name} have the same config; a sweep runs "
                                  f"each once. Their factors: {dict(member.factors)}")
            told = json.dumps(dict(member.factors), sort_keys=True)
            if told in apart:
                raise ConfigError(f"sweep: members {apart[told]} and {member.name} have the same factors, so that no "
                                  f"report could tell them apart: {dict(member.factors)}")
            members[member.name], same[key], apart[told] = member, member.name, member.name
    return list(members.values())


def _seeded(point: Point, seed: int) -> Point:
    factors = None if point.factors is None else {**point.factors, "seed": seed}
    return dataclasses.replace(point, settings={**point.settings, "seed": seed}, factors=factors)


def _member(point: Point, name: str, load: Load, folder: pathlib.Path, argument: str,
            overrides: Sequence[str]) -> Member:
    words, texts = {}, list(overrides)
    for key, value in point.settings.items():
        if key.startswith(":") or key == "loss":
            words[key.lstrip(":")] = _text(value)
        else:
            texts.append(f"{key}={_text(value)}")
    factors = dict(point.settings if point.factors is None else point.factors)
    factors = {key.lstrip(":"): value for key, value in factors.items()}
    kept = [part for part in filter(None, argument.split(",")) if part.partition("=")[0] not in words]
    full = ",".join(kept + [f"{key}={value}" for key, value in words.items()])
    general = config = None
    try:
        config = load(full, texts)
        for key, value in point.settings.items():
            if not key.startswith(":") and key != "loss":
                _same(config, key, value)
        general = configs.staged(config)
        configs.check(general)
    except ConfigError as error:
        text = str(error)
        if general is not None and general is not config:  # the keys as they stand in the user's file
            text = text.replace(f"config.{configs.SINGLE}.", "config.")
        raise ConfigError(f"sweep: member {name}: {text}") from error
    return Member(name, general, folder / name, full, tuple(texts), factors)


def _text(value: Any) -> str:
    """The value as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def _same(config: Any, key: str, value: Any) -> None:
    """Refuses a setting that the command line's rules would read as another value."""
    held = config
    for part in key.split("."):
        held = held[part]
    numbers = isinstance(held, (int, float)) and isinstance(value, (int, float))
    if isinstance(held, bool) != isinstance(value, bool) or not (numbers or type(held) is type(value)) or held != value:
        raise ConfigError(f"config.{key}={value!r}: expected a value of type {type(held).__name__}, like {held!r}")
