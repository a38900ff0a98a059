"""The parts of a decoder as flax NNX modules: norms, projections, attention, MLP, one layer.

Every linear layer of every family goes through `linear`, so that an adapter works on any of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from alignax.models.attention import alibi_bias, attend, attend_cached
from alignax.models.config import DecoderConfig
from alignax.models.readers import Reader, read
from alignax.models.rope import rotate
from alignax.types import Array

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, num_kv_heads, S, head_dim] each; slot s holds the s-th token of the row."""

    key: Array
    value: Array


class View(NamedTuple):
    """What one kind of layer sees of positions: rotary cos and sin (None: no rotation), who may read whom (bool
    [R,T,S]), for ALiBi how far back each key lies (int32 [R,T,S], else None), and for whole rows the kernel that reads
    by that mask (None against a cache: attention.attend). flat: whether [R,T] may become one axis, which it may not
    where a mesh cuts T."""

    cos: Array | None
    sin: Array | None
    mask: Array
    distance: Array | None
    reader: Reader | None = None
    flat: bool = True


def full_dtype(dtype) -> jnp.dtype:
    """float32, or wider where the input is wider: what norms, rotations and softmax are computed in."""
    return jnp.promote_types(jnp.float32, dtype)


def widen(vector: Array, ndim: int) -> Array:
    """A vector [D] as [1, ..., 1, D] of `ndim` axes: broadcasting is spelled out everywhere."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def linear(x: Array, weight: Array, bias: Array | None = None, adapter: dict[str, Array] | None = None, *,
           flat: bool = True) -> Array:
    """x [..., in] @ weight [in, out] + (x @ a) @ b + bias [out], in the dtype of x @ weight.

    adapter: None or {"a": [in, r], "b": [r, out]}; any scaling is part of b. With b = 0 the result is x @ weight + bias
    to the bit. flat: the leading axes are one axis while matrices are multiplied. The same numbers; but the gradient of
    the weight is then a product of two matrices, for which XLA's CPU backend transposes the narrower x and not the
    cotangent (a fifth of a backward pass).
    """
    lead = x.shape[:-1]
    if flat:
        x = x.reshape(-1, x.shape[-1])
    out = jnp.matmul(x, weight)
    if adapter is not None:
        out = out + jnp.matmul(jnp.matmul(x, adapter["a"]), adapter["b"]).astype(out.dtype)
    out = out if bias is None else out + widen(bias, out.ndim)
    return out.reshape(*lead, out.shape[-1])


def normalise(config: DecoderConfig, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """The family's norm over the last axis, in float32, returned in x's dtype.

    rms: weight x / sqrt(mean(x^2) + eps) (arXiv 1910.07467); rms_plus_one: 1 + weight in its place; layer:
    weight (x - mean) / sqrt(var + eps) + bias (arXiv 1607.06450).
    """
    wide = x.astype(full_dtype(x.dtype))
    weight = widen(weight.astype(wide.dtype), x.ndim)
    if config.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.rms_norm_eps)
    if config.norm == "rms_plus_one":
        weight = 1 + weight
    out = wide * scale * weight
    if bias is not None:
        out = out + widen(bias.astype(wide.dtype), x.ndim)
    return out.astype(x.dtype)


def _dense(key: Array, shape: tuple[int, int], dtype, scale: float = 1.0) -> nnx.Param:
    """A weight [in, out] with variance scale^2 / in."""
    wide = full_dtype(dtype)
    return nnx.Param((jax.random.normal(key, shape, wide) * (scale * shape[0] ** -0.5)).astype(dtype))


def add_norm(module: nnx.Module, name: str, config: DecoderConfig, width: int, dtype) -> None:
    """Gives `module` the neutral norm `name` (and name_bias for layer norms)."""
    neutral = jnp.zeros if config.norm == "rms_plus_one" else jnp.ones
    setattr(module, name, nnx.Param(neutral((width,), dtype)))
    if config.norm == "layer":
        setattr(module, f"{name}_bias", nnx.Param(jnp.zeros((width,), dtype)))


def _leaf(module: nnx.Module, name: str) -> Array | None:
    """The array of a parameter that a module may lack."""
    found = getattr(module, name, None)
    return None if found is None else found[...]


def _project(module: nnx.Module, name: str, x: Array, adapters: dict[str, Any] | None, flat: bool) -> Array:
    """`linear` with the module's matrix `name`, its bias and its adapter, where it has them."""
    return linear(x, getattr(module, name)[...], _leaf(module, f"{name}_bias"), (adapters or {}).get(name),
                  flat=flat)


def _norm(module: nnx.Module, name: str, x: Array) -> Array:
    """`normalise` with the module's norm `name`."""
    return normalise(module.config, x, getattr(module, name)[...], _leaf(module, f"{name}_bias"))


def _put(kept: Array, new: Array, index) -> Array:
    """kept [R,G,S,h] with new [R,T,G,h] at slots index .. index+T-1 of every row; index: a number, or one per row."""
    new = jnp.swapaxes(new, 1, 2).astype(kept.dtype)
    if jnp.ndim(index) == 0:
        return jax.lax.dynamic_update_slice(kept, new, (0, 0, index, 0))
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (0, at, 0)))(kept, new, index)


