"""Reference rules: where the reference's numbers come from, and which requests each rule can supply.

frozen: the stage's initial parameters, run in the same program as the policy, so that every log-ratio is exactly 0 at
step 0: a copy, or under LoRA the base itself, which training does not touch. adapter_off: that base by name, the policy
with its adapters switched off; it needs LoRA, and costs no memory. precomputed: the sums of that copy, computed once
over the data before the first step and read from the batch afterwards (no second forward, no second copy in memory;
only `ref_logps`). none: no reference.
"""

from __future__ import annotations

from collections.abc import Iterable

from alignax.types import REQUESTS, ConfigError

RULES: dict[str, str] = {
    "frozen": "the stage's initial parameters, run beside the policy (a copy, or the base under LoRA)",
    "adapter_off": "the policy with its adapters off, in the same program; needs LoRA",
    "precomputed": "log-prob sums of that copy, computed once before the first step",
    "none": "no reference at all",
}


def check(rule: str, requests: Iterable[str], *, lora: bool = False, where: str = "reference") -> None:
    """Refuses a reference rule that cannot supply what a loss requests.

    Args: rule, one of RULES; requests, names from the request table; lora, whether adapters are trained; where, the
    config key for the message.
    Raises: ConfigError naming the key, the request, and the rules that can supply it.
    """
    if rule not in RULES:
        raise ConfigError(f"{where}={rule!r} is not a reference rule; allowed: {', '.join(RULES)}")
    if rule == "adapter_off" and not lora:
        raise ConfigError(f"{where}='adapter_off' needs adapters (lora.rank > 0); without them: frozen or precomputed")
    for name in requests:
        able = REQUESTS[name].references
        if able and rule not in able:
            raise ConfigError(f"{where}={rule!r} cannot supply {name!r} ({REQUESTS[name].about}); "
                              f"rules that can: {', '.join(able)}")
    if rule != "none" and not any(REQUESTS[name].references for name in requests):
        raise ConfigError(f"{where}={rule!r} is set, but the loss requests nothing of a reference "
                          f"({', '.join(requests)}); set it to 'none'")
