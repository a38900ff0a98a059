"""Models: the decoder, scalar heads, and Hugging Face folders in and out."""

from alignax.models.adapters import AdapterConfig, init_adapters, merge
from alignax.models.decoder import (
    REMAT,
    Decoder,
    DecoderConfig,
    Layer,
    LayerCache,
    abstract_params,
    attention_mask,
    decode_step,
    extend_cache,
    forward,
    head,
    init_cache,
    init_params,
    logits,
)
from alignax.models.heads import gather_last, init_scalar_head, last_token_positions, last_token_rewards, scalar_head
from alignax.models.hf import load, read_config, read_generation_ids, save

__all__ = [
    "AdapterConfig", "Decoder", "DecoderConfig", "Layer", "LayerCache", "REMAT", "abstract_params",
    "attention_mask", "decode_step", "extend_cache", "forward", "gather_last", "head", "init_adapters",
    "init_cache", "init_params", "init_scalar_head", "last_token_positions", "last_token_rewards", "load", "logits",
    "merge", "read_config", "read_generation_ids", "save", "scalar_head",
]
