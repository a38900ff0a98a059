"""A Llama-shaped decoder: flax NNX modules behind a functional boundary.

Parameters are a plain nested dict of arrays that the caller holds (the pure dict of the module's state), with the
layers stacked on a leading axis; every function here takes `(config, params, ...)` and is pure, so `jax.jit`, `grad`
and sharding rules see arrays and paths such as `layers/attention/query` only. Training scans the stacked layers
(optionally rematerialised); decoding unrolls them in Python with one key and one value array per layer.

The architecture is that of Llama (arXiv 2302.13971) with grouped queries (arXiv 2305.13245): pre-norm RMSNorm
(arXiv 1910.07467), rotary positions in the half-split convention (arXiv 2104.09864), SwiGLU (arXiv 2002.05202).
Left out: biases, sliding windows, scaled rotary positions, dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alignax.ops.head import Head
from alignax.types import Array, ConfigError

Params = dict[str, Any]

REMAT = ("none", "full", "dots")
_EMBEDDING_STD = 0.02


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so it can be a static argument of a jitted function.

    num_kv_heads divides num_heads; head_dim is even (rotary halves). tie_embeddings: the output matrix is the
    embedding. max_positions: the longest sequence of one segment that the model was made for; positions are computed,
    not looked up, so this is a promise to check against, not a table size. Raises ConfigError on an impossible value.
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

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"DecoderConfig.{name}: found {value!r}, allowed: an integer >= 1")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"DecoderConfig.{name}: found {value!r}, allowed: a finite number > 0")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"DecoderConfig.tie_embeddings: found {self.tie_embeddings!r}, allowed: True or False")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"DecoderConfig.num_kv_heads: found {self.num_kv_heads}, allowed: a divisor of "
                              f"num_heads = {self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"DecoderConfig.head_dim: found {self.head_dim}, allowed: an even number "
                              "(rotary positions turn pairs)")


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, num_kv_heads, head_dim] each; slot s holds the s-th token of the row."""

    key: Array
    value: Array


