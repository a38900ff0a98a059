"""What the benchmarks share: the model and the pairs that all read, workers, interleaved rounds, tables, JSON.

A driver starts one process per contender. Each loads the same checkpoint and the same token ids, compiles, and tells
its log-probs; nothing is timed before they agree. Then rounds: in each, every contender runs a few steps, another one
first each time, so that a slow moment of a shared machine hits all alike. Ratios are taken inside a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from wire import write_pairs

from alignax.types import DataError

HERE = pathlib.Path(__file__).resolve().parent
EOS = 2
LIMIT = 900.0  # seconds that one answer may take


@dataclasses.dataclass(frozen=True)
class Shape:
    """A random Llama. Its rotary base is 1,000,000: Tunix 0.1.7 rotates with that base whatever its config says, and
    the parity gate refuses any other."""

    layers: int = 8
    width: int = 512
    inner: int = 1408
    vocab: int = 32_000
    heads: int = 8
    positions: int = 4096

    def decoder(self) -> Any:
        """The DecoderConfig, output matrix untied."""
        from alignax.models import DecoderConfig

        return DecoderConfig(vocab_size=self.vocab, hidden_size=self.width, intermediate_size=self.inner,
                             num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.heads,
                             head_dim=self.width // self.heads, tie_embeddings=False, max_positions=self.positions,
                             rope_theta=1e6)


TOY = Shape(layers=2, width=32, inner=64, vocab=96, heads=2, positions=512)


def make_model(folder: pathlib.Path, shape: Shape, seed: int = 0) -> int:
    """Writes a random Llama as a Hugging Face folder; returns the number of its parameters."""
    import jax

    from alignax import models

    params = models.init_params(shape.decoder(), jax.random.key(seed))
    models.save(folder, shape.decoder(), params, eos_token_id=EOS, overwrite=True)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def make_pairs(path: pathlib.Path, lengths: Sequence[tuple[int, int, int]], vocab: int, seed: int = 0) -> None:
    """Random ids of the given lengths (prompt, chosen, rejected), every completion closed by EOS."""
    draw = np.random.default_rng(seed)
    ids = lambda count: draw.integers(3, vocab, count).tolist()
    write_pairs(path, [(ids(p), [*ids(c - 1), EOS], [*ids(r - 1), EOS]) for p, c, r in lengths])


def workplace() -> tempfile.TemporaryDirectory:
    """A folder for checkpoint, pairs and logs, removed at the end."""
    return tempfile.TemporaryDirectory(prefix="alignax_bench_")


class WorkerFailed(RuntimeError):
    """A contender that could not run; the message is the end of what it said."""


class Worker:
    """One contender in a process of its own."""

    def __init__(self, name: str, python: str, script: str, settings: Mapping[str, Any], folder: pathlib.Path):
        self.name, self.settings = name, dict(settings)
        self.log = folder / f"{name.replace(' ', '_').replace(',', '').replace('/', '_')}.log"
        # The compilation cache stays off: a compilation is part of what is measured.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                                    "TQDM_DISABLE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        with open(self.log, "w", encoding="utf-8") as sink:
            try:
                self.process = subprocess.Popen([python, str(HERE / script)], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, stderr=sink, text=True, env=environment)
            except OSError as error:
                raise WorkerFailed(f"{python}: {error.strerror}") from error

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Sends an order and waits for its answer. Raises WorkerFailed where the worker ends or takes too long."""
        try:
            self.process.stdin.write(json.dumps({"do": do} | order) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
            line = self.process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(self.last_words() or f"no answer within {LIMIT:.0f} seconds")
        return json.loads(line)

    def last_words(self) -> str:
        """The last line of its log."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who runs: a name for the tables, its python ("" where none was given), its script and its settings."""

    name: str
    python: str
    script: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Ring:
    """The contenders that could be started, with their answers to `load` (`shared` and their own settings), their logs
    in `folder`; a context manager that ends them all."""

    def __init__(self, contenders: Iterable[Contender], folder: pathlib.Path, console: Console, **shared: Any):
        self.workers: list[Worker] = []
        self.loaded: dict[str, dict[str, Any]] = {}
        self.absent: dict[str, str] = {}
        for one in contenders:
            if not one.python:
                self.absent[one.name] = "no python executable was given for it"
                continue
            with console.status(f"{one.name}: loads and compiles"):
                worker = None
                try:
                    worker = Worker(one.name, one.python, one.script, one.settings, folder)
                    self.loaded[one.name] = worker.ask("load", **shared | dict(one.settings))
                    self.workers.append(worker)
                except WorkerFailed as error:
                    self.absent[one.name] = str(error)
                    if worker is not None:
                        worker.close()
                    console.print(f"{one.name} could not run: {error}")

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers:
            worker.close()

    def all(self, do: str, **order: Any) -> dict[str, dict[str, Any]]:
        """The same order to everybody, one after another."""
        return {worker.name: worker.ask(do, **order) for worker in list(self.workers)}

    def rounds(self, times: int, console: Console, do: str, **order: Any) -> dict[str, list[dict[str, Any]]]:
        """`times` rounds of an order, another contender first in each; name -> its answers."""
        answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in self.workers}
        for number in range(times):
            turn = number % max(len(self.workers), 1)
            for worker in self.workers[turn:] + self.workers[:turn]:
                with console.status(f"round {number + 1} of {times}: {worker.name}"):
                    answers[worker.name].append(worker.ask(do, **order))
        return answers


