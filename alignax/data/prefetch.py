"""Batches of records read ahead by grain, in the order of alignax's plan.

The plan decides what is in global batch `step`; grain only fetches the batches early, in threads or worker
processes. Grain's own state is never needed: the position in the plan is the whole state, and iterating from it gives
the same batches on any number of processes, threads and workers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignax.data.plan import Plan
from alignax.data.records import Record
from alignax.types import ConfigError


class _Steps:
    """Grain's view of the plan: item i is batch `position + i` of this process."""

    def __init__(self, source: Sequence[Record], plan: Plan, position: int, process: int, processes: int,
                 transform: Callable[[list[Record]], Any] | None):
        self.source, self.plan, self.position, self.transform = source, plan, position, transform
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return sys.maxsize // 2  # a plan has no end

    def __getitem__(self, index: int) -> tuple[int, Any]:
        step = self.position + index
        chosen = [int(i) for i in self.plan.local_indices(step, self.process, self.processes)]
        many = getattr(self.source, "__getitems__", None)
        records = many(chosen) if many else [self.source[i] for i in chosen]
        return step, records if self.transform is None else self.transform(records)


def batches(source: Sequence[Record], plan: Plan, position: int = 0, *, process: int = 0, processes: int = 1,
            transform: Callable[[list[Record]], Any] | None = None, threads: int = 1, ahead: int = 2,
            workers: int = 0) -> Iterator[tuple[int, Any]]:
    """Endless (step, records of that batch) from global batch `position` on, read ahead.

    source: a `Store` or any sequence of plan.n records. process, processes: the share of every batch that is read
    here. transform: what to make of a batch's records (tokenising, laying out), in the reading thread or process.
    threads: batches read at once. ahead: batches kept ready. workers: reading processes instead of one thread pool;
    source and transform must be picklable then, and each worker starts a Python of its own.

    Raises ConfigError where source and plan differ in size, on a share that does not exist, on counts that are too
    small, and where grain is not installed.
    """
    if len(source) != plan.n:
        raise ConfigError(f"batches: the source has {len(source)} records, the plan orders {plan.n}")
    for name, value, least in (("position", position, 0), ("threads", threads, 1), ("ahead", ahead, 1),
                               ("workers", workers, 0)):
        if value < least:
            raise ConfigError(f"batches: {name} is {value}, expected at least {least}")
    plan.local_indices(position, process, processes)  # refuses an impossible share before any thread starts
    try:
        import grain
    except ImportError as error:
        raise ConfigError(f"batches: reading ahead needs grain ({error}); install it with: "
                          "pip install 'alignax[data]'") from error
    steps = grain.MapDataset.source(_Steps(source, plan, position, process, processes, transform))
    reading = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads)))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads its flags when it starts processes; outside absl nobody parsed
            flags.FLAGS.mark_as_parsed()
        reading = reading.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead))
    return iter(reading)
