"""How many members fit into memory at once, from what the compiled program says that it takes."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from alignax import memory
from alignax.types import ConfigError

_SHARE = 0.7  # of what is free: the host's own arrays, evaluation and checkpoints take the rest


def available(device: jax.Device | None = None) -> int:
    """Bytes that are free on one device; on a CPU, of the machine (or of the container), divided by JAX's devices."""
    device = device or jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    free = [math.inf]
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        line = next((row for row in meminfo.read_text().splitlines() if row.startswith("MemAvailable:")), "")
        free += [int(line.split()[1]) * 1024] if line else []
    group = pathlib.Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free.append(max(int(text) - int(used.read_text()), 0))
    if min(free) == math.inf:
        raise ConfigError("the free memory of this machine cannot be told; give memory_limit in bytes")
    return int(min(free)) // jax.local_device_count()


def needed(compiled: Any) -> int:
    """Bytes that a compiled program holds on one device while it runs: arguments, results and temporaries, buffers
    that it reuses counted once."""
    found = compiled.memory_analysis()
    return (found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
            - found.alias_size_in_bytes)


def largest(count: int, compile_for: Callable[[int], Any], *, limit: int | None = None,
            ways: int = 1) -> tuple[int, Any]:
    """(members at once, the program for them): as many of `count` as fit, in rounds of nearly equal size. Where the
    compiler itself says that memory is out, half as many are tried.

    compile_for(n): the compiled program of n members; n is a multiple of `ways`, the devices that share them. limit:
    bytes on one device, a share of what is free by default. Raises ConfigError where a single member on each device
    takes more.
    """
    bound = int(available() * _SHARE) if limit is None else limit
    up = lambda n: -(-n // ways) * ways
    size = up(count)
    while True:
        try:
            compiled = compile_for(size)
            bytes_needed = needed(compiled)
        except Exception as error:
            if not memory.exhausted(error) or size == ways:
                raise
            size = max(size // 2 // ways * ways, ways)
            continue
        if bytes_needed <= bound:
            return size, compiled
        if size == ways:
            raise ConfigError(f"one member on each device takes {bytes_needed:,} bytes; the limit is {bound:,}. A "
                              "smaller batch_size, a larger accumulation or a larger memory_limit helps")
        fitting = max(int(size * bound / bytes_needed) // ways * ways, ways)
        rounds = -(-count // min(fitting, size - ways))
        size = min(up(-(-count // rounds)), size - ways)
