"""Mixtures: records of several sources in given proportions, in an order that is a function of (seed, epoch).

Each source gives an exact number of records, by largest remainders of its weight. The sources are spread evenly: with S
sources, any beginning of the mixture holds a source of share p in proportion up to 1 + S p records, so that a run that
stops early saw the mixture that was asked for. Within a source the order is shuffled; one that must give more records
than it has goes through all of them again, in another order.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from alignax.data.ledger import Ledger
from alignax.data.records import Record
from alignax.data.store import load_records
from alignax.types import ConfigError, DataError

PART_KEYS = ("path", "weight", "format", "split")
_SPREAD, _PASS = 2, 3  # names of the random streams; a plan uses 0 and 1 under the same seed


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Records of several sources. counts: how many each source gave. sizes: how many it has."""

    records: list[Record]
    counts: Mapping[str, int]
    sizes: Mapping[str, int]

    def table(self) -> Table:
        """A rich Table: source, records it has, records it gave, share of the mixture, passes over the source."""
        table = Table(title="mixture", title_justify="left")
        table.add_column("source")
        for column in ("has", "gives", "share", "passes"):
            table.add_column(column, justify="right")
        for name, count in self.counts.items():
            table.add_row(name, str(self.sizes[name]), str(count), f"{count / max(len(self.records), 1):.3f}",
                          f"{count / self.sizes[name]:.2f}")
        return table


