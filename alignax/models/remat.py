"""What a layer keeps for its backward pass: the names of `model.remat`, and where each can run.

The backward pass of a layer needs the intermediates of its forward pass. They are kept in device memory, computed
again, or kept in the host's memory (offloaded) and fetched back; see jax.checkpoint_policies.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from alignax.models.flash import KEPT
from alignax.types import Array, ConfigError

REMAT = ("none", "full", "dots", "dots_offloaded", "inputs_offloaded")
OFFLOADED = tuple(name for name in REMAT if name.endswith("_offloaded"))
HOST = "pinned_host"
_INPUT = "layer_input"


def check_remat(remat: str, device: jax.Device, where: str = "remat") -> None:
    """Refuses a name that is not in REMAT, and offloading on a device that cannot.

    Raises ConfigError. Offloading needs memory of kind `pinned_host`. The CPU backend lists one, but its compiler drops
    the transfers without a word, and device memory is host memory there: nothing would be gained.
    """
    if remat not in REMAT:
        raise ConfigError(f"{where}={remat!r}; allowed: {', '.join(REMAT)}")
    if remat in OFFLOADED:
        kinds = sorted(memory.kind for memory in device.addressable_memories())
        if device.platform == "cpu" or HOST not in kinds:
            raise ConfigError(f"{where}={remat!r} keeps intermediates in {HOST} memory, beside the device's own; this "
                              f"is {device.platform} ({', '.join(kinds)}). Allowed here: "
                              f"{', '.join(name for name in REMAT if name not in OFFLOADED)}")


def rematerialised(run: Callable, remat: str, *, looped: bool) -> Callable:
    """`run(x, parameters)` of one layer, keeping what `remat` says; in a loop (`looped`) no guard is needed.

    none: everything. full: only x. dots: x, the results of weight products, and what attention in blocks leaves.
    dots_offloaded: x, and those products on the host. inputs_offloaded: only x, on the host. Raises ConfigError for
    another name.
    """
    if remat not in REMAT:
        raise ConfigError(f"forward(remat=): found {remat!r}, allowed: {', '.join(REMAT)}")
    if remat == "none":
        return run
    policies = jax.checkpoint_policies
    if remat == "inputs_offloaded":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src="device", offload_dst=HOST)
    else:
        dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable,
                                                policies.save_only_these_names(KEPT))
        policy = {"full": None, "dots": dots,
                  "dots_offloaded": policies.offload_dot_with_no_batch_dims("device", HOST)}[remat]

    def named(x: Array, parameters):
        return run(checkpoint_name(x, _INPUT), parameters)

    # Inside a scan the compiler cannot merge the recomputation with the first pass, so the guard is not needed.
    return jax.checkpoint(named if remat == "inputs_offloaded" else run, policy=policy, prevent_cse=not looped)
