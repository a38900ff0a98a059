"""Models: the decoder and its families, scalar heads, adapters, and Hugging Face folders in and out."""

from alignax.models.adapters import AdapterConfig, init_adapters, merge
from alignax.models.attention import attend, attention_mask
from alignax.models.config import DecoderConfig, RopeScaling
from alignax.models.decoder import (
    Decoder,
    abstract_params,
    decode_step,
    extend_cache,
    forward,
    forward_edited,
    head,
    init_cache,
    init_params,
    layers_apart,
    logits,
)
from alignax.models.families import FAMILIES
from alignax.models.files import TensorReader, open_tensors, write_tensors
from alignax.models.heads import gather_last, init_scalar_head, last_token_positions, last_token_rewards, scalar_head
from alignax.models.hf import (
    COMPANIONS,
    NATIVE,
    check_target,
    copy_companions,
    describe,
    load,
    read_config,
    read_generation_ids,
    save,
    saved_dtype,
    staged,
)
from alignax.models.hub import resolve
from alignax.models.layers import Layer, LayerCache, linear
from alignax.models.readers import ATTENTION, choose_attention, in_loops
from alignax.models.remat import OFFLOADED, REMAT, check_remat
from alignax.models.token_heads import init_heads

__all__ = [
    "ATTENTION", "AdapterConfig", "COMPANIONS", "Decoder", "DecoderConfig", "FAMILIES", "Layer", "LayerCache",
    "NATIVE", "OFFLOADED", "REMAT", "RopeScaling", "TensorReader", "abstract_params", "attend", "attention_mask",
    "check_remat", "check_target", "choose_attention", "copy_companions", "decode_step", "describe", "extend_cache",
    "forward", "forward_edited", "gather_last", "head", "in_loops", "init_adapters", "init_cache", "init_heads",
    "init_params", "init_scalar_head", "last_token_positions", "last_token_rewards", "layers_apart", "linear", "load",
    "logits", "merge", "open_tensors", "read_config", "read_generation_ids", "resolve", "save", "saved_dtype",
    "scalar_head", "staged", "write_tensors",
]
