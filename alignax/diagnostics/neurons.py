"""MLP neurons of a decoder: their activations, value vectors and keys, and forward passes with some of them patched.

After 2401.01967 and 2411.06424; the arithmetic on what is read here stands in diagnostics.probes. Neuron i of layer l
is number l F + i of N = layers F. Its activation m is what enters the MLP's last matrix, its value vector the row of
that matrix, its key the column of the matrix `up` (of gated MLPs too, so that a factor on the key is a factor on m; in
ungated ones it passes through the non-linearity). Where a family norms an MLP's output before the residual stream,
value vectors are what stands before that norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignax.diagnostics import probes
from alignax.models import DecoderConfig, forward_edited
from alignax.types import Stream


def _run(config: DecoderConfig, params: Any, stream: Stream, edit: Callable[[int, jax.Array], jax.Array]) -> jax.Array:
    return forward_edited(config, params, stream.tokens, stream.segment, stream.prefix, stream.position, edit)


def read(config: DecoderConfig, params: Any, stream: Stream,
         reduce: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(hidden states [R,T,D], reduce(activations [R,T,F]) of every layer [layers, ...]).

    reduce: what is kept of a layer, for example the mean over some places; the identity keeps everything.
    """
    kept = []

    def look(_, inner):
        kept.append(reduce(inner))
        return inner

    return _run(config, params, stream, look), jnp.stack(kept)


def patched(config: DecoderConfig, params: Any, stream: Stream, chosen: jax.Array, means: jax.Array) -> jax.Array:
    """Hidden states [R,T,D] with the chosen neurons (bool [N]) held at means [N] at every position."""
    chosen, means = (x.reshape(config.num_layers, -1) for x in (chosen, means))
    return _run(config, params, stream, lambda n, inner: probes.patch(inner, chosen[n], means[n].astype(inner.dtype)))


def values(params: Any) -> jax.Array:
    """[N, D]: the value vectors of all layers, one neuron after another."""
    down = params["layers"]["mlp"]["down"]
    return down.reshape(-1, down.shape[-1])


def scale_keys(params: Any, chosen: jax.Array, factor: Any) -> Any:
    """The decoder with the chosen neurons' keys (bool [N]) multiplied; biases stay. Un-aligning: 10 for the neurons of
    the value vectors nearest to an unwanted direction."""
    mlp = params["layers"]["mlp"]
    layers, _, width = mlp["up"].shape
    up = jax.vmap(lambda keys, which: probes.scale_keys(keys, which, factor))(mlp["up"], chosen.reshape(layers, width))
    return {**params, "layers": {**params["layers"], "mlp": {**mlp, "up": up}}}


def before_norm(config: DecoderConfig, params: Any, direction: jax.Array) -> jax.Array:
    """[D]: the direction of the residual stream along which projections rise as those of normed states along
    `direction` do: its entries times the last norm's weight, up to the norm's positive scale and, for layer norms, with
    the mean taken out."""
    weight = params["norm"].astype(direction.dtype)
    out = direction * (1 + weight if config.norm == "rms_plus_one" else weight)
    return out - out.mean() if config.norm == "layer" else out
