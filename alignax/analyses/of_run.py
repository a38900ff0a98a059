"""What the analyses of a run share: a finished preference stage with both its ends, pairs of its data, and a result."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from alignax import context, data, examine, losses, sharding
from alignax.types import REQUESTS, Batch, ConfigError

_CHUNK = 8  # pairs at a time


class Result(NamedTuple):
    """What an analysis found. numbers: plain JSON. title, headings, rows: a table whose first column holds names.
    notes: lines below it. draw(path) writes the figure and returns its path."""

    numbers: dict[str, Any]
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str]
    draw: Callable[[pathlib.Path], pathlib.Path]


class Stage(NamedTuple):
    """A finished preference stage. before, after: parameters {"model": ...} that it began with (those of the stage
    `init`) and ended with, adapters merged. stages: the run's finished train stages, in order. records: pairs of
    different prompts, spread evenly over its training data, chosen first."""

    ctx: context.Context
    name: str
    init: str
    section: dict[str, Any]
    stages: list[str]
    before: Any
    after: Any
    records: list[data.TokenRecord]

    def batches(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """(indices, batch of as many pairs) in one shape; the last is filled up with repeats of the first records."""
        columns, slots = data.bucket_shape(self.records, 8)
        size = min(_CHUNK, len(self.records))
        for first in range(0, len(self.records), size):
            index = np.arange(first, first + size) % len(self.records)
            batch = data.padded([self.records[i] for i in index], K=2, T=columns, L=slots, pad_id=self.ctx.text.pad_id)
            yield index, sharding.shard_batch(batch, self.ctx.mesh)

    def each(self, function: Callable[[Batch], dict[str, jax.Array]]) -> dict[str, np.ndarray]:
        """Arrays [n, ...] of a function of a batch that returns arrays with a leading axis of its pairs."""
        out: dict[str, np.ndarray] = {}
        for index, batch in self.batches():
            for name, values in jax.device_get(function(batch)).items():
                out.setdefault(name, np.zeros((len(self.records), *values.shape[1:]), values.dtype))[index] = values
        return out

    def text(self, n: int, k: int, width: int = 60) -> str:
        """The beginning of completion k of pair n."""
        ids = [int(i) for i in self.records[n].completions[k] if int(i) not in self.ctx.text.eos_ids]
        said = self.ctx.tokenizer.decode_completion(self.records[n].prompt.tolist(), ids).strip().replace("\n", " ")
        return said if len(said) <= width else said[:width - 1] + "…"


def open_stage(folder: pathlib.Path, stage: str, *, prompts: int) -> Stage:
    """The preference stage of a run's folder: the one named, else the last finished one, with up to `prompts` pairs.

    Raises ConfigError where the folder holds no run or no such stage, DataError where no record has two
    completions.
    """
    ctx, config = examine.open_run(folder, Console(quiet=True))
    name = examine.choose(folder, config, stage)[-1]
    section = config[name].to_dict()
    records, init = examine.pair_records(ctx, config, name, section)
    return Stage(ctx, name, init, section, context.finished_stages(folder, config.stages), ctx.params_of(init),
                 ctx.params_of(name), examine.spread(records, prompts, name))


def loss_of_pairs(stage: Stage, *, single: bool = False) -> losses.Loss:
    """The stage's loss, where it can be computed on pairs and two sets of parameters alone.

    single: it must also be a function of one pair at a time. Raises ConfigError naming what else it reads.
    """
    loss = losses.from_section(stage.section["loss"])
    other = [n for n in loss.requests if REQUESTS[n].stream != "pair"
             or REQUESTS[n].provider not in ("data", "policy", "reference")]
    if single and loss.info.couples_batch:
        raise ConfigError(f"{stage.name}: its loss {loss.name} of a pair depends on the other pairs of the batch; "
                          "allowed here: losses that are a mean over pairs")
    if other:
        raise ConfigError(f"{stage.name}: its loss {loss.name} also reads {', '.join(sorted(set(other)))}; allowed "
                          "here: losses of the pair's own log-probs under policy and reference")
    return loss
