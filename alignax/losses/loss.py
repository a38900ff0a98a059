"""A loss with its hyper-parameters resolved, and what its hyper-parameters are checked against."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from alignax.losses.info import MethodInfo
from alignax.losses.inputs import sums
from alignax.types import REQUESTS, ConfigError, Terms


def split_signature(function: Callable) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(requests, hyper-parameter defaults) of a loss.

    Raises ConfigError when a positional name is no request, a hyper-parameter has no default, or *args appear.
    """
    requests, hyper = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        where = f"{function.__module__}.{function.__name__}"
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty:
                raise ConfigError(f"{where}: hyper-parameter {name!r} has no default")
            hyper[name] = parameter.default
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in REQUESTS:
            requests.append(name)
        else:
            raise ConfigError(f"{where}: positional argument {name!r} is not a request; "
                              f"allowed: {', '.join(sorted(REQUESTS))}")
    return tuple(requests), hyper


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that `jax.jit(loss)` works
class Loss:
    """A loss with its hyper-parameters resolved.

    name: method id. fn: the pure function. requests: positional names, in order. hyper: every hyper-parameter.
    """

    name: str
    fn: Callable
    requests: tuple[str, ...]
    hyper: Mapping[str, Any]
    info: MethodInfo

    def __call__(self, inputs: Mapping[str, Any], **override: Any) -> jax.Array | Terms:
        """Evaluate on a mapping of request arrays; extra entries are ignored.

        override: hyper-parameters for this call, may be traced. Raises ConfigError for a missing input or an unknown
        override, TypeError when a sum over tokens comes as bfloat16 or float16.
        """
        missing = [name for name in self.requests if name not in inputs]
        if missing:
            raise ConfigError(f"loss {self.name!r}: inputs lack {', '.join(missing)}; found {sorted(inputs)}")
        check_keys(self.name, override, self.hyper)
        for name in self.requests:
            request = REQUESTS[name]
            if request.axes == "BK" and request.provider in ("policy", "reference"):
                sums(f"loss {self.name!r}: {name}", inputs[name])
        return self.fn(*(inputs[name] for name in self.requests), **{**self.hyper, **override})

    def init_state(self) -> Any:
        """The running state before the first update; None for a loss without one."""
        return None if self.info.init_state is None else self.info.init_state()


def from_function(function: Callable, **hyper: Any) -> Loss:
    """The Loss of a function under `@method(...)`, of the index or not, with `hyper` over its defaults.

    Raises ConfigError for a function without @method, a signature that split_signature refuses, an unknown key, a value
    whose type cannot stand for the default's, and a plain number outside the method's limits. Traced values are taken
    as they are.
    """
    info = getattr(function, "info", None)
    if info is None:
        raise ConfigError(f"{function.__module__}.{function.__name__} has no @method(...) above it")
    requests, resolved = split_signature(function)
    check_keys(info.id, hyper, resolved)
    check_values(info.id, hyper, resolved, info.limits)
    return Loss(info.id, function, requests, {**resolved, **hyper}, info)


def check_keys(name: str, given: Mapping[str, Any], legal: Mapping[str, Any]) -> None:
    """ConfigError for a hyper-parameter of loss `name` that is not in `legal`, with near and legal ones."""
    unknown = [key for key in given if key not in legal]
    if unknown:
        close = [m for key in unknown for m in difflib.get_close_matches(key, list(legal), n=1)]
        hint = f" (did you mean {', '.join(close)}?)" if close else ""
        raise ConfigError(f"loss {name!r}: unknown hyper-parameter {', '.join(unknown)}{hint}; "
                          f"allowed: {', '.join(legal) or 'none'}")


def check_values(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any],
                 limits: Mapping[str, tuple[float, float]]) -> None:
    """ConfigError for a value whose type cannot stand for the default's, and a plain number outside its limits.

    Traced values are taken as they are.
    """
    for key, value in given.items():
        default = defaults[key]
        static = isinstance(default, (bool, str))
        if (static and not isinstance(value, type(default))) or (not static and isinstance(value, (bool, str))):
            kind = type(default).__name__
            raise ConfigError(f"loss {name!r}: {key} = {value!r} is {type(value).__name__}; allowed: {kind}")
        low, high = limits.get(key, (-float("inf"), float("inf")))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ConfigError(f"loss {name!r}: {key} = {value!r}; allowed: {low} to {high}")
