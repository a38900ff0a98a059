"""Baichuan 2 (arXiv 2309.10305) and Baichuan 1: a Llama with QKV in one matrix, whose 7B model turns (RoPE) and whose
13B model has ALiBi; the second generation divides the rows of the output matrix by their length.

The released config.json says neither. Widths 4096 and 5120 (7B, 13B) and vocabularies 125,696 and 64,000 (second and
first generation) settle it; for any other size config.json must hold the keys `position_embedding` (rope or alibi) and
`norm_head` (true or false), which `save` writes.
"""

from __future__ import annotations

from typing import Any

from alignax.models.config import DecoderConfig
from alignax.models.families import llama
from alignax.models.families.rope import write_rope
from alignax.models.families.settings import Settings
from alignax.models.families.slots import Slots, fused

_QKV = ("query", "key", "value")
LAYER = {path: name for path, name in llama.LAYER.items() if path[-1] not in _QKV}
_POSITIONS_BY_WIDTH = {4096: "rope", 5120: "alibi"}
_NORM_HEAD_BY_VOCABULARY = {125_696: True, 64_000: False}


def tensors(config: DecoderConfig, shapes: Any) -> Slots:
    """The slots of a Baichuan: W_pack holds query, key and value after each other."""
    table = llama.tensors(config, shapes, layer=LAYER)
    for number in range(config.num_layers):
        paths = [("layers", "attention", name) for name in _QKV]
        table[f"model.layers.{number}.self_attn.W_pack.weight"] = fused(shapes, paths, number, turned=True)
    return table


def _settled(settings: Settings, key: str, table: dict[int, Any], by: str, size: int, allowed: tuple) -> Any:
    """The value of `key`, or what `table` says of `size`; refused where neither settles it."""
    found = settings.get(key, table.get(size))
    if found not in allowed:
        settings.refuse(key, found, f"{' or '.join(map(repr, allowed))} (required where {by} is not one of "
                        f"{', '.join(map(str, table))})")
    return found


def read_config(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a Baichuan config.json."""
    settings = Settings(raw, place)
    fields = llama.common(settings, max_positions=settings.get("model_max_length", 4096))
    if fields["num_kv_heads"] != fields["num_heads"]:
        settings.refuse("num_key_value_heads", fields["num_kv_heads"], f"num_attention_heads = {fields['num_heads']}")
    positions = _settled(settings, "position_embedding", _POSITIONS_BY_WIDTH, "hidden_size", fields["hidden_size"],
                         ("rope", "alibi"))
    norm_head = _settled(settings, "norm_head", _NORM_HEAD_BY_VOCABULARY, "vocab_size", fields["vocab_size"],
                         (True, False))
    rope = llama.rope_fields(settings, fields) if positions == "rope" else {}
    config = DecoderConfig(**fields, **rope, family="baichuan", positions=positions, norm_head=norm_head)
    settings.finish()
    return config


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Baichuan."""
    return {**llama.shape_keys(config), **(write_rope(config) if config.positions == "rope" else {}),
            "model_max_length": config.max_positions, "position_embedding": config.positions,
            "norm_head": config.norm_head}
