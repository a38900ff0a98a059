"""Numbers of given completions under a policy: log-probs, entropy, KL to a reference, rewards, and their summaries.

`score` runs the trainer's own forward pass over token records, longest ones apart from short ones, and returns arrays
[n, K] in float64, NaN where a completion is absent. The rest is arithmetic on them: what is preferred to what, accuracy
with an interval over records, summaries by side, and one row per completion.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from scipy.stats import rankdata

from alignax import data, sharding, step
from alignax.diagnostics.compare import wilson
from alignax.types import ConfigError

_REFERENCE = {"ref_logps": "ref_logp", "policy_ref_kl": "kl_policy_ref", "ref_policy_kl": "kl_ref_policy"}
_POLICY = {"logps": "logp", "entropy": "entropy", "lengths": "tokens"}
_SHORTEST = 16


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(spec: step.ModelSpec, wanted: tuple[str, ...], params, reference, batch) -> dict[str, jax.Array]:
    """Requests summed over tokens, [B,K] each."""
    arrays = step.compute(spec, params, reference, batch, wanted)
    return {name: array if array.ndim == 2 else array.sum(-1) for name, array in arrays.items()}


def _buckets(longest: int) -> list[int]:
    """Sizes that double up to the first that holds `longest`: few programs, at most half of a row empty."""
    sizes = [_SHORTEST]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return sizes


def score(spec: step.ModelSpec, params, records: Sequence[data.TokenRecord], *, pad_id: int, reference=None,
          batch_size: int = 16, mesh: jax.sharding.Mesh | None = None,
          advance: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
    """Sums over the scored tokens of every completion: name -> float64 [n, K], NaN where there is no completion.

    Always logp, entropy (of the policy's next-token distributions, nats) and tokens. With `reference` (parameters of
    the same shape, run in the same program): ref_logp, kl_policy_ref = KL(policy || reference) and kl_ref_policy, exact
    over the vocabulary at the data's prefixes. Where params holds `reward_head`: head_reward, read at the last token.
    records: with one completion or more each. batch_size: records at a time, rounded up to the devices of `mesh` (all
    of them by default). advance: called with the number of records done.
    Raises ConfigError for no records or a record without completions, FloatingPointError naming the record whose
    numbers are not finite.
    """
    if not records or not all(record.completions for record in records):
        raise ConfigError("score(records=): found none, or one without completions; allowed: one or more with some")
    mesh = sharding.make_mesh() if mesh is None else mesh
    ways = sharding.batch_ways(mesh)
    names = _POLICY | (_REFERENCE if reference is not None else {})
    if "reward_head" in params:
        names = names | {"rewards": "head_reward"}
    width = max(len(record.completions) for record in records)
    out = {name: np.full((len(records), width), np.nan) for name in names.values()}
    for index in _batches(records, batch_size, ways):
        rows = [records[i] for i in index]
        K = len(rows[0].completions)
        buckets = _buckets(max(len(r.prompt) + r.longest for r in rows))
        T, L = data.bucket_shape(rows, (buckets, buckets))
        batch = sharding.shard_batch(data.padded(rows, K=K, T=T, L=L, pad_id=pad_id), mesh)
        for name, sums in jax.device_get(_sums(spec, tuple(names), params, reference, batch)).items():
            out[names[name]][index, :K] = sums  # repeats at the end of a batch write the same numbers again
        if advance:
            advance(len(set(index.tolist())))
    exists = np.arange(width) < np.asarray([[len(r.completions)] for r in records])
    for name, values in out.items():
        bad = np.argwhere(exists & ~np.isfinite(values))
        if bad.size:
            n, k = bad[0]
            raise FloatingPointError(f"{records[n].place}: completion {k}: {name} is {values[n, k]}")
    return out


def _batches(records: Sequence[data.TokenRecord], batch_size: int, ways: int) -> Iterable[np.ndarray]:
    """Indices of batches of one length: records with equally many completions, by length; the last one is filled up
    with repeats, so that it needs no program of its own."""
    if batch_size < 1:
        raise ConfigError(f"score(batch_size=): found {batch_size}, allowed: 1 or more")
    for K in sorted({len(r.completions) for r in records}):
        alike = [i for i, r in enumerate(records) if len(r.completions) == K]
        alike.sort(key=lambda i: len(records[i].prompt) + records[i].longest)
        size = -(-min(batch_size, len(alike)) // ways) * ways
        for start in range(0, len(alike), size):
            part = alike[start:start + size]
            yield np.asarray([part[i % len(part)] for i in range(size)])


def preferred(record: data.TokenRecord) -> list[tuple[int, int]]:
    """(better, worse) completions of a record: by scores, else by labels, else by their order, best first. Equal
    scores or labels state no preference."""
    count, rank = len(record.completions), record.scores or record.labels
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return [(i, j) for i, j in pairs if (i < j if rank is None else rank[i] > rank[j])]


def as_pair(record: data.TokenRecord) -> data.TokenRecord | None:
    """The record cut down to two completions, the better one first, with all that it says of them; None where it
    states no preference. Of a list: its best completion and the next that is worse."""
    count = len(record.completions)
    rank = record.scores or record.labels or range(count, 0, -1)
    best = max(range(count), key=rank.__getitem__)
    worse = [k for k in range(count) if rank[k] < rank[best]]
    if not worse:
        return None
    return only(record, (best, max(worse, key=rank.__getitem__)))


def only(record: data.TokenRecord, keep: Sequence[int]) -> data.TokenRecord:
    """The record with the completions `keep`, in that order, and all that it says of them."""
    of = lambda values: None if values is None else tuple(values[k] for k in keep)
    return dataclasses.replace(
        record, completions=of(record.completions), completion_ended=of(record.completion_ended),
        scores=of(record.scores), labels=of(record.labels), scored=of(record.scored),
        columns={name: of(values) for name, values in record.columns.items()})


def accuracy(values: np.ndarray, pairs: Sequence[Sequence[tuple[int, int]]]) -> dict[str, float] | None:
    """How often the better completion has the greater value, ties counted half; None where nothing is preferred.

    values: [n, K]; pairs: for each of the n records its (better, worse). A record counts once however many pairs it
    holds, since they are not independent: `accuracy` and `margin` are means over records of means over their pairs,
    low and high the 95% Wilson interval over records, margin_se the standard error over records (NaN for one).
    """
    shares, margins, ties, count = [], [], 0, 0
    for row, own in zip(values, pairs, strict=True):
        if not own:
            continue
        gaps = np.asarray([row[i] - row[j] for i, j in own])
        shares.append(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
        margins.append(gaps.mean())
        ties, count = ties + int((gaps == 0).sum()), count + len(own)
    if not shares:
        return None
    rate, n = float(np.mean(shares)), len(shares)
    low, high = wilson(rate, n)
    error = float(np.std(margins, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {"accuracy": rate, "low": low, "high": high, "records": n, "pairs": count, "ties": ties,
            "margin": float(np.mean(margins)), "margin_se": error}


def label_auc(values: np.ndarray, records: Sequence[data.TokenRecord]) -> float | None:
    """Probability that a desirable completion has a greater value than an undesirable one, over all completions with
    labels, ties counted half (the area under the ROC curve); None where one of the two kinds is absent."""
    found = [(values[n, k], label) for n, r in enumerate(records) for k, label in enumerate(r.labels or ())]
    good = np.asarray([label > 0 for _, label in found], bool)
    positives, negatives = int(good.sum()), int((~good).sum())
    if not positives or not negatives:
        return None
    ranks = rankdata([value for value, _ in found])
    return float((ranks[good].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def measures(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What completions are ranked by, [n, K] each: logp, logp_per_token, log_ratio (the implicit reward without its
    beta, where there is a reference), head_reward and reward where there are any, and tokens (the longer one wins)."""
    out = {"logp": values["logp"], "logp_per_token": _per_token(values["logp"], values["tokens"])}
    if "ref_logp" in values:
        out["log_ratio"] = values["logp"] - values["ref_logp"]
    return out | {name: values[name] for name in ("head_reward", "reward", "tokens") if name in values}


