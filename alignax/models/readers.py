"""Which attention kernel runs, and how columns that are cut over devices read each other.

`xla` computes scores of [T, S] (attention.attend); `blocked` pairs of blocks of queries and keys, and only those in
which somebody reads somebody (flash.attend_blocks); `cudnn` and `splash` are kernels that never hold scores, for GPUs
and TPUs. All take the same mask of who reads whom, so that no layout, window or prefix is beyond any of them.

Where the columns of rows are cut over the mesh's `sequence` axis, queries stay where they are and keys and values of
the whole row are gathered in each layer: each device then holds T/s x T scores, and its part of the result is exact. Of
the gathers' R T G h elements each for keys and values, a device receives (s-1)/s; the backward pass sums their gradient
and scatters it back over the same links.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from alignax.models import splash
from alignax.models.attention import attend
from alignax.models.config import DecoderConfig
from alignax.models.flash import BLOCK, Tiles, attend_blocks, prepare
from alignax.types import Array, ConfigError

ATTENTION = ("auto", "xla", "blocked", "cudnn", "splash")
_MOST_BLOCKS = 4  # of queries under a bias; more save little more and compile longer
_CUDNN_WIDTH = 128  # of a head, on every GPU that has the kernel


class Reader(NamedTuple):
    """How the layers of one kind read. mask: bool [R,T,S], for splash what splash.prepare made of it. over: how
    [R,T,...] lies on a mesh where the kernel has to be told, else None. causal: nobody reads a later column, and row
    and column of the mask are the same place. interpret: see splash.run. tiles: blocked's mask, where rows are long."""

    implementation: str
    mask: Any
    over: NamedSharding | None = None
    causal: bool = False
    interpret: bool = False
    tiles: Tiles | None = None


def _refusals(name: str, config: DecoderConfig, dtype: Any, platform: str) -> list[str]:
    """Why `name` cannot compute this decoder on this platform; empty where it can."""
    dtype = jnp.dtype(dtype)
    out = []
    if name == "cudnn":
        if platform not in ("gpu", "cuda"):
            out.append(f"the backend is {platform}; it is a kernel for NVIDIA GPUs")
        if dtype not in (jnp.bfloat16, jnp.float16):
            out.append(f"model.dtype is {dtype}; it takes bfloat16")
        if config.attention_softcap is not None:
            out.append(f"the model caps its scores at {config.attention_softcap}, which it cannot")
        if config.head_dim % 8 or config.head_dim > _CUDNN_WIDTH:
            out.append(f"head_dim is {config.head_dim}; it takes multiples of 8 up to {_CUDNN_WIDTH}")
    if name == "splash":
        if platform != "tpu":
            out.append(f"the backend is {platform}; it is a kernel for TPUs")
        if dtype == jnp.float64:
            out.append("model.dtype is float64; it computes in float32")
    if name in ("cudnn", "splash") and config.positions == "alibi":
        out.append("the model's ALiBi bias is float32, which it does not add")
    return out


def choose_attention(name: str, config: DecoderConfig, dtype: Any, platform: str,
                     where: str = "config.model.attention") -> str:
    """The implementation that `name` of ATTENTION stands for: `auto` takes blocked on CPUs, elsewhere the platform's
    kernel where it computes this decoder in this dtype, else xla. Raises ConfigError, with the reason, for a kernel
    that cannot."""
    if name not in ATTENTION:
        raise ConfigError(f"{where}={name!r}; allowed: {', '.join(ATTENTION)}")
    if name == "auto" and platform == "cpu":
        return "blocked"
    if name == "auto":
        return next((kernel for kernel in ("cudnn", "splash") if not _refusals(kernel, config, dtype, platform)), "xla")
    if reasons := _refusals(name, config, dtype, platform):
        raise ConfigError(f"{where}={name!r}: {'; '.join(reasons)}. Allowed here: auto, xla, blocked")
    return name


def in_loops(implementation: str, config: DecoderConfig, columns: int, over: NamedSharding | None) -> bool:
    """Whether attention over rows of so many columns is loops whose length hangs on the mask (see flash)."""
    return config.positions != "alibi" and _tiled(implementation, columns, over)


def _tiled(implementation: str, columns: int, over: NamedSharding | None) -> bool:
    """Whether rows of so many columns are computed in tiles, unless a bias is added."""
    return implementation == "blocked" and columns > BLOCK and (over is None or _axes(over)[1] is None)


