"""The algebra of a sweep: lists of settings, put together by product, zip and chain.

An axis is a list of dicts, each from a config's dotted key to a value. A config file says what its sweep is in a
function beside `get_config`:

    def sweep(add):
        for settings in product(values("loss", ("dpo", "ipo")), values("method.optim.learning_rate", (1e-4, 1e-3))):
            add(**settings)

`loss`, and any key that begins with a colon, is an argument of the config file instead of a key of the config:
`{":loss": "ipo"}` is what `FILE:loss=ipo` is on the command line.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignax.types import ConfigError

Axis = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One entry of a sweep. name: "" is numbered later. factors: what tells it apart; None: its settings."""

    settings: Mapping[str, Any]
    name: str = ""
    factors: Mapping[str, Any] | None = None


def values(key: str, options: Iterable[Any]) -> Axis:
    """One setting per option: `values("loss.beta", (0.1, 0.3))`. Raises ConfigError where there is none."""
    axis = [{key: option} for option in options]
    if not axis:
        raise ConfigError(f"sweep: values({key!r}, ...) is empty")
    return axis


def product(*axes: Axis) -> Axis:
    """Every combination, the last axis running fastest. Raises ConfigError where two axes set one key."""
    return [_joined(parts) for parts in itertools.product(*axes)]


def zipped(*axes: Axis) -> Axis:
    """The first settings of every axis together, then the second ones. Raises ConfigError for unequal lengths."""
    lengths = [len(axis) for axis in axes]
    if len(set(lengths)) > 1:
        raise ConfigError(f"sweep: zipped axes have {lengths} settings; their lengths have to be equal")
    return [_joined(parts) for parts in zip(*axes, strict=True)]


def chain(*axes: Axis) -> Axis:
    """The settings of one axis after those of another."""
    return [dict(settings) for axis in axes for settings in axis]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in parts:
        twice = sorted(out.keys() & part.keys())
        if twice:
            raise ConfigError(f"sweep: two axes set {', '.join(twice)}; an axis of its own for every key")
        out |= part
    return out


def log_uniform(low: float, high: float, n: int, seed: int) -> tuple[float, ...]:
    """n draws whose logarithm is uniform between those of low and high. Raises ConfigError unless 0 < low < high."""
    if not 0 < low < high:
        raise ConfigError(f"sweep: log_uniform({low}, {high}, ...); allowed: 0 < low < high")
    return tuple(math.exp(x) for x in uniform(math.log(low), math.log(high), n, seed))


def uniform(low: float, high: float, n: int, seed: int) -> tuple[float, ...]:
    """n draws, uniform between low and high. Raises ConfigError unless low < high and n > 0."""
    if not low < high or n < 1:
        raise ConfigError(f"sweep: uniform({low}, {high}, {n}, ...); allowed: low < high and n >= 1")
    return tuple(float(x) for x in np.random.default_rng(seed).uniform(low, high, n))


def choice(options: Sequence[Any], n: int, seed: int) -> tuple[Any, ...]:
    """n draws with replacement from the options. Raises ConfigError where there are none, or n < 1."""
    if not len(options) or n < 1:
        raise ConfigError(f"sweep: choice of {n} out of {len(options)} options; both have to be positive")
    return tuple(options[i] for i in np.random.default_rng(seed).integers(len(options), size=n))


def collect(function: Callable[[Callable[..., None]], None]) -> list[Point]:
    """The points that `function(add)` adds: `add(name="", factors=None, **settings)`.

    factors: where given, what the report tells members apart by in place of the settings, as where one strength has
    another key in each loss. Raises ConfigError where nothing is added, or a value that no config holds.
    """
    found: list[Point] = []

    def add(*, name: str = "", factors: Mapping[str, Any] | None = None, **settings: Any) -> None:
        where = f"sweep: add number {len(found)}"
        if not isinstance(name, str):
            raise ConfigError(f"{where}: name={name!r}; allowed: a text")
        found.append(Point({key: _plain(value, f"{where}, {key}") for key, value in settings.items()}, name,
                           None if factors is None else {key: _plain(value, f"{where}, factors[{key!r}]")
                                                         for key, value in factors.items()}))

    function(add)
    if not found:
        raise ConfigError("sweep(add) of the config file never called add")
    return found


def _plain(value: Any, where: str) -> Any:
    """The value as a config holds it: numpy scalars as Python's, lists as tuples."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, where) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value}; allowed: finite numbers")
    if not isinstance(value, (bool, int, float, str)):
        raise ConfigError(f"{where} = {value!r} of type {type(value).__name__}; allowed: bool, int, float, str, and "
                          "tuples of them")
    return value


def parse(text: str) -> Axis:
    """The axis of `KEY=A,B,...` of the command line; commas inside brackets or quotes do not separate.

    Values are Python literals, and texts where they are none. Raises ConfigError for anything else.
    """
    key, equals, rest = text.partition("=")
    parts = _split(rest)
    if not equals or not key or any(not part for part in parts):
        raise ConfigError(f"--sweep={text}: expected --sweep KEY=VALUE,VALUE,... with a config's dotted key")
    return values(key, [_plain(_literal(part), f"--sweep={text}: {key}") for part in parts])


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
