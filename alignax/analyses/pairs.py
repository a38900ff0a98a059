"""Preference pairs under a model: log-probs, lengths and CHES of every pair, the same whatever it is batched with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from alignax import data, scoring, sharding, step
from alignax.diagnostics.ches import ches
from alignax.types import ConfigError

_SHORTEST = 16


@functools.partial(jax.jit, static_argnums=0)
def _numbers(spec: step.ModelSpec, params, reference, batch) -> dict[str, jax.Array]:
    """[B] or [B,2] each."""
    wanted = {"logps", "lengths", "hidden", "mask"} | ({"ref_logps"} if reference is not None else set())
    found = step.compute(spec, params, reference, batch, wanted)
    plain, normalised = ches(found["hidden"], found["mask"])
    out = {"ches": plain, "ches_normalised": normalised, "logp": found["logps"], "tokens": found["lengths"]}
    return out | ({"ref_logp": found["ref_logps"]} if reference is not None else {})


def why_not(record: data.TokenRecord) -> str:
    """Why a record is no pair that can be scored; "" where it is one."""
    if len(record.completions) != 2:
        count = len(record.completions)
        return f"{count} completion{'' if count == 1 else 's'}, not a pair"
    first, second = record.completions
    if np.array_equal(first, second):
        return "both completions are the same tokens"
    return "" if scoring.preferred(record) else "equal scores or labels: no preference"


def score(spec: step.ModelSpec, params, records: Sequence[data.TokenRecord], *, pad_id: int, reference=None,
          batch_size: int = 16, mesh: jax.sharding.Mesh | None = None,
          advance: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
    """Numbers of n pairs, float64: ches, ches_normalised [n] of the policy `params`; logp, tokens and, with a
    `reference` of the same shape, ref_logp [n,2], chosen first by what the record says of its two completions.

    A pair is computed in a shape that is a function of its own lengths, beside pairs of the same shape, so that its
    numbers do not depend on what else is scored. advance: called with the number of pairs done.
    Raises ConfigError for no records or one that is no pair (`why_not`), FloatingPointError naming the record whose
    numbers are not finite.
    """
    if not records or batch_size < 1:
        raise ConfigError(f"score: found {len(records)} records and batch_size {batch_size}, allowed: 1 or more")
    if wrong := next((r for r in records if why_not(r)), None):
        raise ConfigError(f"score: {wrong.place}: {why_not(wrong)}; allowed: two completions and a preference")
    mesh = sharding.make_mesh() if mesh is None else mesh
    ways = sharding.batch_ways(mesh)
    size = -(-batch_size // ways) * ways
    records = [scoring.as_pair(r) for r in records]
    out: dict[str, np.ndarray] = {}
    for (columns, slots), index in _batches(records, size):
        batch = data.padded([records[i] for i in index], K=2, T=columns, L=slots, pad_id=pad_id)
        found = _numbers(spec, params, reference, sharding.shard_batch(batch, mesh))
        for name, values in jax.device_get(found).items():
            place = out.setdefault(name, np.full((len(records), *values.shape[1:]), np.nan))
            place[index] = values  # repeats at the end of a batch write the same numbers again
        if advance:
            advance(len(set(index.tolist())))
    for name, values in out.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(records), -1)).all(1))
        if bad.size:
            raise FloatingPointError(f"{records[bad[0]].place}: {name} is {values[bad[0]]}")
    return out


def _batches(records: Sequence[data.TokenRecord], size: int) -> Iterable[tuple[tuple[int, int], np.ndarray]]:
    """((T, L), indices [size]) of batches whose shape is that of each of their pairs alone; repeats fill the last."""
    longest = max(len(r.prompt) + r.longest for r in records)
    sizes = [_SHORTEST]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    groups: dict[tuple[int, int], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(data.bucket_shape([record], (sizes, sizes)), []).append(i)
    for shape, members in sorted(groups.items()):
        for start in range(0, len(members), size):
            part = members[start:start + size]
            yield shape, np.asarray([part[i % len(part)] for i in range(size)])
