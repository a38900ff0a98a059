"""Llama 2 and 3.x, and what other families share with them: the names and the keys of a Llama-shaped model."""

from __future__ import annotations

from typing import Any

from alignax.models.config import DecoderConfig
from alignax.models.families.rope import read_rope, write_rope
from alignax.models.families.settings import SILU, Settings
from alignax.models.families.slots import Slots, has_leaf, single

TOP = {("embedding",): "model.embed_tokens.weight", ("norm",): "model.norm.weight", ("head",): "lm_head.weight"}

# Our path inside a layer -> (the name after "model.layers.N.", whether torch's [out, in] is turned). A model has those
# that its config asks for.
LAYER = {
    ("attention_norm",): ("input_layernorm.weight", False),
    ("attention", "query"): ("self_attn.q_proj.weight", True),
    ("attention", "key"): ("self_attn.k_proj.weight", True),
    ("attention", "value"): ("self_attn.v_proj.weight", True),
    ("attention", "output"): ("self_attn.o_proj.weight", True),
    ("attention", "query_bias"): ("self_attn.q_proj.bias", False),
    ("attention", "key_bias"): ("self_attn.k_proj.bias", False),
    ("attention", "value_bias"): ("self_attn.v_proj.bias", False),
    ("attention", "output_bias"): ("self_attn.o_proj.bias", False),
    ("attention", "query_norm"): ("self_attn.q_norm.weight", False),
    ("attention", "key_norm"): ("self_attn.k_norm.weight", False),
    ("mlp_norm",): ("post_attention_layernorm.weight", False),
    ("mlp", "gate"): ("mlp.gate_proj.weight", True),
    ("mlp", "up"): ("mlp.up_proj.weight", True),
    ("mlp", "down"): ("mlp.down_proj.weight", True),
    ("mlp", "gate_bias"): ("mlp.gate_proj.bias", False),
    ("mlp", "up_bias"): ("mlp.up_proj.bias", False),
    ("mlp", "down_bias"): ("mlp.down_proj.bias", False),
}

# Old exports store the rotary frequencies beside the weights; they follow from the config and carry no information.
DERIVED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def tensors(config: DecoderConfig, shapes: Any, top=TOP, layer=LAYER, prefix: str = "model.layers.") -> Slots:
    """The slots of every name whose path the parameters hold."""
    table = {name: single(shapes, path) for path, name in top.items() if has_leaf(shapes, path)}
    for number in range(config.num_layers):
        for path, (name, turned) in layer.items():
            if has_leaf(shapes, ("layers", *path)):
                table[f"{prefix}{number}.{name}"] = single(shapes, ("layers", *path), number, turned=turned)
    return table


def common(settings: Settings, *, activation_key: str = "hidden_act", activations=SILU, activation: str = "silu",
           eps: float = 1e-6, tied: bool = False, max_positions: int = 2048, kv_heads: int | None = None,
           head_dim: int | None = None) -> dict[str, Any]:
    """The DecoderConfig fields that every Llama-shaped config.json spells alike; absent keys mean the given values.

    num_key_value_heads null means as many as heads, head_dim null hidden_size over heads (in transformers as well).
    """
    heads, width = settings.need("num_attention_heads"), settings.need("hidden_size")
    absent = {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    given = {key: settings.get(key, None if key in settings.raw else absent[key]) for key in absent}
    return dict(
        vocab_size=settings.need("vocab_size"), hidden_size=width,
        intermediate_size=settings.need("intermediate_size"), num_layers=settings.need("num_hidden_layers"),
        num_heads=heads, num_kv_heads=given["num_key_value_heads"] or heads,
        head_dim=given["head_dim"] or width // heads,
        activation=settings.choice(activation_key, activations, activation),
        rms_norm_eps=settings.get("rms_norm_eps", eps), tie_embeddings=settings.get("tie_word_embeddings", tied),
        max_positions=settings.get("max_position_embeddings", max_positions))


def rope_fields(settings: Settings, fields: dict[str, Any], **defaults) -> dict[str, Any]:
    """rope_theta and rope_scaling of a family whose heads turn as a whole, with one kind of rotation."""
    rope = read_rope(settings, fields["max_positions"], **defaults)
    if rope.partial != 1.0:
        settings.refuse("partial_rotary_factor", rope.partial, "1.0")
    return dict(rope_theta=rope.theta, rope_scaling=rope.scaling)


def shape_keys(config: DecoderConfig, activation_key: str = "hidden_act", activation: str = "silu") -> dict[str, Any]:
    """The keys that `common` reads."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps, activation_key: activation, "tie_word_embeddings": config.tie_embeddings}


def read_config(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a Llama config.json."""
    settings = Settings(raw, place)
    fields = common(settings)
    for key in ("sliding_window", "layer_types"):
        settings.only(key, None)
    settings.only("rope_interleaved", False)
    config = DecoderConfig(
        **fields, **rope_fields(settings, fields), family="llama",
        attention_bias=("query", "key", "value", "output") if settings.get("attention_bias", False) else (),
        mlp_bias=settings.get("mlp_bias", False))
    settings.finish()
    return config


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Llama, in both spellings."""
    return {**shape_keys(config), **write_rope(config), "attention_bias": bool(config.attention_bias),
            "mlp_bias": config.mlp_bias}