def make_reader(implementation: str, mask: Array, over: NamedSharding | None = None, *,
                interpret: bool = False) -> Reader:
    """The Reader of a causal mask bool [R,T,T] whose rows and columns lie as `over` says (None: one device).

    Raises ConfigError for columns that do not divide.
    """
    if implementation not in ATTENTION[1:]:
        raise ConfigError(f"forward(attention=): found {implementation!r}, allowed: {', '.join(ATTENTION[1:])}")
    columns = None if over is None else _axes(over)[1]
    ways = over.mesh.shape[columns] if columns else 1
    if mask.shape[1] % ways:
        raise ConfigError(f"rows of {mask.shape[1]} columns do not divide over mesh.sequence={ways}; allowed: a "
                          "length that is a multiple of it (bucket_multiple)")
    if _tiled(implementation, mask.shape[1], over):
        return Reader(implementation, mask, over, causal=True, tiles=_tiles(mask, over))
    if implementation != "splash":
        # Without columns to cut, the partitioner cuts rows and heads by itself.
        return Reader(implementation, mask, over if columns else None, causal=columns is None)
    if over is None:
        return Reader(implementation, splash.prepare(mask), None, interpret=interpret)
    cut = PartitionSpec(*_axes(over))
    blocks = PartitionSpec(cut[0], None, cut[1])
    prepared = jax.shard_map(splash.prepare, mesh=over.mesh, in_specs=cut, out_specs=blocks, check_vma=False)(mask)
    return Reader(implementation, prepared, over, interpret=interpret)


def _tiles(mask: Array, over: NamedSharding | None) -> Tiles:
    """Which blocks are empty is each device's own."""
    if over is None:
        return prepare(mask)
    return jax.shard_map(prepare, mesh=over.mesh, in_specs=PartitionSpec(_axes(over)[0]), out_specs=_tiles_cut(over),
                         check_vma=False)(mask)


def _tiles_cut(over: NamedSharding) -> Tiles:
    rows = _axes(over)[0]
    return Tiles(PartitionSpec(None, None, rows), PartitionSpec(rows), PartitionSpec(rows))


def read(reader: Reader, query: Array, key: Array, value: Array, *, scale: float, softcap: float | None = None,
         bias: Array | None = None) -> Array:
    """attention.attend through a Reader: query [R,T,H,h]; key, value [R,T,G,h]; bias [R,H,T,T] or None -> [R,T,H,h].

    Raises ConfigError for what the kernel does not compute.
    """
    run = functools.partial(_run, reader, scale=scale, softcap=softcap)
    mask = reader.mask if reader.tiles is None or bias is not None else reader.tiles
    if reader.over is None:
        return run(query, key, value, mask, bias)
    mesh, (rows, columns) = reader.over.mesh, _axes(reader.over)
    tensor = mesh.shape["tensor"]
    heads = "tensor" if tensor > 1 and key.shape[2] % tensor == 0 else None
    cut = PartitionSpec(rows, columns, heads)
    mask_cut = (_tiles_cut(reader.over) if isinstance(mask, Tiles) else PartitionSpec(rows, None, columns)
                if reader.implementation == "splash" else PartitionSpec(rows, columns))

    def local(query, key, value, mask, *bias):
        if columns is not None:
            key, value = (jax.lax.all_gather(x, columns, axis=1, tiled=True) for x in (key, value))
        return run(query, key, value, mask, *bias)

    given = (query, key, value, mask) + (() if bias is None else (bias,))
    specs = (cut, cut, cut, mask_cut, PartitionSpec(rows, heads, columns))[:len(given)]
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)(*given)


def _blocked(query, key, value, mask, bias, **settings):
    """attend for a causal mask in blocks; short rows are one block. Under a bias blocks of queries only, each against
    the columns up to its last, which with four blocks is 5/8 of the scores."""
    if isinstance(mask, Tiles):
        return attend_blocks(query, key, value, mask, **settings)
    length = query.shape[1]
    if length <= BLOCK:
        return attend(query, key, value, mask, bias=bias, **settings)
    count = min(length // BLOCK, _MOST_BLOCKS)
    ends = [length * number // count for number in range(count + 1)]
    return jnp.concatenate([attend(query[:, start:end], key[:, :end], value[:, :end], mask[:, start:end, :end],
                                   bias=bias[:, :, start:end, :end], **settings)
                            for start, end in zip(ends, ends[1:], strict=False)], axis=1)


def _axes(over: NamedSharding) -> tuple:
    """(axes of the rows, axis of the columns) of a sharding of [R,T,...]."""
    rows, columns = (*over.spec, None, None)[:2]
    return rows, columns


def _run(reader, query, key, value, mask, bias=None, *, scale, softcap):
    """One device's part (or, without a mesh, all of it)."""
    name = reader.implementation
    if name == "blocked" and reader.causal:
        return _blocked(query, key, value, mask, bias, scale=scale, softcap=softcap)
    if name in ("xla", "blocked"):
        return attend(query, key, value, mask, scale=scale, softcap=softcap, bias=bias)
    if bias is not None or query.dtype == jnp.float64 or (name == "cudnn" and softcap is not None):
        raise ConfigError(f"forward(attention=): found {name!r} with a bias, float64 or a soft cap that it does not "
                          "compute, allowed: 'xla'")
    if name == "splash":
        return splash.run(mask, query, key, value, scale=scale, softcap=softcap, interpret=reader.interpret)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, is_causal=reader.causal,
                                        implementation="cudnn")