def _full(dtype) -> jnp.dtype:
    """float32, or wider where the input is wider: what norms, rotations and softmax are computed in."""
    return jnp.promote_types(jnp.float32, dtype)


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in float32, returned in x's dtype."""
    wide = x.astype(_full(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = weight.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (wide * scale * weight).astype(x.dtype)


def _rotary(config: DecoderConfig, position: Array, dtype) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, [R, T, 1, head_dim / 2], for integer positions [R, T]."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequency = jnp.asarray(config.rope_theta ** -exponent, _full(dtype)).reshape(1, 1, 1, -1)
    angle = position.astype(frequency.dtype)[:, :, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x_i, x_{i + head_dim/2}) of x [R, T, heads, head_dim] by their angles."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _dense(key: Array, shape: tuple[int, int], dtype, scale: float = 1.0) -> nnx.Param:
    """A weight [in, out] with variance scale^2 / in."""
    wide = _full(dtype)
    return nnx.Param((jax.random.normal(key, shape, wide) * (scale * shape[0] ** -0.5)).astype(dtype))


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

    def __call__(self, x, cos, sin, mask, cache: LayerCache | None = None, index=0):
        """x [R,T,D], mask [R,T,S] -> ([R,T,D], cache). Without a cache S = T; with one, the new keys and values are
        written at slots index .. index+T-1 and all S slots of the cache are read. Softmax in float32."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        query = _rotate(jnp.matmul(x, self.query[...]).reshape(heads), cos, sin)
        key = _rotate(jnp.matmul(x, self.key[...]).reshape(heads), cos, sin)
        value = jnp.matmul(x, self.value[...]).reshape(heads)
        if cache is not None:
            start = (0, index, 0, 0)
            key = jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), start)
            value = jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), start)
            cache = LayerCache(key, value)
        # A row with nothing to attend to gets a finite constant in every slot, hence uniform weights: finite values
        # and gradients on padding, which no mask ever reads.
        out = jax.nn.dot_product_attention(query, key.astype(query.dtype), value.astype(query.dtype),
                                           mask=mask[:, None], implementation="xla")
        return jnp.matmul(out.reshape(*x.shape[:2], -1), self.output[...]), cache


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x); gate and up [D, F], down [F, D]."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.gate = _dense(keys[0], (config.hidden_size, config.intermediate_size), dtype)
        self.up = _dense(keys[1], (config.hidden_size, config.intermediate_size), dtype)
        self.down = _dense(keys[2], (config.intermediate_size, config.hidden_size), dtype,
                           (2 * config.num_layers) ** -0.5)

    def __call__(self, x):
        """[R,T,D] -> [R,T,D]."""
        gated = jax.nn.silu(jnp.matmul(x, self.gate[...])) * jnp.matmul(x, self.up[...])
        return jnp.matmul(gated, self.down[...])


class Layer(nnx.Module):
    """One pre-norm block: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        first, second = jax.random.split(key)
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.attention = Attention(config, first, dtype)
        self.mlp_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.mlp = Mlp(config, second, dtype)

    def __call__(self, x, cos, sin, mask, cache: LayerCache | None = None, index=0):
        """x [R,T,D], mask [R,T,S] -> ([R,T,D], cache); see Attention."""
        eps = self.config.rms_norm_eps
        out, cache = self.attention(_rms_norm(x, self.attention_norm[...], eps), cos, sin, mask, cache, index)
        x = x + out
        return x + self.mlp(_rms_norm(x, self.mlp_norm[...], eps)), cache


class Decoder(nnx.Module):
    """The whole model; `layers` is one Layer whose parameters carry a leading axis num_layers."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        embedding, layers, output = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        draw = lambda k: (jax.random.normal(k, shape, _full(dtype)) * _EMBEDDING_STD).astype(dtype)
        self.embedding = nnx.Param(draw(embedding))
        self.layers = nnx.vmap(lambda k: Layer(config, k, dtype))(jax.random.split(layers, config.num_layers))
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.head = nnx.Param(draw(output))


def init_params(config: DecoderConfig, key: Array, dtype=jnp.float32) -> Params:
    """Fresh parameters: a nested dict of `dtype` arrays.

    embedding [V,D], norm [D], head [V,D] (untied only), and layers/{attention_norm, attention/{query,key,value,
    output}, mlp_norm, mlp/{gate,up,down}} with a leading axis num_layers. Matrices are [in, out] with variance 1/in,
    divided by 2 num_layers where they write to the residual stream; embeddings have standard deviation 0.02.
    """
    return nnx.to_pure_dict(nnx.split(Decoder(config, key, dtype))[1])


def abstract_params(config: DecoderConfig, dtype=jnp.float32) -> Params:
    """The tree of jax.ShapeDtypeStruct that init_params would fill; nothing is computed."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


@functools.lru_cache(maxsize=64)
def _layer_graph(config: DecoderConfig):
    """The static half of one Layer; merged with arrays at trace time, so it costs nothing per step."""
    return nnx.split(nnx.eval_shape(lambda: Layer(config, jax.random.key(0))))[0]


def _merge_layer(config: DecoderConfig, params: Params) -> Layer:
    return nnx.merge(_layer_graph(config), nnx.State(params))


def attention_mask(segment: Array, prefix: Array) -> Array:
    """bool [R,T,T]: token i may read j iff j <= i, segment[j] > 0 and segment[j] is segment[i] or prefix[i]."""
    columns = jnp.arange(segment.shape[-1])
    causal = columns[None, :] <= columns[:, None]
    other = segment[:, None, :]
    related = (other == segment[:, :, None]) | (other == prefix[:, :, None])
    return causal[None] & (other > 0) & related


def forward(config: DecoderConfig, params: Params, tokens: Array, segment: Array, prefix: Array, position: Array, *,
            remat: str = "none", unroll: int = 1) -> Array:
    """Hidden states after the final norm, [R,T,D] in the parameters' dtype, of int32 grids [R,T].

    Layers run in a `lax.scan`. remat: `none` keeps every intermediate; `full` keeps only each layer's input; `dots`
    also keeps the results of weight products. unroll: layers per turn of the loop; on CPUs a loop of tiny layers costs
    more than its body, and unroll = num_layers leaves no loop. Attention follows attention_mask; where segment is 0 the
    result is finite and means nothing. Memory of attention is R * num_heads * T^2. Raises ConfigError for an unknown
    remat.
    """
    if remat not in REMAT:
        raise ConfigError(f"forward(remat=): found {remat!r}, allowed: {', '.join(REMAT)}")
    x = jnp.take(params["embedding"], tokens, axis=0)
    cos, sin = _rotary(config, position, x.dtype)
    mask = attention_mask(segment, prefix)

    def body(x, layer_params):
        return _merge_layer(config, layer_params)(x, cos, sin, mask)[0], None

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        # Inside a scan the compiler cannot merge the recomputation with the first pass, so the guard is not needed.
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, params["layers"], unroll=min(unroll, config.num_layers))
    return _rms_norm(x, params["norm"], config.rms_norm_eps)


def head(config: DecoderConfig, params: Params) -> Head:
    """The output head: the embedding itself where tied (gradients then flow into both uses), else params["head"]."""
    return Head(weight=params["embedding"] if config.tie_embeddings else params["head"], bias=None, softcap=None)


def logits(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """Next-token logits [..., V] in float32 (or wider) of hidden [..., D]; for decoding and tests.

    Training never calls this: it goes through the chunked head, which does not keep a vocabulary axis.
    """
    weight = head(config, params).weight
    # The precisions of the chunked head, so that a sampler and the trainer agree: exact products of bfloat16, no
    # reduced-precision shortcut for float32 where the device has one.
    narrow = hidden.dtype.itemsize < 4 and weight.dtype.itemsize < 4
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    full = _full(jnp.promote_types(hidden.dtype, weight.dtype))
    return jnp.einsum("...d,vd->...v", hidden, weight, precision=precision, preferred_element_type=full)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype=jnp.float32) -> list[LayerCache]:
    """An empty cache: for each layer zeros [batch, length, num_kv_heads, head_dim] for keys and for values."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


def extend_cache(cache: list[LayerCache], *, repeats: int = 1, length: int | None = None) -> list[LayerCache]:
    """A cache whose row b appears `repeats` times in a row (b*repeats + k) and whose slot axis is zero-padded to
    `length`: K completions continue from one prefill. Raises ConfigError where length is shorter than the cache."""
    slots = cache[0].key.shape[1]
    length = slots if length is None else length
    if length < slots:
        raise ConfigError(f"extend_cache(length=): found {length}, allowed: >= {slots}, the slots of the cache")
    grow = lambda a: jnp.repeat(jnp.pad(a, ((0, 0), (0, length - slots), (0, 0), (0, 0))), repeats, axis=0)
    return [LayerCache(grow(layer.key), grow(layer.value)) for layer in cache]


def decode_step(config: DecoderConfig, params: Params, tokens: Array, position: Array, cache: list[LayerCache],
                cache_index, key_valid: Array) -> tuple[Array, list[LayerCache]]:
    """Runs Q new tokens against a cache: (hidden [B,Q,D] after the final norm, the cache with them written).

    tokens, position: int32 [B,Q]. cache: init_cache of S slots; the new tokens take slots cache_index ..
    cache_index+Q-1, which the caller keeps within S (a traced index cannot be checked). key_valid: bool [B,S], False
    for slots that hold padding; query q reads the valid slots at or before its own. Layers are unrolled.
    """
    slots = key_valid.shape[-1]
    if len(cache) != config.num_layers or cache[0].key.shape[1] != slots:
        raise ConfigError(f"decode_step(cache=): found {len(cache)} layers of {cache[0].key.shape[1]} slots, allowed: "
                          f"{config.num_layers} layers of {slots} slots (the length of key_valid)")
    x = jnp.take(params["embedding"], tokens, axis=0)
    cos, sin = _rotary(config, position, x.dtype)
    own = cache_index + jnp.arange(tokens.shape[1])
    mask = key_valid[:, None, :] & (jnp.arange(slots)[None, :] <= own[:, None])[None]
    new = []
    for number, layer_cache in enumerate(cache):
        layer = _merge_layer(config, jax.tree.map(lambda a, number=number: a[number], params["layers"]))
        x, layer_cache = layer(x, cos, sin, mask, layer_cache, cache_index)
        new.append(layer_cache)
    return _rms_norm(x, params["norm"], config.rms_norm_eps), new
