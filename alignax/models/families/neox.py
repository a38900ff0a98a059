"""GPT-NeoX and Pythia: both branches of a layer read the same input, part of each head turns, QKV is one matrix that
holds query, key and value of one head after the other (arXiv 2204.06745)."""

from __future__ import annotations

from typing import Any

from alignax.models.config import PROJECTIONS, DecoderConfig
from alignax.models.families.llama import tensors as named
from alignax.models.families.rope import read_rope, write_rope
from alignax.models.families.settings import GELU, Settings
from alignax.models.families.slots import Slots, fused

TOP = {("embedding",): "gpt_neox.embed_in.weight", ("norm",): "gpt_neox.final_layer_norm.weight",
       ("norm_bias",): "gpt_neox.final_layer_norm.bias", ("head",): "embed_out.weight"}
LAYER = {
    ("attention_norm",): ("input_layernorm.weight", False), ("attention_norm_bias",): ("input_layernorm.bias", False),
    ("attention", "output"): ("attention.dense.weight", True),
    ("attention", "output_bias"): ("attention.dense.bias", False),
    ("mlp_norm",): ("post_attention_layernorm.weight", False),
    ("mlp_norm_bias",): ("post_attention_layernorm.bias", False),
    ("mlp", "up"): ("mlp.dense_h_to_4h.weight", True), ("mlp", "up_bias"): ("mlp.dense_h_to_4h.bias", False),
    ("mlp", "down"): ("mlp.dense_4h_to_h.weight", True), ("mlp", "down_bias"): ("mlp.dense_4h_to_h.bias", False),
}
# The causal mask and the rotary frequencies, which old exports store.
DERIVED = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
_QKV = ("query", "key", "value")


def tensors(config: DecoderConfig, shapes: Any) -> Slots:
    """The slots of a GPT-NeoX."""
    table = named(config, shapes, TOP, LAYER, "gpt_neox.layers.")
    for number in range(config.num_layers):
        place = f"gpt_neox.layers.{number}.attention.query_key_value"
        for suffix, end in (("", "weight"), ("_bias", "bias"))[:2 if config.attention_bias else 1]:
            paths = [("layers", "attention", name + suffix) for name in _QKV]
            table[f"{place}.{end}"] = fused(shapes, paths, number, turned=not suffix, heads=config.num_heads)
    return table


def read_config(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a GPT-NeoX config.json."""
    settings = Settings(raw, place)
    heads, width = settings.need("num_attention_heads"), settings.need("hidden_size")
    if width % heads:
        settings.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {width}")
    longest = settings.get("max_position_embeddings", 2048)
    rope = read_rope(settings, longest, theta_key="rotary_emb_base", partial_key="rotary_pct", partial=0.25)
    config = DecoderConfig(
        vocab_size=settings.need("vocab_size"), hidden_size=width,
        intermediate_size=settings.need("intermediate_size"), num_layers=settings.need("num_hidden_layers"),
        num_heads=heads, num_kv_heads=heads, head_dim=width // heads, rope_theta=rope.theta,
        rms_norm_eps=settings.get("layer_norm_eps", 1e-5), tie_embeddings=settings.get("tie_word_embeddings", False),
        max_positions=longest, family="gpt_neox", norm="layer",
        activation=settings.choice("hidden_act", GELU, "gelu"), gated_mlp=False,
        attention_bias=PROJECTIONS if settings.get("attention_bias", True) else (), mlp_bias=True,
        rotary_dim=int(width // heads * rope.partial), rope_scaling=rope.scaling,
        parallel_residual=settings.get("use_parallel_residual", True))
    settings.finish()
    return config


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a GPT-NeoX, in both spellings."""
    share = (config.rotary_dim or config.head_dim) / config.head_dim
    rope = write_rope(config, theta_key="rotary_emb_base")
    rope["rope_parameters"]["partial_rotary_factor"] = share
    return {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "max_position_embeddings": config.max_positions,
            "layer_norm_eps": config.rms_norm_eps, "hidden_act": "gelu" if config.activation == "gelu" else "gelu_new",
            "attention_bias": bool(config.attention_bias), "use_parallel_residual": config.parallel_residual,
            "tie_word_embeddings": config.tie_embeddings, "rotary_pct": share, **rope}
