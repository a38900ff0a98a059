"""The vocabulary head, chunked: statistics of next-token distributions without a whole batch's logits.

One routine serves every loss, the reference and scoring. It returns statistics, never a loss. Chunks run along the
completion axis (so that a batch sharded over B stays sharded); when one slot of every completion is still too much,
along the vocabulary too, with running sums. The backward pass recomputes the logits of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignax.types import ConfigError

STATS = ("logp", "entropy", "log_sum_sq", "log_z", "max_logit", "kl_other_policy", "kl_policy_other")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The output layer of a decoder.

    weight: [V, D]. bias: [V] or None. softcap: static float or None; logits = softcap * tanh(raw / softcap).
    """

    weight: jax.Array
    bias: jax.Array | None = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Head:
    """A head prepared for the loop: weights in the accumulation dtype, the matmul precision to use."""

    weight: jax.Array
    bias: jax.Array | None
    softcap: float | None = dataclasses.field(metadata={"static": True})
    precision: Any = dataclasses.field(metadata={"static": True})

    def logits(self, hidden: jax.Array, temperature: Any, start: Any = 0, size: int | None = None) -> jax.Array:
        """Logits [..., size] of the vocabulary slice that begins at `start` (all of it by default)."""
        weight, bias = self.weight, self.bias
        if size is not None:
            weight = jax.lax.dynamic_slice_in_dim(weight, start, size, 0)
            bias = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, size, 0)
        # One axis of tokens: the gradients are then products of two matrices, which a CPU multiplies faster.
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(weight.dtype)
        raw = jnp.einsum("nd,vd->nv", flat, weight, precision=self.precision)
        raw = raw.reshape(*hidden.shape[:-1], raw.shape[-1])
        if bias is not None:
            raw = raw + bias.reshape((1,) * (raw.ndim - 1) + bias.shape)
        if self.softcap is not None:
            raw = self.softcap * jnp.tanh(raw / self.softcap)
        return raw / jnp.asarray(temperature, raw.dtype)


def _prepare(head: Head, hidden: jax.Array) -> _Head:
    """Promote once, outside the loop.

    The loop's transpose sums the weight's cotangent over chunks in the weight's dtype, so a bfloat16 weight left as
    it is would lose low bits at every chunk. bfloat16 operands are exact in one pass of the default precision.
    """
    dtype = jnp.promote_types(jnp.float32, jnp.promote_types(hidden.dtype, head.weight.dtype))
    narrow = hidden.dtype.itemsize < 4 and head.weight.dtype.itemsize < 4
    bias = None if head.bias is None else head.bias.astype(dtype)
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    return _Head(head.weight.astype(dtype), bias, head.softcap, precision)