class Attention(nnx.Module):
    """Grouped-query attention: query [D, H*h], key and value [D, G*h], output [H*h, D]."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        keys = jax.random.split(key, 4)
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.config = config
        self.query = _dense(keys[0], (config.hidden_size, wide), dtype)
        self.key = _dense(keys[1], (config.hidden_size, narrow), dtype)
        self.value = _dense(keys[2], (config.hidden_size, narrow), dtype)
        # Both branches of a layer write to the residual stream: keep its variance independent of depth.
        self.output = _dense(keys[3], (wide, config.hidden_size), dtype, (2 * config.num_layers) ** -0.5)
        widths = {"query": wide, "key": narrow, "value": narrow, "output": config.hidden_size}
        for name in config.attention_bias:
            setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((widths[name],), dtype)))
        if config.qk_norm:
            add_norm(self, "query_norm", config, config.head_dim, dtype)
            add_norm(self, "key_norm", config, config.head_dim, dtype)

    def __call__(self, x, view: View, adapters=None, cache: LayerCache | None = None, index=0):
        """x [R,T,D] -> ([R,T,D], cache). Without a cache S = T; with one, the new keys and values are written at slots
        index .. index+T-1 (index: a number, or int32 [R]) and all S slots of the cache are read. Softmax in
        float32."""
        config = self.config
        heads = (*x.shape[:2], -1, config.head_dim)
        query, key, value = (_project(self, name, x, adapters, view.flat).reshape(heads)
                             for name in ("query", "key", "value"))
        if config.qk_norm:
            query, key = _norm(self, "query_norm", query), _norm(self, "key_norm", key)
        if view.cos is not None:
            query, key = rotate(query, view.cos, view.sin), rotate(key, view.cos, view.sin)
        if cache is not None:
            cache = LayerCache(_put(cache.key, key, index), _put(cache.value, value, index))
        # Made in the layer that uses it: kept for all layers, it would be an array of the size of the scores.
        bias = None if view.distance is None else alibi_bias(config.num_heads, view.distance, query.dtype)
        settings = dict(scale=config.score_scale, softcap=config.attention_softcap, bias=bias)
        if cache is not None:
            out = attend_cached(query, *cache, view.mask, **settings)
        elif view.reader is None:
            out = attend(query, key, value, view.mask, **settings)
        else:
            out = read(view.reader, query, key, value, **settings)
        return _project(self, "output", out.reshape(*x.shape[:2], -1), adapters, view.flat), cache


class Mlp(nnx.Module):
    """down(act(gate x) * up x), or down(act(up x)) where not gated (arXiv 2002.05202); gate, up [D, F], down [F, D]."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        wide, narrow = config.intermediate_size, config.hidden_size
        self.config = config
        if config.gated_mlp:
            self.gate = _dense(keys[0], (narrow, wide), dtype)
        self.up = _dense(keys[1], (narrow, wide), dtype)
        self.down = _dense(keys[2], (wide, narrow), dtype, (2 * config.num_layers) ** -0.5)
        if config.mlp_bias:
            if config.gated_mlp:
                self.gate_bias = nnx.Param(jnp.zeros((wide,), dtype))
            self.up_bias = nnx.Param(jnp.zeros((wide,), dtype))
            self.down_bias = nnx.Param(jnp.zeros((narrow,), dtype))

    def __call__(self, x, adapters=None, edit=None, flat=True):
        """[R,T,D] -> [R,T,D]; flat: see View; edit: None, or a function of what enters `down` [R,T,F] whose result
        enters instead."""
        act = _ACTIVATIONS[self.config.activation]
        if self.config.gated_mlp:
            inner = act(_project(self, "gate", x, adapters, flat)) * _project(self, "up", x, adapters, flat)
        else:
            inner = act(_project(self, "up", x, adapters, flat))
        return _project(self, "down", inner if edit is None else edit(inner), adapters, flat)


class Layer(nnx.Module):
    """One pre-norm block: x + attention(norm x), then x + mlp(norm x); see DecoderConfig for the variants."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        first, second = jax.random.split(key)
        self.config = config
        names = ("attention_norm", "mlp_norm") + (("post_attention_norm", "post_mlp_norm") if config.post_norms else ())
        for name in names:
            add_norm(self, name, config, config.hidden_size, dtype)
        self.attention = Attention(config, first, dtype)
        self.mlp = Mlp(config, second, dtype)

    def __call__(self, x, view: View, adapters=None, cache: LayerCache | None = None, index=0, edit=None):
        """x [R,T,D] -> ([R,T,D], cache); see Attention and, for edit, Mlp."""
        adapters = adapters or {}
        out, cache = self.attention(_norm(self, "attention_norm", x), view, adapters.get("attention"), cache, index)
        if self.config.post_norms:
            out = _norm(self, "post_attention_norm", out)
        source = x if self.config.parallel_residual else x + out
        inner = self.mlp(_norm(self, "mlp_norm", source), adapters.get("mlp"), edit, view.flat)
        if self.config.post_norms:
            inner = _norm(self, "post_mlp_norm", inner)
        return (x + out if self.config.parallel_residual else source) + inner, cache
