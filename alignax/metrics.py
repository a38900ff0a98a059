"""Where numbers go: metrics.jsonl always, TensorBoard beside it, a progress line on the terminal."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends one JSON object per (stage, step) to metrics.jsonl and writes the same scalars for TensorBoard.

    `resume_at`: lines of this stage at later steps are dropped first, so that a resumed run has each step once.
    active: False writes nothing, as all processes of a run but one.
    """

    def __init__(self, workdir: pathlib.Path | str, stage: str, *, resume_at: int = 0, active: bool = True):
        self.stage = stage
        self._file = self._board = None
        if not active:
            return
        workdir = pathlib.Path(workdir)
        path = workdir / "metrics.jsonl"
        if path.exists():
            keep = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the torn last line of a killed run
                if row["stage"] != stage or row["step"] <= resume_at:
                    keep.append(line)
            part = path.with_name("metrics.jsonl.part")
            part.write_text("".join(k + "\n" for k in keep), encoding="utf-8")
            part.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=resume_at + 1,
                                    write_to_disk=True)

    def write(self, step: int, values: Mapping[str, float], *, split: str = "train") -> None:
        """Writes the scalars of a step; `split` is train, eval, probe or diagnostics."""
        if self._file is None:
            return
        row = {"stage": self.stage, "split": split, "step": step} | {k: float(v) for k, v in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", float(value), step)

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._file is not None:
            self._file.close()
            self._board.close()


class Window:
    """Sums of metrics since they were last written; `state` goes into checkpoints, so that a resumed run averages the
    whole window and not only its later steps."""

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None):
        self._sums: dict[str, list[float]] = {k: list(v) for k, v in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the metrics of one step; a metric that a step lacks is averaged over the steps that have it."""
        for name, value in values.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += float(value)
            total[1] += 1

    def take(self) -> dict[str, float]:
        """The means, after which the window is empty."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def state(self) -> dict[str, list[float]]:
        """name -> [sum, count], as JSON holds it."""
        return {name: list(total) for name, total in self._sums.items()}


def read_metrics(workdir: pathlib.Path | str, *, stage: str | None = None, split: str | None = None) -> list[dict]:
    """The rows of metrics.jsonl, optionally of one stage and split."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [r for r in rows if (stage is None or r["stage"] == stage) and (split is None or r["split"] == split)]


def progress(console: Console, *, disable: bool = False) -> Progress:
    """A rich progress line: bar, count, elapsed and remaining time, then the numbers given as field `numbers`."""
    return Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                    TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
                    console=console, disable=disable or not console.is_terminal, transient=False)
