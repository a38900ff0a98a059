"""A lower and an upper bound of the time of a step, from peaks: nothing runs faster, most runs are slower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignax.planning.devices import Device


def step_time(measured: Mapping[str, Any], device: Device, dtype: str) -> dict[str, Any]:
    """Seconds of one step on `device`, from the result of program.measure.

    compute: FLOPs of the compiled program (of the traced one where it was not compiled, by formula where attention is
    loops of unknown length) / peak. memory: bytes that
    have to move / bandwidth: parameters and reference once for every pass (`reads`; under adapters both read the frozen
    base), gradients and optimiser state read and written, temporaries written and read. link: bytes sent / link rate,
    None where collectives were not counted. overlapped: the largest of the three; in_turn: their sum. bound: the name
    of the largest. fits: whether the bytes of a device are within its memory.
    """
    parts, flops = measured["bytes"], measured["flops"]
    reads = measured["reads"]
    moved = parts["parameters"] * reads["policy"] + parts["reference"] * reads["reference"]
    moved += parts["frozen"] * sum(reads.values())
    moved += 2 * (parts["gradients"] + parts["optimizer"] + parts["parameters"] + (parts["temporaries"] or 0))
    counted = flops["compiled"] if flops["compiled"] is not None else flops["traced"]
    counted = flops["analytic"] if flops["partial"] else counted
    seconds = {"compute": counted / device.peak[dtype], "memory": moved / device.bandwidth}
    if measured["collectives"] is not None:
        seconds["link"] = sum(c["wire"] for c in measured["collectives"].values()) / device.link
    total = parts["total"]
    return {"device": device.name, **{k: seconds.get(k) for k in ("compute", "memory", "link")},
            "overlapped": max(seconds.values()), "in_turn": sum(seconds.values()),
            "bound": max(seconds, key=seconds.get), "fits": None if total is None else total <= device.memory}
