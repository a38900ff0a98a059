"""From the command to the first update of the quickstart, the first time and with a filled compilation cache.

    python experiments/benchmarks/cold_start.py [--times 3] [--trl-python ...] [--tunix-python ...] [--quick]

Starts `alignax train --config experiments/quickstart.py` in a process of its own with an empty compilation cache, waits
until the first update of the first stage stands in metrics.jsonl, and ends the process; then again with the cache that
this left. The clock includes Python, imports, data, parameters and compilation or its cache. Beside it, what each
library takes on disk with all that it requires, read from the metadata of its environment (install_size.py).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from common import HERE, finish, machine, megabytes, parser, spread, wide_console, workplace
from rich.console import Console

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 600.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = parser(__doc__, "cold_start")
    out.add_argument("--times", type=int, default=3, help="starts with a filled cache (default 3)")
    return out.parse_args(argv)


def updated(path: pathlib.Path) -> bool:
    """Whether a row of training is written."""
    if not path.exists():
        return False
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written
        if row["split"] == "train" and row["step"] >= 1:
            return True
    return False


def start(folder: pathlib.Path, cache: pathlib.Path, config: str) -> float:
    """Seconds until the first update. Raises RuntimeError where the command fails or takes too long."""
    command = [sys.executable, "-m", "alignax.cli", "train", "--config", config, "--workdir", str(folder),
               "--config.sft.log_every=1"]
    environment = os.environ | {"ALIGNAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
    try:
        while not updated(folder / "metrics.jsonl"):
            if process.poll() is not None:
                raise RuntimeError(f"alignax train ended early: {process.stderr.read().decode()[-500:]}")
            if time.monotonic() - began > LIMIT:
                raise RuntimeError(f"alignax train made no update within {LIMIT:.0f} seconds")
            time.sleep(0.02)
        return time.monotonic() - began
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def sizes(args: argparse.Namespace) -> tuple[list[list[str]], dict[str, dict]]:
    """(rows, numbers) of what each library takes on disk with its requirements."""
    rows, found = [], {}
    for package, python in (("alignax", sys.executable), ("trl", args.trl_python), ("google-tunix", args.tunix_python)):
        if python:
            done = subprocess.run([python, str(HERE / "install_size.py"), package], capture_output=True, text=True,
                                  check=True)
            one = found[package] = json.loads(done.stdout)
            rows.append([package, megabytes(one["bytes"]), one["packages"], one["largest"] or "-",
                         ", ".join(one["absent"]) or "-"])
    return rows, found


def main(argv: list[str] | None = None, console: Console | None = None) -> dict:
    """Measures, prints and writes."""
    args, console, started, before = arguments(argv), console or wide_console(), time.monotonic(), machine()
    config = "experiments/quickstart.py" + (":tiny" if args.quick else "")
    with workplace() as name:
        folder = pathlib.Path(name)
        with console.status("the first start"):
            first = start(folder / "first", folder / "cache", config)
        later = []
        for number in range(args.times):
            with console.status(f"start {number + 2}"):
                later.append(start(folder / f"later{number}", folder / "cache", config))
    table = dict(title="Seconds from the command to the first update of the quickstart",
                 columns=["compilation cache", "s", "starts"],
                 rows=[["empty", f"{first:.1f}", 1], ["filled", spread(later, 1), len(later)]])
    rows, installed = sizes(args)
    disk = dict(title="On disk, with all that it requires", rows=rows, columns=[
        "package", "MB", "packages", "largest", "not installed"])
    return finish(args, console, title="Cold start", about=[
        "A process of its own each time: Python, imports, data, parameters, compilation or its cache, first update.",
        "Disk: sizes by the installer's records, without compiled Python files and optional extras, of what is "
        "installed here (PyTorch's build for CPUs); the source of a package installed in place is not part of them."],
        tables=[table, disk], data=dict(first=first, later=later, installed=installed), started=started,
        before=before, absent={} if len(rows) == 3 else {"size on disk of a peer": "no python executable was given"})


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
