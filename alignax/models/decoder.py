"""One decoder for all families: flax NNX modules behind a functional boundary.

Parameters are a plain nested dict of arrays that the caller holds (the pure dict of the module's state), with the
layers stacked on a leading axis; every function here takes `(config, params, ...)` and is pure, so `jax.jit`, `grad`
and sharding rules see arrays and paths such as `layers/attention/query` only. Training scans the stacked layers
(optionally rematerialised); decoding unrolls them in Python with one key and one value array per layer.

The architecture is that of Llama (arXiv 2302.13971) with the variants of DecoderConfig; every choice is static, so a
program holds only what its family computes. Left out: dropout, mixtures of experts, rotary frequencies that depend on
the length of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alignax.models.attention import attention_mask, distance
from alignax.models.config import DecoderConfig
from alignax.models.layers import Layer, LayerCache, View, add_norm, full_dtype, normalise, widen
from alignax.models.readers import make_reader
from alignax.models.remat import rematerialised
from alignax.models.rope import angles
from alignax.ops.head import Head
from alignax.types import Array, ConfigError

Params = dict[str, Any]

_EMBEDDING_STD = 0.02
_WHOLE_ROWS = jax.sharding.PartitionSpec(jax.sharding.PartitionSpec.UNCONSTRAINED, None)
_NORM_HEAD_EPS = 1e-12


class Decoder(nnx.Module):
    """The whole model; `layers` is one Layer whose parameters carry a leading axis num_layers."""

    def __init__(self, config: DecoderConfig, key: Array, dtype=jnp.float32):
        embedding, layers, output = jax.random.split(key, 3)
        draw = lambda k, rows: nnx.Param(
            (jax.random.normal(k, (rows, config.hidden_size), full_dtype(dtype)) * _EMBEDDING_STD).astype(dtype))
        self.embedding = draw(embedding, config.vocab_size)
        if config.positions == "learned":
            self.positions = draw(jax.random.fold_in(embedding, 1), config.max_positions)
        self.layers = nnx.vmap(lambda k: Layer(config, k, dtype))(jax.random.split(layers, config.num_layers))
        add_norm(self, "norm", config, config.hidden_size, dtype)
        if not config.tie_embeddings:
            self.head = draw(output, config.vocab_size)


def init_params(config: DecoderConfig, key: Array, dtype=jnp.float32) -> Params:
    """Fresh parameters: a nested dict of `dtype` arrays.

    embedding [V,D], norm [D], head [V,D] (untied only), positions [max_positions,D] (learned only), and
    layers/{attention_norm, attention/{query,key,value,output}, mlp_norm, mlp/{gate,up,down}} with a leading axis
    num_layers; where the config asks for them also NAME_bias beside a matrix or norm, attention/{query,key}_norm,
    post_attention_norm and post_mlp_norm. Matrices are [in, out] with variance 1/in, divided by 2 num_layers where they
    write to the residual stream; embeddings have standard deviation 0.02; norms are neutral and biases 0.
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


def _check_adapters(params: Params, adapters: Params | None) -> None:
    """ConfigError, naming the path, for an adapter without a matrix."""
    layers = params["layers"]
    layers, axes = (layers[0], 2) if isinstance(layers, list) else (layers, 3)

    def walk(tree, found, path):
        for name, below in tree.items():
            here = f"{path}/{name}"
            other = found.get(name) if isinstance(found, dict) else None
            if isinstance(other, dict):
                walk(below, other, here)
            elif other is None or other.ndim != axes or set(below) != {"a", "b"}:
                what = "no such matrix" if other is None else sorted(below)
                raise ConfigError(f"adapters: {here}: found {what}, allowed: {{'a', 'b'}} at a path of a matrix of "
                                  "this model")
    if adapters is not None:
        walk(adapters, layers, "layers")