def head_stats(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    *,
    want: Sequence[str] = ("logp",),
    other: tuple[jax.Array, Head] | None = None,
    temperature: Any = 1.0,
    byte_budget: int = 64_000_000,
) -> dict[str, jax.Array]:
    """Statistics of softmax(head(hidden) / temperature) at every slot.

    hidden: [B, K, L, D], any float dtype. targets: int [B, K, L] in [0, V); a target outside gives NaN in `logp`.
    want: any of
      logp             log p(target)
      entropy          -sum_v p log p, nats
      log_sum_sq       log sum_v p^2
      log_z            log sum_v exp(logit), the logits after soft cap and temperature
      max_logit        max_v logit, of the same logits
      kl_other_policy  KL(other || this) = sum_v q (log q - log p)
      kl_policy_other  KL(this || other) = sum_v p (log p - log q)
    other: (hidden [B, K, L, D'], Head) of the second distribution q, over the same V; needed by the two KLs only.
    temperature: a float, may be traced; divides the logits after the soft cap, those of `other` too.
    byte_budget: bytes of logits alive at once over the whole (global) batch, B*K*l*V*4, twice that with a KL; it
    picks the chunk length l, and below l = 1 the vocabulary chunk. Multiply it by the number of devices that share B.

    bfloat16 states: log-ratios of sequences of 1,000 tokens are within 0.002 nats of float64 on the same states, and a
    token's log-prob has no bias (1e-9); having rounded the states to bfloat16 costs 0.005 nats for each token (standard
    deviation, logits of deviation 2), 0.16 for 1,000 of them, without a bias (tests/precision_test.py).

    Returns {name: [B, K, L]} in promote(float32, input dtypes); gradients flow to hidden, weight, bias, to those of
    `other`, and to temperature. Logits must be finite (an excluded vocabulary entry wants a large negative bias, not
    -inf). Raises ConfigError for an unknown statistic or a KL without `other`, ValueError for shapes that disagree.
    """
    want = tuple(want)
    _check(hidden, head, targets, want, other, byte_budget)
    kls = any(name.startswith("kl_") for name in want)
    this = _prepare(head, hidden)
    pair = None if not kls else _prepare(other[1], other[0])
    batch, completions, length, _ = hidden.shape
    vocab = head.weight.shape[0]
    itemsize = this.weight.dtype.itemsize
    per_logit = batch * completions * itemsize * (2 if kls else 1)
    chunk = int(byte_budget // max(per_logit * vocab, 1))
    vocab_chunk = None if chunk >= 1 else min(vocab, max(1, int(byte_budget // per_logit)))
    chunk = min(max(chunk, 1), length)
    chunk = -(-length // -(-length // chunk))  # as many chunks, of even length: the last one is padded the least

    def body(this, pair, temperature, hidden, targets, hidden_other):
        if vocab_chunk is None:
            return _stats_whole(this, pair, temperature, hidden, targets, hidden_other, want)
        return _stats_by_vocab(this, pair, temperature, hidden, targets, hidden_other, want, vocab_chunk)

    hidden_other = other[0] if kls else None
    if chunk >= length:
        return jax.checkpoint(body)(this, pair, temperature, hidden, targets, hidden_other)
    # Inside a loop XLA cannot merge the recomputation with the forward pass, so the barriers are not needed.
    inner = jax.checkpoint(body, prevent_cse=False)
    pieces = jax.tree.map(lambda x: _split(x, chunk), (hidden, targets, hidden_other))
    stats = jax.lax.map(lambda piece: inner(this, pair, temperature, *piece), pieces)
    return {name: _join(value, length) for name, value in stats.items()}


def _check(hidden, head, targets, want, other, byte_budget) -> None:
    unknown = [name for name in want if name not in STATS]
    if unknown or not want:
        raise ConfigError(f"head_stats: want = {want!r}; allowed: one or more of {', '.join(STATS)}")
    if any(name.startswith("kl_") for name in want) and other is None:
        raise ConfigError(f"head_stats: want = {want!r} needs other=(hidden, head), found None")
    if byte_budget < 1:
        raise ConfigError(f"head_stats: byte_budget = {byte_budget!r}; allowed: a positive number of bytes")
    if hidden.ndim != 4 or targets.shape != hidden.shape[:3] or head.weight.shape[1] != hidden.shape[3]:
        raise ValueError(
            f"head_stats: hidden {hidden.shape}, targets {targets.shape}, weight {head.weight.shape}; "
            "expected [B,K,L,D], [B,K,L], [V,D]")
    if other is not None and (other[0].shape[:3] != targets.shape or other[1].weight.shape[0] != head.weight.shape[0]):
        raise ValueError(
            f"head_stats: other has hidden {other[0].shape} and weight {other[1].weight.shape}; expected "
            f"{(*targets.shape, 'D')} and {(head.weight.shape[0], 'D')}")


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, K, L, ...] -> [n, B, K, chunk, ...], padded with zeros."""
    n = -(-x.shape[2] // chunk)
    pad = [(0, 0)] * x.ndim
    pad[2] = (0, n * chunk - x.shape[2])
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:2], n, chunk, *x.shape[3:]), 2, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """[n, B, K, chunk] -> [B, K, length]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1)[:, :, :length]


def _in_vocab(value: jax.Array, targets: jax.Array, vocab: int) -> jax.Array:
    """NaN where the target is no vocabulary entry: a wrong index must show, not score something else."""
    return jnp.where((targets >= 0) & (targets < vocab), value, jnp.nan)


def _stats_whole(this, pair, temperature, hidden, targets, hidden_other, want) -> dict[str, jax.Array]:
    """All statistics from logits that fit."""
    vocab = this.weight.shape[0]
    logits = this.logits(hidden, temperature)
    # Of one target per slot, the normaliser is enough: fewer visits of the vocabulary than all log-probs.
    log_z = jax.nn.logsumexp(logits, -1)
    logp = logits - log_z[..., None]
    logq = None
    if pair is not None:
        other = pair.logits(hidden_other, temperature)
        logq = other - jax.nn.logsumexp(other, -1)[..., None]
    out = {}
    for name in want:
        if name == "logp":
            index = jnp.clip(targets, 0, vocab - 1)[..., None]
            out[name] = _in_vocab(jnp.take_along_axis(logits, index, -1)[..., 0] - log_z, targets, vocab)
        elif name == "entropy":
            out[name] = -jnp.sum(jnp.exp(logp) * logp, -1)
        elif name == "log_sum_sq":
            out[name] = jax.nn.logsumexp(2 * logp, -1)
        elif name == "log_z":
            out[name] = log_z
        elif name == "max_logit":
            out[name] = jnp.max(logits, -1)
        elif name == "kl_other_policy":
            out[name] = jnp.sum(jnp.exp(logq) * (logq - logp), -1)
        else:
            out[name] = jnp.sum(jnp.exp(logp) * (logp - logq), -1)
    return out


def _stats_by_vocab(this, pair, temperature, hidden, targets, hidden_other, want, size) -> dict[str, jax.Array]:
    """The same statistics from vocabulary slices, in one pass.

    With running maximum m, s = sum e^(z-m), t = sum e^(z-m) (z-m), s2 = sum e^(2(z-m)), c = sum e^(z-m) (z - z_o)
    (and the same of the other distribution), a larger maximum m' rescales s by a = e^(m-m'), s2 by a^2, c by a, and
    t becomes a (t + (m - m') s). No result depends on m, so m carries no gradient.
    """
    vocab = this.weight.shape[0]
    count = -(-vocab // size)
    dtype = jnp.promote_types(this.weight.dtype, this.weight.dtype if pair is None else pair.weight.dtype)
    zero = jnp.zeros(targets.shape, dtype)
    low = jnp.full(targets.shape, jnp.finfo(dtype).min / 4, dtype)  # finite: 0 * (low - m) must stay 0
    need_p = "kl_policy_other" in want
    need_q = "kl_other_policy" in want

    @jax.checkpoint
    def step(carry, index, this, pair, temperature, hidden, hidden_other):
        first = index * size
        start = jnp.minimum(first, vocab - size)  # the last slice overlaps its neighbour; seen columns count nothing
        column = (start + jnp.arange(size)).reshape(1, 1, 1, size)
        fresh = column >= first
        z = jnp.where(fresh, this.logits(hidden, temperature, start, size).astype(dtype), low[..., None])
        new, rescale, shifted, weight = _advance(carry["m"], z)
        out = dict(carry, m=new, s=carry["s"] * rescale + weight.sum(-1))
        out["target"] = carry["target"] + jnp.sum(jnp.where(fresh & (column == targets[..., None]), z, 0), -1)
        if "entropy" in want:
            moved = rescale * (carry["t"] + jnp.where(carry["s"] > 0, carry["m"] - new, 0) * carry["s"])
            out["t"] = moved + jnp.sum(weight * jnp.where(fresh, shifted, 0), -1)
        if "log_sum_sq" in want:
            out["s2"] = carry["s2"] * rescale**2 + jnp.sum(weight**2, -1)
        if "max_logit" in want:
            out["top"] = jnp.maximum(carry["top"], z.max(-1))  # as m, but with its gradient
        if pair is not None:
            zo = jnp.where(fresh, pair.logits(hidden_other, temperature, start, size).astype(dtype), low[..., None])
            new_o, rescale_o, _, weight_o = _advance(carry["mo"], zo)
            out["mo"], out["so"] = new_o, carry["so"] * rescale_o + weight_o.sum(-1)
            if need_p:
                out["cp"] = carry["cp"] * rescale + jnp.sum(weight * (z - zo), -1)
            if need_q:
                out["cq"] = carry["cq"] * rescale_o + jnp.sum(weight_o * (zo - z), -1)
        return out

    carry = {"m": low, "s": zero, "target": zero}
    if "entropy" in want:
        carry["t"] = zero
    if "log_sum_sq" in want:
        carry["s2"] = zero
    if "max_logit" in want:
        carry["top"] = low
    if pair is not None:
        carry |= {"mo": low, "so": zero}
        carry |= ({"cp": zero} if need_p else {}) | ({"cq": zero} if need_q else {})
    carry, _ = jax.lax.scan(
        lambda c, i: (step(c, i, this, pair, temperature, hidden, hidden_other), None), carry, jnp.arange(count))
    log_s = jnp.log(carry["s"])
    lse = carry["m"] + log_s
    out = {}
    for name in want:
        if name == "logp":
            out[name] = _in_vocab(carry["target"] - lse, targets, vocab)
        elif name == "entropy":
            out[name] = log_s - carry["t"] / carry["s"]
        elif name == "log_sum_sq":
            out[name] = jnp.log(carry["s2"]) - 2 * log_s
        elif name == "log_z":
            out[name] = lse
        elif name == "max_logit":
            out[name] = carry["top"]
        elif name == "kl_other_policy":
            out[name] = carry["cq"] / carry["so"] + (lse - (carry["mo"] + jnp.log(carry["so"])))
        else:
            out[name] = carry["cp"] / carry["s"] + ((carry["mo"] + jnp.log(carry["so"])) - lse)
    return out


def _advance(maximum: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """New running maximum, factor for the old sums, z - maximum, and its exponential."""
    new = jax.lax.stop_gradient(jnp.maximum(maximum, z.max(-1)))
    shifted = z - new[..., None]
    return new, jnp.exp(jax.lax.stop_gradient(maximum) - new), shifted, jnp.exp(shifted)
