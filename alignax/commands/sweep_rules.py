"""The rules of `alignax sweep` that drop or stop members: from the command line, else from the config file."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = ("halving", "early_stop")


def rules_of(arguments, module: Any, *, alone: Sequence[str]) -> dict[str, Any]:
    """name -> rule of alignax.population, or None. alone: backends whose members know nothing of each other.

    Raises ConfigError for a rule that cannot be read, or with one of those backends.
    """
    from alignax import population
    from alignax.types import ConfigError

    out = {}
    for name in NAMES:
        flag, text = f"--{name.replace('_', '-')}", getattr(arguments, name)
        given, where = (_read(text, flag), flag) if text else (
            getattr(getattr(module, "sweep", None), name, None) or getattr(getattr(module, "search", None), name, None),
            f"sweep.{name}")
        out[name] = None if given is None else getattr(population, name)(given, where)
        if given is not None and arguments.backend in alone:
            raise ConfigError(f"{where} --backend={arguments.backend}: members that are processes of their own are not "
                              "compared while they train; allowed: --backend=population")
    return out


def check(rules: Mapping[str, Any], members: Sequence[Any]) -> None:
    """Raises ConfigError, naming it, for a member (alignax.sweep.Member) that cannot follow a rule."""
    from alignax.population import rules as checks

    for name, rule in rules.items():
        for member in members if rule is not None else ():
            checks.check(rule, member.plain(), f"{name} of member {member.name}")


def _read(text: str, flag: str) -> dict[str, Any]:
    """`metric=loss,rungs=20:40` as a dict: numbers as numbers, values with colons as tuples."""
    from alignax.types import ConfigError

    out = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key.strip() in out:
            raise ConfigError(f"{flag}={text}: expected KEY=VALUE,KEY=VALUE,..., each key once")
        found = tuple(_literal(one) for one in value.split(":"))
        out[key.strip()] = found if len(found) > 1 else found[0]
    return out


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()