def gate(found: Mapping[str, Sequence[float]], allowed: float, what: str) -> dict[str, float]:
    """How far each contender is from the first one. Raises DataError, and nothing is timed, beyond `allowed` plus
    four units in the last place of a float32 of that size (a sum of 2,000 nats cannot be told better)."""
    names = list(found)
    first = np.asarray(found[names[0]], np.float64)
    room = allowed + 4 * np.spacing(np.abs(first).astype(np.float32)).astype(np.float64)
    apart = {}
    for name in names:
        difference = np.abs(np.asarray(found[name], np.float64) - first)
        apart[name] = float(difference.max())
        if not (difference <= room).all():
            raise DataError(f"{what} of {name} differ from those of {names[0]} by {apart[name]:.2e}, allowed "
                            f"{float(room.min()):.2e}; nothing was timed")
    return apart


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    return tuple(float(q) for q in np.quantile(np.asarray(list(values), float), (0.25, 0.5, 0.75)))


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median of the rounds' own ratios, with quartiles, as text."""
    return spread(np.asarray(above, float) / np.asarray(below, float))


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median with quartiles, as text."""
    return written(quartiles(values), digits)


def written(found: tuple[float, float, float], digits: int = 2) -> str:
    """What quartiles found, as text: the median, then the quartiles."""
    low, middle, high = found
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def megabytes(count: float | None) -> str:
    """Bytes as MB, a dash where unknown."""
    return "-" if count is None else f"{count / 1e6:,.0f}"


def machine() -> dict[str, Any]:
    """The machine in general words."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cores": os.cpu_count(), "memory_gigabytes": round(total / 1e9),
            "load_before": round(os.getloadavg()[0], 1)}


def versions() -> dict[str, str]:
    """Ours: alignax, jax, python."""
    import jax

    import alignax

    return {"alignax": alignax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}


def parser(doc: str, name: str, *, peers: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    out = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    out.add_argument("--quick", action="store_true", help="toy sizes: shows that the script runs, nothing else")
    out.add_argument("--json", type=pathlib.Path, default=pathlib.Path(f"runs/benchmarks/{name}.json"),
                     help=f"where the numbers go (default runs/benchmarks/{name}.json)")
    if peers:
        out.add_argument("--trl-python", default="", help="python of an environment with torch, transformers and TRL")
        out.add_argument("--tunix-python", default="", help="python of an environment with Tunix")
    return out


def wide_console() -> Console:
    """A console that keeps tables whole also where the output is a file."""
    console = Console()
    return console if console.width >= 120 else Console(width=120)


def finish(args: argparse.Namespace, console: Console, *, title: str, about: Sequence[str],
           tables: Sequence[Mapping[str, Any]], data: Mapping[str, Any], started: float, before: Mapping[str, Any],
           absent: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Prints the tables ({"title", "columns", "rows"}) and writes the JSON file that page.py reads."""
    hidden = ("json", "trl_python", "tunix_python", "quick")
    result = dict(benchmark=args.json.stem, title=title, about=list(about), tables=list(tables),
                  could_not_run=dict(absent or {}), quick=args.quick, machine=dict(before), versions=versions(),
                  settings={k: v for k, v in vars(args).items() if k not in hidden},
                  seconds=round(time.monotonic() - started, 1), data=dict(data))
    for table in result["tables"]:
        shown = Table(title=table["title"], title_justify="left")
        for number, heading in enumerate(table["columns"]):
            shown.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
        for row in table["rows"]:
            shown.add_row(*map(str, row))
        console.print(shown)
    for name, why in result["could_not_run"].items():
        console.print(f"could not run: {name}: {why}")
    if args.quick:
        console.print("quick: these numbers show that the script runs, nothing else")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {args.json}")
    return result