def _embed(config: DecoderConfig, params: Params, tokens: Array, position: Array) -> Array:
    """[R,T,D]: token embeddings, with learned positions (NaN beyond their table: it must show) or scaled."""
    x = jnp.take(params["embedding"], tokens, axis=0)
    if config.positions == "learned":
        x = x + jnp.take(params["positions"], position, axis=0)
    if config.scale_embedding:
        x = x * jnp.asarray(config.hidden_size ** 0.5, x.dtype)
    return x


def _views(config: DecoderConfig, position: Array, mask: Array, between: Callable[[], Array], dtype) -> dict[int, View]:
    """Window -> what layers with that window see; one entry for most families. between: makes the distances [R,T,S],
    which windows and ALiBi need."""
    views, dist = {}, between() if config.windows or config.positions == "alibi" else None
    for window in sorted(set(config.layer_windows)):
        cos = sin = None
        if config.positions == "rope":
            cos, sin = angles(config, position, dtype, local=window > 0)
        views[window] = View(cos, sin, mask & (dist < window) if window else mask,
                             dist if config.positions == "alibi" else None)
    return views


@functools.lru_cache(maxsize=64)
def _runs(windows: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """The layers as runs (first layer, period p, repeats n): n times the same p windows, one body of p layers each.

    The choice compiles the fewest layers: either runs of equal windows, or one period and a rest of runs.
    """
    def equal(start):
        out = []
        for number in range(start, len(windows)):
            if out and windows[number] == windows[number - 1]:
                out[-1] = (out[-1][0], 1, out[-1][2] + 1)
            else:
                out.append((number, 1, 1))
        return out

    options = [equal(0)]
    for period in range(2, len(windows) // 2 + 1):
        repeats = next((n for n in range(1, len(windows) // period)
                        if windows[n * period:(n + 1) * period] != windows[:period]), len(windows) // period)
        if repeats > 1:
            options.append([(0, period, repeats), *equal(period * repeats)])
    return tuple(min(options, key=lambda runs: sum(period for _, period, _ in runs)))


def _part(tree: Any, start: int, period: int, repeats: int) -> Any:
    """Layers start .. start + period*repeats of stacked leaves, as [repeats, period, ...] ([repeats, ...] at 1)."""
    def cut(leaf):
        leaf = leaf if leaf.shape[0] == repeats * period else leaf[start:start + period * repeats]
        return leaf if period == 1 else leaf.reshape(repeats, period, *leaf.shape[1:])
    return jax.tree.map(cut, tree)


def _layer(tree: Any, number: int) -> Any:
    """One layer of stacked leaves, or of layers apart."""
    return tree[number] if isinstance(tree, list) else jax.tree.map(lambda leaf: leaf[number], tree)


def forward(config: DecoderConfig, params: Params, tokens: Array, segment: Array, prefix: Array, position: Array, *,
            adapters: Params | None = None, remat: str = "none", unroll: int = 1,
            sharding: jax.sharding.NamedSharding | None = None, attention: str = "xla",
            interpret: bool = False) -> Array:
    """Hidden states after the final norm, [R,T,D] in the parameters' dtype, of int32 grids [R,T].

    Attention follows attention_mask, and in layers with a window w also 0 <= position - position' < w; where segment
    is 0 the result is finite and means nothing. attention: `xla`, whose memory is R * num_heads * T^2, or a kernel of
    models.ATTENTION without those scores (interpret: splash without a TPU, for tests).
    adapters: None, or a nested dict that mirrors params["layers"] and holds adapted matrices only, each leaf as
    {"a": [layers, in, r], "b": [layers, r, out]}: the projection becomes x W + (x a) b, any scaling being part of b.
    Layers run in a `lax.scan` (over blocks of p layers where windows repeat with period p). remat: `none` keeps every
    intermediate; the other names of models.REMAT keep less (see models.remat). unroll: layers per turn of the loop; on
    CPUs a loop of tiny layers costs more than its body, and unroll = num_layers leaves no loop. Raises ConfigError for
    an unknown remat, an adapter without a matrix, or an attention that does not compute this model. sharding: where
    [R,T,D] lies, held from layer to layer: rows cut, columns too for long ones (see models.readers). Without it the
    compiler follows an embedding that is cut along D, and moves activations where it could move weights.
    """
    _check_adapters(params, adapters)
    placed = lambda x: x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
    # Rows of a table that is cut along D would come in pieces, from devices that hold other tokens.
    table = params["embedding"] if sharding is None else jax.lax.with_sharding_constraint(
        params["embedding"], jax.sharding.NamedSharding(sharding.mesh, _WHOLE_ROWS))
    x = placed(_embed(config, params | {"embedding": table}, tokens, position))
    flat = sharding is None or len(sharding.spec) < 2 or sharding.spec[1] is None
    views = _views(config, position, attention_mask(segment, prefix), lambda: distance(position, position), x.dtype)
    views = {window: view._replace(reader=make_reader(attention, view.mask, sharding, interpret=interpret), flat=flat)
             for window, view in views.items()}

    def apply(window: int, looped: bool):
        run = lambda x, stacked: _merge_layer(config, stacked[0])(x, views[window], stacked[1])[0]
        return rematerialised(run, remat, looped=looped)

    stacked = (params["layers"], adapters)
    for start, period, repeats in _runs(config.layer_windows):
        part = _part(stacked, start, period, repeats)
        windows = config.layer_windows[start:start + period]

        turns = -(-repeats // max(unroll // period, 1))

        def body(x, block, windows=windows, looped=turns > 1):
            if len(windows) == 1:
                return placed(apply(windows[0], looped)(x, block)), None
            for number, window in enumerate(windows):
                x = placed(apply(window, looped)(x, _layer(block, number)))
            return x, None

        if repeats == 1:
            x, _ = body(x, _layer(part, 0))
        else:
            x, _ = jax.lax.scan(body, x, part, unroll=min(max(unroll // period, 1), repeats))
    return normalise(config, x, params["norm"], params.get("norm_bias"))


def forward_edited(config: DecoderConfig, params: Params, tokens: Array, segment: Array, prefix: Array,
                   position: Array, edit: Callable[[int, Array], Array]) -> Array:
    """`forward` with edit(number of the layer, what enters its MLP's last matrix [R,T,F]) in place of the latter.

    For analyses: an edit may also keep what it is given. Layers are unrolled, attention is plain.
    """
    x = _embed(config, params, tokens, position)
    views = _views(config, position, attention_mask(segment, prefix), lambda: distance(position, position), x.dtype)
    for number, window in enumerate(config.layer_windows):
        layer = _merge_layer(config, _layer(params["layers"], number))
        x, _ = layer(x, views[window], edit=functools.partial(edit, number))
    return normalise(config, x, params["norm"], params.get("norm_bias"))


def head(config: DecoderConfig, params: Params) -> Head:
    """The output head: the embedding itself where tied (gradients then flow into both uses), else params["head"].

    With norm_head its rows are divided by their length (at least 1e-12; Baichuan 2, arXiv 2309.10305), in the graph, so
    that gradients are those of the normalised matrix."""
    weight = params["embedding"] if config.tie_embeddings else params["head"]
    if config.norm_head:
        wide = weight.astype(full_dtype(weight.dtype))
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        weight = (wide * jax.lax.rsqrt(jnp.maximum(square, _NORM_HEAD_EPS ** 2))).astype(weight.dtype)
    return Head(weight=weight, bias=None, softcap=config.final_softcap)


def logits(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """Next-token logits [..., V] in float32 (or wider) of hidden [..., D]; for decoding and tests.

    Training never calls this: it goes through the chunked head, which does not keep a vocabulary axis.
    """
    out = head(config, params)
    # The precisions of the chunked head, so that a sampler and the trainer agree: exact products of bfloat16, no
    # reduced-precision shortcut for float32 where the device has one.
    narrow = hidden.dtype.itemsize < 4 and out.weight.dtype.itemsize < 4
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    full = full_dtype(jnp.promote_types(hidden.dtype, out.weight.dtype))
    raw = jnp.einsum("...d,vd->...v", hidden, out.weight, precision=precision, preferred_element_type=full)
    if out.bias is not None:
        raw = raw + widen(out.bias.astype(full), raw.ndim)
    return raw if out.softcap is None else out.softcap * jnp.tanh(raw / out.softcap)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype=jnp.float32) -> list[LayerCache]:
    """An empty cache: for each layer zeros [batch, num_kv_heads, length, head_dim] for keys and for values (a head's
    slots lie side by side, as its scores read them)."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


def extend_cache(cache: Sequence[LayerCache], *, repeats: int = 1, length: int | None = None) -> list[LayerCache]:
    """A cache whose row b appears `repeats` times in a row (b*repeats + k) and whose slot axis is zero-padded to
    `length`: K completions continue from one prefill. Raises ConfigError where length is shorter than the cache."""
    slots = cache[0].key.shape[2]
    length = slots if length is None else length
    if length < slots:
        raise ConfigError(f"extend_cache(length=): found {length}, allowed: >= {slots}, the slots of the cache")
    grow = lambda a: jnp.repeat(jnp.pad(a, ((0, 0), (0, 0), (0, length - slots), (0, 0))), repeats, axis=0)
    return [LayerCache(grow(layer.key), grow(layer.value)) for layer in cache]


def layers_apart(config: DecoderConfig, params: Params) -> Params:
    """params whose stacked layers became a list with a tree for each, for a loop around decode_step: a layer cut out of
    the stack inside the loop is copied at every turn. Costs a copy of the layers, once."""
    layers = [_layer(params["layers"], number) for number in range(config.num_layers)]
    return {**params, "layers": layers}


def decode_step(config: DecoderConfig, params: Params, tokens: Array, position: Array, cache: Sequence[LayerCache],
                cache_index, key_valid: Array, *, adapters: Params | None = None) -> tuple[Array, list[LayerCache]]:
    """Runs Q new tokens against a cache: (hidden [B,Q,D] after the final norm, the cache with them written).

    tokens, position: int32 [B,Q]. cache: init_cache of S slots; the new tokens take slots cache_index ..
    cache_index+Q-1, which the caller keeps within S (a traced index cannot be checked); cache_index is a number, or
    int32 [B] where rows are at different slots. key_valid: bool [B,S], False
    for slots that hold padding; query q reads the valid slots at or before its own. Where windows or ALiBi need the
    distance of two tokens it is the number of valid slots between them, so rows hold one sequence without gaps in its
    positions. params: stacked, or as layers_apart makes them. adapters: as in forward. Layers are unrolled.
    """
    slots = key_valid.shape[-1]
    if len(cache) != config.num_layers or cache[0].key.shape[2] != slots:
        raise ConfigError(f"decode_step(cache=): found {len(cache)} layers of {cache[0].key.shape[2]} slots, allowed: "
                          f"{config.num_layers} layers of {slots} slots (the length of key_valid)")
    _check_adapters(params, adapters)
    x = _embed(config, params, tokens, position)
    own = jnp.atleast_1d(cache_index)[:, None] + jnp.arange(tokens.shape[1])[None]
    mask = key_valid[:, None, :] & (jnp.arange(slots)[None, None, :] <= own[:, :, None])

    def between():
        count = jnp.cumsum(key_valid, axis=1, dtype=jnp.int32)
        return distance(jnp.take_along_axis(count, jnp.broadcast_to(own, tokens.shape), axis=1), count)

    views = _views(config, position, mask, between, x.dtype)
    new = []
    for number, (window, layer_cache) in enumerate(zip(config.layer_windows, cache, strict=True)):
        layer = _merge_layer(config, _layer(params["layers"], number))
        x, layer_cache = layer(x, views[window], _layer(adapters, number), layer_cache, cache_index)
        new.append(layer_cache)
    return normalise(config, x, params["norm"], params.get("norm_bias")), new