def exact_counts(weights: Mapping[str, float], n: int) -> dict[str, int]:
    """n split in proportion to the weights, exactly: whole parts, then the largest remainders (ties by order).

    Raises ConfigError where a weight is negative or not finite, or all are 0.
    """
    bad = {name: weight for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if bad or not sum(weights.values()) > 0:
        raise ConfigError(f"mixture: the weights are {dict(weights)}; expected finite numbers >= 0, not all 0")
    if n < 1:
        raise ConfigError(f"mixture: n is {n}, expected at least 1")
    total = math.fsum(weights.values())
    exact = {name: n * weight / total for name, weight in weights.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    order = sorted(counts, key=lambda name: counts[name] - exact[name])  # stable
    for name in order[:n - sum(counts.values())]:
        counts[name] += 1
    return counts


def mixture(sources: Mapping[str, Sequence[Record]], weights: Mapping[str, float] | None = None, *,
            n: int | None = None, epochs: float | None = None, seed: int = 0, epoch: int = 0) -> Mixture:
    """Mixes sources. weights: name -> relative share of records; None: each source by its size.

    n: records of the mixture; or epochs: that many times the size of all sources together (1 where neither is
    given). seed, epoch: everything random depends on these alone; another epoch goes on where the one before stopped
    in every source. Ids become `source/id`, with `#2`, `#3`, ... where a record comes again in this mixture.

    Raises ConfigError on names in one mapping only, bad weights and sizes; DataError on an empty source with weight.
    """
    for name in sources:
        if not name or "/" in name:
            raise ConfigError(f"mixture: source name {name!r}; expected a non-empty name without '/'")
    weights = {name: float(len(part)) for name, part in sources.items()} if weights is None else weights
    if set(weights) != set(sources):
        raise ConfigError(f"mixture: weights name {sorted(weights)}, sources {sorted(sources)}; expected the same")
    if n is not None and epochs is not None:
        raise ConfigError(f"mixture: n is {n} and epochs is {epochs}; give one of them")
    if n is None:
        n = round((1.0 if epochs is None else epochs) * sum(map(len, sources.values())))
    counts = exact_counts({name: weights[name] for name in sources}, n)
    keys, taken = [], []
    for name, count in counts.items():
        part = sources[name]
        if not count:
            continue
        if not len(part):
            raise DataError(f"mixture: source {name!r} is empty, but weight {weights[name]} asks for {count} records")
        taken += _drawn(name, part, count, seed, epoch)
        draw = _generator(seed, epoch, _SPREAD, name)
        keys.append((np.arange(count) + draw.random(count)) / count)  # one record per equal stretch of the mixture
    order = np.argsort(np.concatenate(keys), kind="stable")
    return Mixture([taken[i] for i in order], counts, {name: len(part) for name, part in sources.items()})


def _generator(seed: int, epoch: int, stream: int, name: str) -> np.random.Generator:
    """Draws that belong to one source by its name, so that another source beside it changes none of them."""
    entropy = np.random.SeedSequence([seed, epoch, stream, zlib.crc32(name.encode("utf-8"))])
    return np.random.Generator(np.random.Philox(entropy))


def _drawn(name: str, part: Sequence[Record], count: int, seed: int, epoch: int) -> list[Record]:
    """`count` records of one source: positions epoch * count onwards of its endless stream of shuffled passes."""
    size, out, seen = len(part), [], collections.Counter()
    for position in range(epoch * count, (epoch + 1) * count):
        turn, place = divmod(position, size)
        if place == 0 or not out:
            order = _generator(seed, turn, _PASS, name).permutation(size)
        record = part[int(order[place])]
        seen[record.id] += 1
        again = f"#{seen[record.id]}" if seen[record.id] > 1 else ""
        out.append(dataclasses.replace(record, id=f"{name}/{record.id}{again}"))
    return out


def parse_mixture(spec: str | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> {path, weight, format, split} from a config's text or mapping.

    Text: `name=path` or `name=path@weight`, separated by semicolons (paths may hold anything but these; an `@` that no
    number follows belongs to the path). Mapping: name -> path, or name -> {"path", "weight", "format", "split"}.
    weight None (all of them): in proportion to the sources' sizes. Raises ConfigError on anything else.
    """
    if isinstance(spec, str):
        parts = [part.strip() for part in spec.split(";") if part.strip()]
        bad = [part for part in parts if not part.partition("=")[0].strip() or not part.partition("=")[2].strip()]
        if bad or not parts:
            raise ConfigError(f"mixture: found {bad[0] if bad else spec!r}; expected name=path[@weight]; ...")
        names = [part.partition("=")[0].strip() for part in parts]
        if len(set(names)) != len(names):
            raise ConfigError(f"mixture: a name stands twice in {names}")
        spec = {name: _text_part(part.partition("=")[2].strip()) for name, part in zip(names, parts, strict=True)}
    if not spec:
        raise ConfigError("mixture: no source; expected name=path[@weight]; ... or a mapping of names")
    out = {}
    for name, value in spec.items():
        part = {"path": value} if isinstance(value, str) else dict(value)
        unknown = sorted(part.keys() - set(PART_KEYS))
        if unknown or not part.get("path"):
            raise ConfigError(f"mixture: source {name!r} has {sorted(part)}; expected path, and any of "
                              f"{list(PART_KEYS[1:])}")
        out[name] = {"path": part["path"], "weight": part.get("weight"), "format": part.get("format") or "auto",
                     "split": part.get("split") or None}
    weighted = [name for name, part in out.items() if part["weight"] is not None]
    if weighted and len(weighted) < len(out):
        raise ConfigError(f"mixture: {weighted} have weights and {sorted(set(out) - set(weighted))} have none; give "
                          "all sources a weight or none")
    return out


def _text_part(text: str) -> dict[str, Any]:
    path, at, weight = text.rpartition("@")
    try:
        return {"path": path, "weight": float(weight)} if at and path else {"path": text}
    except ValueError:
        return {"path": text}


def load_mixture(spec: str | Mapping[str, Any], *, n: int | None = None, epochs: float | None = None, seed: int = 0,
                 epoch: int = 0, on_identical: str = "error", ledger: Ledger | None = None) -> Mixture:
    """The mixture that a config's text or mapping describes (see `parse_mixture`, `mixture`), read from its files."""
    parts = parse_mixture(spec)
    sources = {name: load_records(part["path"], format=part["format"], split=part["split"], on_identical=on_identical,
                                  ledger=ledger) for name, part in parts.items()}
    weights = {name: part["weight"] for name, part in parts.items()}
    return mixture(sources, None if None in weights.values() else weights, n=n, epochs=epochs, seed=seed, epoch=epoch)
