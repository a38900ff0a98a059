"""How losses read their arrays: the dtype rule, pairs, safe lengths, masked token sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.types import ConfigError


def floats(x: Any) -> jax.Array:
    """x in promote(float32, its dtype): float64 stays float64, everything narrower becomes float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def sums(name: str, x: Any) -> jax.Array:
    """A per-sequence sum [B, K] as float32 or wider.

    Raises TypeError for bfloat16 and float16: the precision is already lost (at 500 nats bfloat16 steps by 2).
    """
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(f"{name}: found {dtype.name} sequence sums; allowed: float32 or float64 (sum in float32)")
    return floats(x)


def pair(name: str, x: Any) -> tuple[jax.Array, jax.Array]:
    """(chosen [B, ...], rejected [B, ...]) of an array [B, 2, ...]; ConfigError for another number of completions."""
    if jnp.ndim(x) < 2 or jnp.shape(x)[1] != 2:
        raise ConfigError(f"{name}: found shape {jnp.shape(x)}; allowed: [B, 2, ...] (completion 0 chosen, 1 rejected)")
    return x[:, 0], x[:, 1]


def pair_sums(name: str, x: Any) -> tuple[jax.Array, jax.Array]:
    """`pair` of `sums`."""
    return pair(name, sums(name, x))


def log_ratios(logps: Any, ref_logps: Any) -> jax.Array:
    """log pi - log pi_ref, [B, K]; no gradient into the reference."""
    return sums("logps", logps) - jax.lax.stop_gradient(sums("ref_logps", ref_logps))


def valid_log_ratios(logps: Any, ref_logps: Any, valid: Any) -> jax.Array:
    """`log_ratios` with 0 and no gradient where `valid` is False; such entries may hold anything."""
    return jnp.where(jnp.asarray(valid, bool), log_ratios(logps, ref_logps), 0)


def pair_log_ratios(logps: Any, ref_logps: Any) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected) log-ratios, [B] each."""
    return pair("logps", log_ratios(logps, ref_logps))


def per_token(x: jax.Array, lengths: Any) -> jax.Array:
    """x / lengths; 0 with zero gradient where a length is 0."""
    lengths = floats(lengths)
    some = lengths > 0
    return jnp.where(some, x / jnp.where(some, lengths, 1), 0)


def token_sum(x: Any, mask: Any) -> jax.Array:
    """Sum over the last axis of the masked-in entries; masked-out ones may hold anything and get no gradient."""
    return jnp.where(jnp.asarray(mask, bool), floats(x), 0).sum(-1)
