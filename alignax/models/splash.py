"""Splash attention on TPUs: JAX's Pallas kernel, with the row's own mask in blocks.

The kernel keeps running maxima and sums, so that scores of [T, S] never exist, and it skips blocks of the mask that
allow nothing (arXiv 2205.14135; jax.experimental.pallas.ops.tpu.splash_attention). Any mask goes in as it is: padding,
segments of packed rows, prefixes that several completions share, windows over positions that restart. `prepare` cuts
it into blocks once for all layers; `run` is called in each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alignax.types import Array

LANES = 128
_BLOCKS = (512, 256, LANES)
_FIELDS = ("data_next", "mask_next", "block_mask", "partial_mask_blocks")

Prepared = tuple[dict[str, Array], dict[str, Array]]


def _padded(length: int) -> int:
    return -(-length // LANES) * LANES


def _block(length: int) -> int:
    """The largest block that divides a padded length."""
    return next(size for size in _BLOCKS if length % size == 0)


def prepare(mask: Array) -> Prepared:
    """mask bool [R,T,S] -> its blocks, for the forward and for the key side of the backward pass.

    Every leaf has the axes (R, 1, blocks of T, blocks of S, ...). T and S are padded to multiples of LANES with columns
    that nobody reads. A query with nothing to read is given key 0: the kernel would divide 0 by 0.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    rows, queries, keys = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, _padded(queries) - queries), (0, _padded(keys) - keys)))
    first = jnp.arange(mask.shape[2]) == 0
    mask = mask | (~mask.any(-1, keepdims=True) & first[None, None])
    blocks = (_block(mask.shape[1]), _block(mask.shape[2]))
    named = lambda one: {name: getattr(one, name) for name in _FIELDS}
    both = lambda one: tuple(named(make(one[None], blocks)[0])
                             for make in (info.process_dynamic_mask, info.process_dynamic_mask_dkv))
    return jax.vmap(both)(mask)


def run(prepared: Prepared, query: Array, key: Array, value: Array, *, scale: float, softcap: float | None = None,
        interpret: bool = False) -> Array:
    """attention.attend under a prepared mask: query [R,T,H,h]; key, value [R,S,G,h] -> [R,T,H,h] in query's dtype.

    scale is multiplied into query, in query's dtype. interpret: run the kernel as plain operations, for tests on a CPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    queries, width = query.shape[1], query.shape[3]
    heads_first = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2),
                                    ((0, 0), (0, 0), (0, _padded(x.shape[1]) - x.shape[1]), (0, 0)))
    query = heads_first(query * jnp.asarray(scale, query.dtype))
    key, value = heads_first(key.astype(query.dtype)), heads_first(value.astype(query.dtype))
    q, kv = _block(query.shape[2]), _block(key.shape[2])
    sizes = splash.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
    settings = dict(block_sizes=sizes, is_mqa=False, save_residuals=False, mask_value=kernels.DEFAULT_MASK_VALUE,
                    attn_logits_soft_cap=softcap, residual_checkpoint_name=None, mask_function=None,
                    interpret=interpret)

    def one(prepared, query, key, value):
        forward, backward = (MaskInfo(**part, q_sequence=None, is_dynamic_mask=True) for part in prepared)
        return kernels.SplashAttentionKernel(forward, forward, backward, **settings)(query, key, value)

    out = jax.vmap(one)(prepared, query, key, value)
    return jnp.swapaxes(out, 1, 2)[:, :queries, :, :width]