def _per_token(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return sums / np.where(tokens == 0, np.nan, tokens)


def side(record: data.TokenRecord, k: int) -> str:
    """The kind of completion k: (un)desirable by its label, chosen or rejected of a pair, best or others of a list."""
    if record.labels is not None:
        return "desirable" if record.labels[k] > 0 else "undesirable"
    count = len(record.completions)
    names = {1: ("completion",), 2: ("chosen", "rejected")}.get(count, ("best", "others"))
    return names[min(k, len(names) - 1)]


def by_side(records: Sequence[data.TokenRecord], values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """side -> means over its completions: logp and ref_logp per sequence, logp_per_token, entropy and the two KLs per
    token (sums over all scored tokens divided by their number), perplexity = exp(-logp_per_token), lengths in scored
    tokens, the share that closes with an end token, rewards."""
    places: dict[str, list[tuple[int, int]]] = {}
    for n, record in enumerate(records):
        for k in range(len(record.completions)):
            places.setdefault(side(record, k), []).append((n, k))
    out = {}
    for name, where in places.items():
        take = {key: np.asarray([array[n, k] for n, k in where]) for key, array in values.items()}
        tokens = take["tokens"].sum()
        per_token = lambda key, take=take, tokens=tokens: float(take[key].sum() / tokens)
        found = {"completions": len(where), "tokens": int(tokens), "logp": float(take["logp"].mean()),
                 "logp_per_token": per_token("logp"), "perplexity": float(np.exp(-per_token("logp"))),
                 "entropy_per_token": per_token("entropy"), "length_mean": float(take["tokens"].mean()),
                 "length_median": float(np.median(take["tokens"])), "length_max": int(take["tokens"].max()),
                 "ended": float(np.mean([records[n].completion_ended[k] for n, k in where]))}
        if "ref_logp" in take:
            found |= {"ref_logp": float(take["ref_logp"].mean()),
                      "log_ratio": float((take["logp"] - take["ref_logp"]).mean()),
                      "kl_policy_ref_at_data_prefixes": per_token("kl_policy_ref"),
                      "kl_ref_policy_at_data_prefixes": per_token("kl_ref_policy")}
        out[name] = found | {key: float(take[key].mean()) for key in ("head_reward", "reward") if key in take}
    return out


def summary(records: Sequence[data.TokenRecord], values: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """{"sides": by_side, "preferences": {measure: accuracy}, "label_auc": {measure: area}}; the last two are empty
    where the records state no preference or have no labels of both kinds."""
    pairs, ranked = [preferred(record) for record in records], measures(values)
    accuracies = {name: accuracy(array, pairs) for name, array in ranked.items()}
    areas = {name: label_auc(array, records) for name, array in ranked.items()}
    return {"sides": by_side(records, values),
            "preferences": {name: found for name, found in accuracies.items() if found is not None},
            "label_auc": {name: found for name, found in areas.items() if found is not None}}


def rows(records: Sequence[data.TokenRecord], values: Mapping[str, np.ndarray]) -> list[dict]:
    """One JSON object per completion: where it stands and its numbers, sums over tokens in nats."""
    out = []
    for n, record in enumerate(records):
        for k in range(len(record.completions)):
            row = {"id": record.id, "place": record.place, "completion": k, "side": side(record, k),
                   "ended": record.completion_ended[k]}
            row |= {name: int(array[n, k]) if name == "tokens" else float(array[n, k])
                    for name, array in values.items()}
            out.append(row)
    return out


def wins(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How often one of our samples beats one of theirs on the same prompt, ties counted half.

    ours [n, N], theirs [n, M]: rewards. The rate is a mean over prompts of means over all N M comparisons; the 95%
    Wilson interval is over the n prompts.
    """
    gaps = ours[:, :, None] - theirs[:, None, :]
    rate = float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
    low, high = wilson(rate, len(ours))
    return {"win_rate": rate, "low": low, "high": high, "prompts": len(ours)}
