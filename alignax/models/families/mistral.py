"""Mistral: a Llama whose layers all read a sliding window (arXiv 2310.06825)."""

from __future__ import annotations

from typing import Any

from alignax.models.config import DecoderConfig
from alignax.models.families import llama
from alignax.models.families.rope import write_rope
from alignax.models.families.settings import Settings


def read_config(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a Mistral config.json."""
    settings = Settings(raw, place)
    fields = llama.common(settings, max_positions=131072, kv_heads=8)
    settings.only("layer_types", None)
    # An absent key means transformers' default of 4096; null means no window.
    window = settings.get("sliding_window") if "sliding_window" in raw else 4096
    settings.only("attention_bias", False)
    config = DecoderConfig(**fields, **llama.rope_fields(settings, fields), family="mistral",
                           windows=(window or 0,) * fields["num_layers"])
    settings.finish()
    return config


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Mistral, in both spellings."""
    return {**llama.shape_keys(config), **write_rope(config), "sliding_window": config.layer_windows[0] or None}
