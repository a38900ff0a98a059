"""Qwen2 and 2.5 (biases on query, key and value; arXiv 2407.10671) and Qwen3 (norms of query and key heads; arXiv
2505.09388), both with an optional window from some layer on."""

from __future__ import annotations

from typing import Any

from alignax.models.config import DecoderConfig
from alignax.models.families import llama
from alignax.models.families.rope import write_rope
from alignax.models.families.settings import Settings
from alignax.models.families.windows import read_layer_types, write_layer_types


def _windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """One window per layer. sliding_window counts only with use_sliding_window; without layer_types, the layers from
    max_window_layers on have it."""
    window = settings.get("sliding_window", 4096)  # read even where it is off: configs hold a number all the same
    window = window if settings.get("use_sliding_window", False) else None
    first = settings.get("max_window_layers", 28)
    return read_layer_types(settings, layers, window, lambda number: window is not None and number >= first)


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    """layer_types for transformers 5 and max_window_layers for older releases."""
    types = write_layer_types(config)
    full = types["layer_types"].count("full_attention")
    return types | {"use_sliding_window": bool(config.windows), "max_window_layers": full}


def read_qwen2(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a Qwen2 or Qwen2.5 config.json."""
    settings = Settings(raw, place)
    fields = llama.common(settings, max_positions=32768, kv_heads=32)
    settings.only("use_mrope", False)
    settings.ignore("attention_bias")  # written by some exports; the biases are there whatever it says
    config = DecoderConfig(**fields, **llama.rope_fields(settings, fields), family="qwen2",
                           attention_bias=("query", "key", "value"), windows=_windows(settings, fields["num_layers"]))
    settings.finish()
    return config


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Qwen2, in both spellings."""
    return {**llama.shape_keys(config), **write_rope(config), **_write_windows(config)}


def read_qwen3(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a Qwen3 config.json."""
    settings = Settings(raw, place)
    fields = llama.common(settings, max_positions=32768, kv_heads=32, head_dim=128)
    config = DecoderConfig(
        **fields, **llama.rope_fields(settings, fields), family="qwen3", qk_norm=True,
        attention_bias=("query", "key", "value", "output") if settings.get("attention_bias", False) else (),
        windows=_windows(settings, fields["num_layers"]))
    settings.finish()
    return config


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Qwen3, in both spellings."""
    return {**llama.shape_keys(config), **write_rope(config), **_write_windows(config),
            "attention_bias": bool(config.attention_bias)}
