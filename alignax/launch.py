"""Config files from the command line: load `FILE[:arg]`, apply `--config.key=value`, explain what is wrong."""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from alignax.types import ConfigError


def load_module(spec: str) -> tuple[types.ModuleType, str]:
    """(module, argument) of `FILE[:arg]`. Raises ConfigError for a file that is missing, broken, or no config."""
    name, _, argument = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ConfigError(f"--config={spec}: no file {name!r}")
    module_spec = importlib.util.spec_from_file_location(f"alignax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        place = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"--config={spec}: {name}{place}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {name} defines no get_config()")
    return module, argument


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of `FILE[:arg]` with overrides `key.path=value` applied.

    A value is read as a Python literal of the type that the key holds (int is taken for float; `true`/`false` for
    bool; tuples as `(1,2)` or `a,b`). Raises ConfigError for a missing or broken file, one without get_config, an
    unknown key (with the legal ones of that section) or a value of another type.
    """
    module, argument = load_module(spec)
    config = module.get_config(argument) if argument else module.get_config()
    for override in overrides:
        _override(config, override)
    return config


def _override(config: ConfigDict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--config.{text}: expected --config.key=value")
    *parents, last = key.split(".")
    section: Any = config
    walked = "config"
    for part in parents:
        _known(section, part, walked)
        section, walked = section[part], f"{walked}.{part}"
        if not isinstance(section, ConfigDict):
            raise ConfigError(f"--config.{key}: {walked} is a value ({section!r}), not a section")
    if walked.endswith(".options") and isinstance(section, ConfigDict) and last not in section:
        section[last] = _literal(value)
        return
    _known(section, last, walked)
    section[last] = _parse(value, section[last], f"{walked}.{last}")


def _known(section: ConfigDict, part: str, walked: str) -> None:
    if part not in section:
        near = difflib.get_close_matches(part, list(section), 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"--{walked}.{part}: unknown key{hint}; allowed in {walked}: {', '.join(sorted(section))}")


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parse(text: str, current: Any, where: str) -> Any:
    if isinstance(current, ConfigDict):
        raise ConfigError(f"--{where} is a section; set one of its keys: {', '.join(sorted(current))}")
    if isinstance(current, bool):
        if text.lower() not in ("true", "false", "0", "1"):
            raise ConfigError(f"--{where}={text}: expected true or false")
        return text.lower() in ("true", "1")
    if isinstance(current, str):
        return text
    value = _literal(text)
    if isinstance(current, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(current, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(current, (tuple, list)):
        if isinstance(value, str):
            value = tuple(v for v in value.split(",") if v)
        if isinstance(value, (tuple, list)):
            return tuple(value)
    else:
        return value
    raise ConfigError(f"--{where}={text}: expected a value of type {type(current).__name__}, like {current!r}")


def compilation_cache() -> pathlib.Path | None:
    """Switches on JAX's persistent compilation cache and returns its folder, or None where it cannot be written.

    `ALIGNAX_CACHE` overrides the place. The folder is keyed by platform, JAX version and processor flags, since a
    program compiled for one processor may not run on another.
    """
    import hashlib
    import platform

    flags = platform.processor() + platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags += next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    tag = f"{jax.__version__}-{platform.system()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
    root = os.environ.get("ALIGNAX_CACHE") or pathlib.Path.home() / ".cache" / "alignax"
    folder = pathlib.Path(root) / "xla" / tag
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder
