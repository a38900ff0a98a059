"""Scalar heads on hidden states: rewards at the last completion token, values at every position.

A slot (b,k,l) of a stream names the column whose hidden state *predicts* token l, one before the token itself. A
reward must read the state *at* the last completion token, which has seen the whole completion; `last_token_positions`
finds that column in any layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Array, DataError, Stream


def init_scalar_head(key: Array, hidden_size: int, *, zero: bool = False, dtype=jnp.float32) -> dict[str, Array]:
    """{"weight": [D], "bias": []}: the weight normal with standard deviation 1/sqrt(D+1), as in the reward models of
    "Learning to summarize from human feedback" (arXiv 2009.01325); all zeros with zero=True (value heads that start
    from no opinion)."""
    weight = jnp.zeros((hidden_size,), dtype)
    if not zero:
        weight = (jax.random.normal(key, (hidden_size,), jnp.float32) * (hidden_size + 1) ** -0.5).astype(dtype)
    return {"weight": weight, "bias": jnp.zeros((), dtype)}


def scalar_head(params: dict[str, Array], hidden: Array) -> Array:
    """hidden [..., D] -> [...]: hidden . weight + bias, accumulated in float32 (or wider)."""
    full = jnp.promote_types(jnp.float32, hidden.dtype)
    return jnp.einsum("...d,d->...", hidden.astype(full), params["weight"].astype(full)) + params["bias"].astype(full)


def last_token_positions(stream: Stream) -> tuple[Array, Array]:
    """(row, col), int32 [B,K]: where the last scored token of each completion itself stands; row counts in the group.

    Let (r, c) be the place that predicts it. If column c+1 continues the segment of column c, the token is there:
    always so in padded and packed rows, and inside a completion of a shared-prefix row. Otherwise the completion is a
    single token predicted from the end of a shared prefix: the token is the first column after c that opens another
    segment, has the segment of c as its prefix, and holds the target. Where several completions open
    with that token, their first columns have the same context and position, hence the same hidden state: the first of
    them is returned, and which one it is does not matter.

    Completions without a scored slot, or not valid, get (0, 0). Where the token is not in its row (a layout that
    leaves the last token out), col is T: numpy streams raise DataError naming the completion, and under a trace
    last_token_rewards returns NaN, since a trace cannot raise.
    """
    rows, columns = stream.tokens.shape
    batch, _, length = stream.targets.shape
    grid = lambda a: jnp.asarray(a).reshape(stream.groups, rows // stream.groups, columns)
    # Row b of the batch lies in group b // (B/G); all look-ups stay inside the group.
    slots = lambda a: jnp.asarray(a).reshape(stream.groups, batch // stream.groups, *a.shape[1:])
    scored = jnp.asarray(stream.mask) & jnp.asarray(stream.valid)[:, :, None]
    exists = scored.any(axis=-1)
    last = jnp.where(scored, jnp.arange(length)[None, None, :], 0).max(axis=-1)
    take = lambda a: jnp.take_along_axis(jnp.asarray(a), last[:, :, None], axis=-1)[:, :, 0]

    def find(tokens, segment, prefix, row, col, target):
        """One completion inside one group: [R/G,T] grids and three scalars -> the token's column, or T."""
        seg, pre, tok = segment[row], prefix[row], tokens[row]
        index = jnp.arange(columns)
        own = seg[col]
        following = jnp.minimum(col + 1, columns - 1)
        continues = (col + 1 < columns) & (seg[following] == own) & (tok[following] == target)
        opens = (seg != jnp.roll(seg, 1)) & (seg > 0) & (seg != own) & (pre == own) & (index > col) & (tok == target)
        return jnp.where(continues, following, jnp.where(opens.any(), jnp.argmax(opens), columns))

    over_k = jax.vmap(find, in_axes=(None, None, None, 0, 0, 0))
    over_b = jax.vmap(over_k, in_axes=(None, None, None, 0, 0, 0))
    row = take(stream.row)
    col = jax.vmap(over_b)(grid(stream.tokens), grid(stream.segment), grid(stream.prefix), slots(row),
                           slots(take(stream.col)), slots(take(stream.targets))).reshape(row.shape)
    row, col = jnp.where(exists, row, 0).astype(jnp.int32), jnp.where(exists, col, 0).astype(jnp.int32)
    if isinstance(stream.tokens, np.ndarray) and not isinstance(col, jax.core.Tracer):
        absent = np.argwhere(np.asarray(col) >= columns)
        if absent.size:
            raise DataError(f"last_token_positions: the last scored token of completion (b, k) = "
                            f"{tuple(absent[0].tolist())} is not in its row of {columns} columns; a reward head needs "
                            "layouts that keep the last completion token")
    return row, col


def gather_last(hidden: Array, stream: Stream) -> Array:
    """hidden [R,T,D] -> [B,K,D], the state at each completion's last scored token; NaN where it is not in its row."""
    row, col = last_token_positions(stream)
    batch, completions = row.shape
    cut = lambda a, n: a.reshape(stream.groups, n // stream.groups, *a.shape[1:])
    pick = jax.vmap(lambda h, r, c: h.at[r, c].get(mode="fill", fill_value=jnp.nan))
    out = pick(cut(hidden, hidden.shape[0]), cut(row, batch), cut(col, batch))
    return out.reshape(batch, completions, hidden.shape[-1])


def last_token_rewards(params: dict[str, Array], hidden: Array, stream: Stream) -> Array:
    """Scalar reward [B,K] (float32) of each completion, read at its last scored token.

    hidden: [R,T,D], the decoder's states of the stream's rows (not the gathered predicting slots, which stop one
    token early). Completions that do not exist or have no scored token get 0 and no gradient.
    """
    exists = jnp.asarray(stream.valid) & jnp.asarray(stream.mask).any(axis=-1)
    return jnp.where(exists, scalar_head(params, gather_last(hidden, stream)), 0.0)
