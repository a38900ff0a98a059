"""Rotary positions (arXiv 2104.09864, half-split convention): frequencies, angles, and the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from alignax.models.config import DecoderConfig, RopeScaling
from alignax.types import Array


def frequencies(theta: float, dim: int, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angle per position of each turned pair, float64 [dim / 2]: f_i = theta^(-2i/dim), then scaled.

    linear: f / s (arXiv 2306.15595). llama3 (Llama 3.1): with n = f original / (2 pi) turns over the original length,
    f / s below low_freq_factor turns, f above high_freq_factor, and in between a mix of both, linear in n. yarn
    (arXiv 2309.00071): a mix of f / s and f, linear in i between the pairs that make beta_fast and beta_slow turns over
    the original length (rounded outwards where truncate).
    """
    base = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return base
    slow = base / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        turns = base * scaling.original_max_positions / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        return share * base + (1 - share) * slow
    # The (real) index of the pair that makes `turns` turns over the original length.
    pair = lambda turns: (dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi))
                          / (2 * math.log(theta)))
    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    share = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return share * slow + (1 - share) * base


def angles(config: DecoderConfig, position: Array, dtype, *, local: bool = False) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, [R, T, 1, rotary_dim / 2] in promote(float32, dtype), for integer positions
    [R, T]. local: those of layers with a window, where config.local_rope_theta gives them a base of their own."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    full = jnp.promote_types(jnp.float32, dtype)
    frequency = jnp.asarray(frequencies(theta, config.rotary_dim or config.head_dim, scaling), full)
    angle = position.astype(full)[:, :, None, None] * frequency.reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.kind == "yarn":
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x_i, x_{i + n}) of x [R, T, heads, head_dim] by their angles, n = cos.shape[-1]; the entries
    after the first 2n stay."""
    turned = 2 * cos.shape[-1]
    whole = turned == x.shape[-1]
    first, second = jnp.split((x if whole else x[..., :turned]).astype(cos.dtype), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return out if whole else jnp.concatenate([out, x[..., turned:]], axis=-1)
