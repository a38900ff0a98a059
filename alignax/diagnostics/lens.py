"""Logit lens: what each layer of a decoder would say of a token if the output head read it at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignax.models import DecoderConfig, forward, logits
from alignax.types import Stream


def by_layer(config: DecoderConfig, params: Any, stream: Stream, gather: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[layers, B, V]: log-softmax of final norm and head on a place's state after 1, 2, ... all layers.

    gather: hidden [R,T,D] -> [B,D], the states of the places. One forward pass of every depth, about layers / 2 whole
    ones: for a small probe.
    """
    out = []
    for depth in range(1, config.num_layers + 1):
        cut = {**params, "layers": jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params["layers"])}
        hidden = forward(_shallow(config, depth), cut, stream.tokens, stream.segment, stream.prefix, stream.position)
        out.append(jax.nn.log_softmax(logits(config, params, gather(hidden))))
    return jnp.stack(out)


def _shallow(config: DecoderConfig, depth: int) -> DecoderConfig:
    """The config of the first `depth` layers."""
    windows = config.windows[:depth]
    local = config.local_rope_theta if any(windows) else None
    return dataclasses.replace(config, num_layers=depth, windows=windows, local_rope_theta=local)
