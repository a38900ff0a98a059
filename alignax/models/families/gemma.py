"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786).

Both have (1 + w) norms, before and after each branch, a tanh-GELU gate, scaled embeddings and layers with a window
between layers without. Gemma 2 caps scores and logits; Gemma 3 has norms of query and key heads instead, and rotates
the layers with a window by a base of their own.
"""

from __future__ import annotations

from typing import Any

from alignax.models.config import DecoderConfig
from alignax.models.families import llama
from alignax.models.families.rope import read_layered_rope, scaling_dict, write_rope
from alignax.models.families.settings import Settings
from alignax.models.families.windows import FULL, SLIDING, read_layer_types, write_layer_types

_GELU = {"gelu_pytorch_tanh": "gelu_tanh"}

LAYER = {**llama.LAYER,
         ("post_attention_norm",): ("post_attention_layernorm.weight", False),
         ("mlp_norm",): ("pre_feedforward_layernorm.weight", False),
         ("post_mlp_norm",): ("post_feedforward_layernorm.weight", False)}


def tensors(config: DecoderConfig, shapes: Any):
    """The slots of a Gemma 2 or 3."""
    return llama.tensors(config, shapes, layer=LAYER)


def _common(settings: Settings, max_positions: int) -> dict[str, Any]:
    """What both spell alike."""
    # The older key hidden_act stands beside hidden_activation in released files and must not say anything else.
    settings.only("hidden_act", settings.get("hidden_activation", "gelu_pytorch_tanh"))
    settings.only("use_bidirectional_attention", False)
    fields = llama.common(settings, activation_key="hidden_activation", activations=_GELU,
                          activation="gelu_pytorch_tanh", tied=True, max_positions=max_positions, kv_heads=4,
                          head_dim=256)
    biases = ("query", "key", "value", "output") if settings.get("attention_bias", False) else ()
    scalar = settings.number("query_pre_attn_scalar", 256.0)
    return fields | dict(norm="rms_plus_one", post_norms=True, scale_embedding=True, attention_bias=biases,
                         query_pre_attn_scalar=None if scalar == fields["head_dim"] else scalar)


def _cap(settings: Settings, key: str, absent: float | None) -> float | None:
    """A soft cap: the number, no cap for null, `absent` where the key is missing."""
    return settings.number(key) if key in settings.raw else absent


def _write(config: DecoderConfig) -> dict[str, Any]:
    """What both write alike."""
    scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    return {**llama.shape_keys(config, "hidden_activation", "gelu_pytorch_tanh"), **write_layer_types(config),
            "hidden_act": "gelu_pytorch_tanh", "attention_bias": bool(config.attention_bias),
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.final_softcap}


def read_gemma2(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a Gemma 2 config.json."""
    settings = Settings(raw, place)
    fields = _common(settings, 8192)
    windows = read_layer_types(settings, fields["num_layers"], settings.get("sliding_window", 4096),
                               lambda number: number % 2 == 0)
    config = DecoderConfig(
        **fields, **llama.rope_fields(settings, fields), family="gemma2", windows=windows,
        attention_softcap=_cap(settings, "attn_logit_softcapping", 50.0),
        final_softcap=_cap(settings, "final_logit_softcapping", 30.0))
    settings.finish(known=("sliding_window_size",))
    return config


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Gemma 2, in both spellings."""
    return {**_write(config), **write_rope(config)}


def read_gemma3(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of the config.json of a Gemma 3 text model."""
    settings = Settings(raw, place)
    fields = _common(settings, 131072)
    # transformers stores this cap and does not apply it, so a number here has no meaning to agree on.
    settings.only("attn_logit_softcapping", None)
    period = settings.get("sliding_window_pattern", settings.get("_sliding_window_pattern", 6))
    windows = read_layer_types(settings, fields["num_layers"], settings.get("sliding_window", 4096),
                               lambda number: (number + 1) % period != 0)
    whole, local = read_layered_rope(settings, fields["max_positions"], theta=1e6, local_theta=1e4)
    config = DecoderConfig(
        **fields, family="gemma3_text", windows=windows, qk_norm=True, rope_theta=whole.theta,
        rope_scaling=whole.scaling, local_rope_theta=local.theta if any(windows) else None,
        final_softcap=_cap(settings, "final_logit_softcapping", None))
    settings.finish()
    return config


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Gemma 3 text model, in both spellings."""
    scaling, local = scaling_dict(config.rope_scaling), config.local_rope_theta or 1e4
    return {**_write(config), "rope_theta": config.rope_theta, "rope_local_base_freq": local,
            "rope_scaling": None if config.rope_scaling is None else scaling,
            "rope_parameters": {FULL: scaling | {"rope_theta": config.rope_theta},
                                SLIDING: {"rope_type": "default", "rope_theta": local}}}
