"""Peak numbers of devices, from their makers' data sheets: arithmetic, memory, and the links between devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from alignax.types import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """One device: dense FLOP/s by the parameters' dtype, bytes of memory, bytes/s of it, and bytes/s that it sends to
    its neighbours of one fast domain (all links together, one direction). platform: as JAX names it, which decides
    what `auto` attention is there; empty where it is not known."""

    name: str
    peak: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float
    about: str = ""
    platform: str = ""


# Dense peaks. float32 is what a float32 product costs at JAX's default precision: TF32 on the GPUs, one bfloat16 pass
# on TPUs. Links: NVLink 4 inside a node of 8; the chip-to-chip network of a TPU slice. Between nodes or slices the
# network is slower by 10 or more: give `link=` for a mesh that spans them.
DEVICES: dict[str, Device] = {d.name: d for d in (
    Device("h100", {"bfloat16": 989e12, "float32": 495e12}, 80e9, 3.35e12, 450e9, "NVIDIA H100 SXM, 80 GB", "gpu"),
    Device("h200", {"bfloat16": 989e12, "float32": 495e12}, 141e9, 4.8e12, 450e9, "NVIDIA H200 SXM, 141 GB",
           "gpu"),
    Device("v5e", {"bfloat16": 197e12, "float32": 197e12}, 16e9, 0.819e12, 200e9, "TPU v5e", "tpu"),
    Device("v5p", {"bfloat16": 459e12, "float32": 459e12}, 95e9, 2.765e12, 600e9, "TPU v5p", "tpu"),
    Device("cpu", {"bfloat16": 1e12, "float32": 1e12}, 64e9, 0.1e12, 10e9,
           "a server of some 16 cores, in round numbers; give your own", "cpu"),
)}
_NUMBERS = ("peak", "memory", "bandwidth", "link")


def device(text: str) -> Device:
    """A row of DEVICES by name, with numbers replaced or given whole: `h100`, `h100,link=50e9`,
    `peak=1e14,memory=4e10,bandwidth=1e12,link=1e11` (FLOP/s, bytes, bytes/s, bytes/s).

    Raises ConfigError for another name or key, a value that is no positive number, and numbers that are missing.
    """
    name, numbers = "", {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            if key not in DEVICES or name:
                raise ConfigError(f"--device={text}: {key!r}; allowed: one of {', '.join(DEVICES)}, and numbers "
                                  f"{', '.join(f'{n}=' for n in _NUMBERS)}")
            name = key
            continue
        if key not in _NUMBERS:
            raise ConfigError(f"--device={text}: {key!r}; allowed: {', '.join(_NUMBERS)}")
        try:
            numbers[key] = float(value)
        except ValueError:
            numbers[key] = math.nan
        if not 0 < numbers[key] < math.inf:
            raise ConfigError(f"--device={text}: {key}={value!r}; allowed: a positive number")
    missing = [n for n in _NUMBERS if n not in numbers]
    if not name and missing:
        raise ConfigError(f"--device={text}: {', '.join(missing)} missing; allowed: one of {', '.join(DEVICES)}, or "
                          f"all of {', '.join(_NUMBERS)}")
    if "peak" in numbers:
        numbers["peak"] = {"bfloat16": numbers["peak"], "float32": numbers["peak"]}
    if not name:
        return Device("given", **numbers)
    return dataclasses.replace(DEVICES[name], **numbers) if numbers else DEVICES[name]
