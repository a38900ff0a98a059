"""The shape of a decoder: one hashable record that covers every family the decoder computes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from alignax.types import ConfigError

NORMS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
POSITIONS = ("rope", "learned", "alibi")
PROJECTIONS = ("query", "key", "value", "output")
ROPE_SCALINGS = ("linear", "llama3", "yarn")

_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
           "max_positions")
_POSITIVE = ("rope_theta", "rms_norm_eps")
_POSITIVE_OR_NONE = ("local_rope_theta", "query_pre_attn_scalar", "attention_softcap", "final_softcap")
_FLAGS = ("tie_embeddings", "gated_mlp", "mlp_bias", "qk_norm", "post_norms", "parallel_residual", "scale_embedding",
          "norm_head")
_CHOICES = {"norm": NORMS, "activation": ACTIVATIONS, "positions": POSITIONS}


def _refuse(name: str, found: Any, allowed: str):
    raise ConfigError(f"{name}: found {found!r}, allowed: {allowed}")


def _positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of pretraining; see `rope.frequencies` for the formulas.

    kind: linear (factor only), llama3 (also low_freq_factor, high_freq_factor, original_max_positions) or yarn (also
    attention_factor, beta_fast, beta_slow, truncate, original_max_positions). Raises ConfigError on an impossible
    value.
    """

    kind: str
    factor: float
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            _refuse("RopeScaling.kind", self.kind, ", ".join(ROPE_SCALINGS))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
            if not _positive(getattr(self, name)):
                _refuse(f"RopeScaling.{name}", getattr(self, name), "a finite number > 0")
        if self.kind != "linear" and (not isinstance(self.original_max_positions, int)
                                      or self.original_max_positions < 1):
            _refuse("RopeScaling.original_max_positions", self.original_max_positions, "an integer >= 1")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            _refuse("RopeScaling.low_freq_factor", self.low_freq_factor,
                    f"less than high_freq_factor = {self.high_freq_factor}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so it can be a static argument of a jitted function.

    The defaults are Llama's. num_kv_heads divides num_heads; rotary_dim (None: head_dim) is even. tie_embeddings: the
    output matrix is the embedding. max_positions: the longest sequence of one segment that the model was made for;
    rotary and ALiBi positions are computed, so for them it is a promise to check against; learned positions
    have a table of this length.

    family: the Hugging Face model_type that `save` writes (see alignax.models.families).
    norm: rms (weight), rms_plus_one (1 + weight) or layer (weight and bias); rms_norm_eps serves all three.
    activation, gated_mlp: down(act(gate x) * up x), or down(act(up x)) where not gated.
    attention_bias: which of query, key, value, output have one. mlp_bias: all of the MLP's matrices, or none.
    qk_norm: an RMS norm of every query and key head before the rotation.
    positions: rope, learned (a table added to the embeddings) or alibi (arXiv 2108.12409).
    rope_scaling: None or a RopeScaling. local_rope_theta: an unscaled base of its own for the layers with a window.
    windows: () or one number per layer; 0 reads the whole segment, w > 0 the w latest positions, its own included.
    query_pre_attn_scalar: scores are divided by its square root (None: head_dim).
    attention_softcap, final_softcap: c tanh(x / c) of the scores and of the logits.
    post_norms: a norm after each branch, before it is added. parallel_residual: both branches read the same input.
    scale_embedding: embeddings times sqrt(hidden_size). norm_head: rows of the output matrix have length 1.

    Raises ConfigError on an impossible value.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 512
    family: str = "llama"
    norm: str = "rms"
    activation: str = "silu"
    gated_mlp: bool = True
    attention_bias: tuple[str, ...] = ()
    mlp_bias: bool = False
    qk_norm: bool = False
    positions: str = "rope"
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    windows: tuple[int, ...] = ()
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    parallel_residual: bool = False
    scale_embedding: bool = False
    norm_head: bool = False

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                _refuse(f"DecoderConfig.{name}", value, "an integer >= 1")
        for name in _POSITIVE + _POSITIVE_OR_NONE:
            value = getattr(self, name)
            if not _positive(value) and not (value is None and name in _POSITIVE_OR_NONE):
                _refuse(f"DecoderConfig.{name}", value, "a finite number > 0"
                        + (" or None" if name in _POSITIVE_OR_NONE else ""))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                _refuse(f"DecoderConfig.{name}", getattr(self, name), "True or False")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                _refuse(f"DecoderConfig.{name}", getattr(self, name), ", ".join(allowed))
        if not isinstance(self.attention_bias, tuple) or set(self.attention_bias) - set(PROJECTIONS):
            _refuse("DecoderConfig.attention_bias", self.attention_bias, f"a tuple of {', '.join(PROJECTIONS)}")
        if self.num_heads % self.num_kv_heads:
            _refuse("DecoderConfig.num_kv_heads", self.num_kv_heads, f"a divisor of num_heads = {self.num_heads}")
        if self.qk_norm and self.norm == "layer":
            _refuse("DecoderConfig.qk_norm", True, "False with norm = 'layer'")
        if self.norm_head and self.tie_embeddings:
            _refuse("DecoderConfig.norm_head", True, "False with tie_embeddings")
        self._check_positions()

    def _check_positions(self):
        """What concerns rotary positions and windows."""
        if self.positions == "rope":
            if self.rotary_dim is None and self.head_dim % 2:
                _refuse("DecoderConfig.head_dim", self.head_dim, "an even number (rotary positions turn pairs)")
            if self.rotary_dim is not None and (not isinstance(self.rotary_dim, int) or self.rotary_dim % 2
                                                or not 0 < self.rotary_dim <= self.head_dim):
                _refuse("DecoderConfig.rotary_dim", self.rotary_dim, f"None or an even number up to {self.head_dim}")
            if self.rotary_dim == self.head_dim:  # one spelling of one model: equality and hashes must agree
                object.__setattr__(self, "rotary_dim", None)
        else:
            for name in ("rotary_dim", "rope_scaling", "local_rope_theta"):
                if getattr(self, name) is not None:
                    _refuse(f"DecoderConfig.{name}", getattr(self, name), f"None with positions = {self.positions!r}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            _refuse("DecoderConfig.rope_scaling", self.rope_scaling, "None or a RopeScaling")
        whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not isinstance(self.windows, tuple) or len(self.windows) not in (0, self.num_layers) or not all(
                map(whole, self.windows)):
            _refuse("DecoderConfig.windows", self.windows, f"() or {self.num_layers} integers >= 0, one per layer")
        if not any(self.windows):
            object.__setattr__(self, "windows", ())
        if self.local_rope_theta is not None and not self.windows:
            _refuse("DecoderConfig.local_rope_theta", self.local_rope_theta, "None where no layer has a window")

    @property
    def score_scale(self) -> float:
        """What a product of query and key is multiplied by."""
        return 1 / math.sqrt(self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar)

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """One window per layer; 0 where a layer reads its whole segment."""
        return self.windows or (0,) * self.num_layers
