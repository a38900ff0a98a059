"""Runs every side-by-side benchmark at the published sizes and writes docs/benchmarks.md.

    python experiments/benchmarks/all.py --trl-python ... --tunix-python ... [--folder runs/benchmarks] [--quick]

One after another, each in a process of its own; one that fails is reported and the others go on (exit code 1). Cost:
under two hours on two idle cores, and up to 16 GB of memory.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time

from common import HERE, wide_console
from page import ORDER

PEERS = ("dpo_step", "epochs_hh", "epochs_reference", "generate", "win_rate", "sweep_peers", "cold_start")


def main(argv: list[str] | None = None) -> int:
    """Runs them; the number of failures decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"), help="of JSON files")
    parser.add_argument("--write", type=pathlib.Path, default=pathlib.Path("docs/benchmarks.md"), help="the page")
    parser.add_argument("--only", default=",".join(ORDER), help=f"comma-separated of {', '.join(ORDER)}")
    parser.add_argument("--trl-python", default="", help="python of an environment with torch, transformers and TRL")
    parser.add_argument("--tunix-python", default="", help="python of an environment with Tunix")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that everything runs, nothing else")
    args = parser.parse_args(argv)
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(ORDER):
        parser.error(f"--only={','.join(sorted(unknown))}: allowed: {', '.join(ORDER)}")
    console, failed, started = wide_console(), [], time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        script, *options = ORDER[name].split()
        options += ["--json", str(args.folder / f"{name}.json")] + ["--quick"] * args.quick
        if name in PEERS:
            options += ["--trl-python", args.trl_python, "--tunix-python", args.tunix_python]
        began = time.monotonic()
        console.rule(name)
        if subprocess.run([sys.executable, str(HERE / script), *options]).returncode:
            failed.append(name)
        console.print(f"{name}: {time.monotonic() - began:.0f} seconds")
    subprocess.run([sys.executable, str(HERE / "page.py"), "--folder", str(args.folder), "--write", str(args.write)],
                   check=True)
    console.print(f"{time.monotonic() - started:.0f} seconds in all; written: {args.write}"
                  + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
