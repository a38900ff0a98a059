"""GPT-2: learned positions, layer norms, a plain GELU MLP, biases, QKV in one matrix kept as [in, out].

The dropout rates of its config.json are not applied, in training either.
"""

from __future__ import annotations

from typing import Any

from alignax.models.config import PROJECTIONS, DecoderConfig
from alignax.models.families.llama import tensors as named
from alignax.models.families.settings import GELU, Settings
from alignax.models.families.slots import Slots, fused

TOP = {("embedding",): "transformer.wte.weight", ("positions",): "transformer.wpe.weight",
       ("norm",): "transformer.ln_f.weight", ("norm_bias",): "transformer.ln_f.bias", ("head",): "lm_head.weight"}
LAYER = {
    ("attention_norm",): ("ln_1.weight", False), ("attention_norm_bias",): ("ln_1.bias", False),
    ("attention", "output"): ("attn.c_proj.weight", False), ("attention", "output_bias"): ("attn.c_proj.bias", False),
    ("mlp_norm",): ("ln_2.weight", False), ("mlp_norm_bias",): ("ln_2.bias", False),
    ("mlp", "up"): ("mlp.c_fc.weight", False), ("mlp", "up_bias"): ("mlp.c_fc.bias", False),
    ("mlp", "down"): ("mlp.c_proj.weight", False), ("mlp", "down_bias"): ("mlp.c_proj.bias", False),
}
# The causal mask, which old exports store.
DERIVED = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
_QKV = ("query", "key", "value")


def tensors(config: DecoderConfig, shapes: Any) -> Slots:
    """The slots of a GPT-2."""
    table = named(config, shapes, TOP, LAYER, "transformer.h.")
    for number in range(config.num_layers):
        for suffix, end in (("", "weight"), ("_bias", "bias")):
            paths = [("layers", "attention", name + suffix) for name in _QKV]
            table[f"transformer.h.{number}.attn.c_attn.{end}"] = fused(shapes, paths, number, turned=False)
    return table


def read_config(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a GPT-2 config.json."""
    settings = Settings(raw, place)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        settings.only(key, False)
    heads, width = settings.need("n_head"), settings.need("n_embd")
    if width % heads:
        settings.refuse("n_head", heads, f"a divisor of n_embd = {width}")
    config = DecoderConfig(
        vocab_size=settings.need("vocab_size"), hidden_size=width,
        intermediate_size=settings.get("n_inner", 4 * width), num_layers=settings.need("n_layer"), num_heads=heads,
        num_kv_heads=heads, head_dim=width // heads, rms_norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=settings.get("tie_word_embeddings", True), max_positions=settings.get("n_positions", 1024),
        family="gpt2", norm="layer", activation=settings.choice("activation_function", GELU, "gelu_new"),
        gated_mlp=False, attention_bias=PROJECTIONS, mlp_bias=True, positions="learned",
        query_pre_attn_scalar=None if settings.get("scale_attn_weights", True) else 1.0)
    settings.finish()
    return config


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a GPT-2."""
    return {"vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_inner": config.intermediate_size,
            "n_layer": config.num_layers, "n_head": config.num_heads, "n_positions": config.max_positions,
            "n_ctx": config.max_positions, "layer_norm_epsilon": config.rms_norm_eps,
            "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
            "scale_attn_weights": config.query_pre_attn_scalar is None, "tie_word_embeddings": config.tie_embeddings,
            "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
