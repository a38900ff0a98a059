"""What a train stage would cost, told before it runs: memory, arithmetic, traffic, compilations, time of a step."""

from alignax.planning.arithmetic import forward_flops, matrix_parameters, update_flops
from alignax.planning.devices import DEVICES, Device, device
from alignax.planning.hlo import Collective, aliased, collectives, dot_flops
from alignax.planning.program import (
    MOST_DEVICES,
    Setup,
    Size,
    abstract_arguments,
    make_setup,
    measure,
    per_device,
    simulated_mesh,
    traced_flops,
)
from alignax.planning.roofline import step_time

__all__ = [
    "Collective", "DEVICES", "Device", "MOST_DEVICES", "Setup", "Size", "abstract_arguments", "aliased", "collectives",
    "device", "dot_flops", "forward_flops", "make_setup", "matrix_parameters", "measure", "per_device",
    "simulated_mesh", "step_time", "traced_flops", "update_flops",
]
