"""Which layers have a sliding window: `layer_types` of transformers 5, or a family's own older rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignax.models.config import DecoderConfig
from alignax.models.families.settings import Settings

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(settings: Settings, layers: int, window: int | None,
                     rule: Callable[[int], bool]) -> tuple[int, ...]:
    """One window per layer, 0 for none: by layer_types, or by `rule(number of the layer)` where the key is absent."""
    types = settings.get("layer_types")
    if types is None:
        types = [SLIDING if rule(number) else FULL for number in range(layers)]
    if not isinstance(types, list) or len(types) != layers or set(types) - {FULL, SLIDING}:
        settings.refuse("layer_types", types, f"null or {layers} of {FULL!r} and {SLIDING!r}")
    if SLIDING in types and window is None:
        settings.refuse("sliding_window", None, f"a number, since layer_types holds {SLIDING!r} (and, where the family "
                        "has it, use_sliding_window true)")
    return tuple(window if kind == SLIDING else 0 for kind in types)


def write_layer_types(config: DecoderConfig, unused: int | None = 4096) -> dict[str, Any]:
    """layer_types and sliding_window (the window where one layer has one, else `unused`)."""
    return {"layer_types": [SLIDING if window else FULL for window in config.layer_windows],
            "sliding_window": max(config.layer_windows) or unused}
