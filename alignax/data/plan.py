"""The order of the data, as a function of (seed, epoch) alone.

The epochs' permutations are laid end to end into one endless stream, and global batch `step` is positions
step * B to step * B + B - 1 of it. Batches run across the borders of epochs, so nothing is dropped and nothing
padded; a position in the plan is one integer, and the same on any number of processes.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from alignax.types import ConfigError

_ORDER, _WINDOW = 0, 1  # names of the two independent random streams of a plan
_CACHE = 4  # epochs whose order is kept: a batch touches at most a few


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) for one epoch, int64 [n]; depends on (seed, epoch) and n only."""
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < least:
            raise ConfigError(f"epoch_order: {name} is {value}, expected at least {least}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, _ORDER]))).permutation(n)


@dataclasses.dataclass
class Plan:
    """The global order of n records in batches of `batch_size`.

    shuffle: False keeps the file's order in every epoch. lengths: int [n], optional; then the records of each
    `window` consecutive batches are regrouped by length, so that a batch needs little padding, and the window's
    batches are shuffled. Grouping permutes inside a window, so each record still comes once per epoch's worth.
    """

    n: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    lengths: np.ndarray | None = None
    window: int = 1

    def __post_init__(self):
        for name, least in (("n", 1), ("batch_size", 1), ("seed", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"Plan: {name} is {getattr(self, name)}, expected at least {least}")
        if self.lengths is not None and np.shape(self.lengths) != (self.n,):
            raise ConfigError(f"Plan: lengths has shape {np.shape(self.lengths)}, expected ({self.n},)")
        if self.lengths is None and self.window != 1:
            raise ConfigError(f"Plan: window is {self.window}, but only a plan with lengths regroups; expected 1")
        self._orders: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def num_steps(self, epochs: float) -> int:
        """Batches that hold every record `epochs` times at least: the last runs on into the next epoch.

        With `lengths` the count is rounded up to whole windows, outside which a regrouped record might not have come.
        """
        steps = -(-int(np.ceil(epochs * self.n)) // self.batch_size)
        return -(-steps // self.window) * self.window

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.n)
        if epoch not in self._orders:
            self._orders[epoch] = epoch_order(self.n, self.seed, epoch)
            while len(self._orders) > _CACHE:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _span(self, start: int, stop: int) -> np.ndarray:
        """Positions start to stop - 1 of the endless stream."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            parts.append(self._order(epoch)[offset:offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def batch_indices(self, step: int) -> np.ndarray:
        """Record indices of global batch `step`, int64 [batch_size]; any step can be asked for directly."""
        if step < 0:
            raise ConfigError(f"Plan.batch_indices: step is {step}, expected at least 0")
        size = self.batch_size
        if self.lengths is None:
            return self._span(step * size, (step + 1) * size)
        window, place = divmod(step, self.window)
        span = self._span(window * self.window * size, (window + 1) * self.window * size)
        span = span[np.argsort(np.asarray(self.lengths)[span], kind="stable")]
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, window, _WINDOW])))
        return span.reshape(self.window, size)[draw.permutation(self.window)[place]]

    def local_indices(self, step: int, process: int, processes: int) -> np.ndarray:
        """The contiguous share of batch `step` that belongs to one process, int64 [batch_size / processes]."""
        if processes < 1 or self.batch_size % processes or not 0 <= process < processes:
            raise ConfigError(f"Plan.local_indices: batch_size {self.batch_size}, process {process} of {processes}; "
                              "expected processes to divide batch_size and 0 <= process < processes")
        share = self.batch_size // processes
        return self.batch_indices(step)[process * share:(process + 1) * share]

    def batches(self, position: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Endless (step, indices) from global batch `position` on."""
        while True:
            yield position, self.batch_indices(position)
            position += 1

    def sequence(self, steps: int, position: int = 0) -> Iterator[np.ndarray]:
        """The indices of `steps` batches from global batch `position` on: what a plan's shapes are measured on."""
        return (self.batch_indices(step) for step in range(position, position + steps))

    def _identity(self) -> dict[str, int]:
        # lengths decide the grouping, so a checksum of them is part of the plan
        lengths = 0 if self.lengths is None else zlib.crc32(np.asarray(self.lengths, "<i8").tobytes())
        return {"n": self.n, "batch_size": self.batch_size, "seed": self.seed, "shuffle": int(self.shuffle),
                "window": self.window, "lengths": lengths}

    def state(self, position: int) -> dict[str, int]:
        """What a checkpoint stores: the plan's identity, the position (batches done) and the epoch it lies in."""
        return self._identity() | {"position": position, "epoch": position * self.batch_size // self.n}

    def resume(self, state: Mapping[str, int]) -> int:
        """The stored position; ConfigError where the plan is not the one that the state was taken from."""
        for name, value in self._identity().items():
            if name not in state or int(state[name]) != value:
                raise ConfigError(f"Plan.resume: {name} was {state.get(name)!r} when the state was stored and is "
                                  f"{value} now; the order of the data would differ")
        return int(state["position"])
