"""Twenty preference losses on the quickstart's model, compared at equal KL and with an equal budget for tuning.

    python experiments/papers/compare_on_quickstart.py --out runs/comparison            # resumes where it stopped
    python experiments/papers/compare_on_quickstart.py --out runs/comparison --write    # and writes docs/comparison.md
    python experiments/papers/compare_on_quickstart.py --out FOLDER --quick             # two losses, few updates

Every loss: 4 strengths by 2 learning rates by 3 paired seeds, 24 runs as one compiled program, each measured after
6, 12, 24 and 48 updates of 32 pairs (of every prompt the pair whose rewards differ most). Strengths are not comparable
between losses, so each has its own four (ENTRIES says why those), and losses are compared at the KL that they spend: 1,
3 and 10 nats from the SFT model, on completions of held-out prompts. The setting that is reported for a seed is the
best on the other two seeds.
Controls: SFT on the chosen, best-of-n by the gold reward, DPO on labels turned at random.

Cost: about half an hour on two CPU cores. Expected result: docs/comparison.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.papers import quickstart_page as page  # noqa: E402  (needs the path)
from experiments.papers import quickstart_runs as runs  # noqa: E402

PAGE, FIGURE = ROOT / "docs" / "comparison.md", "frontiers.png"
COMMAND = "python experiments/papers/compare_on_quickstart.py --out runs/comparison --write"
RESULTS, BEST_OF_N, REFERENCE = "results.jsonl", "best of n", "dpo"
SHUFFLED = "dpo, shuffled labels"
_LINK = (1.0, 0.3, 0.1, 0.03)
_TARGET = (0.5, 0.15, 0.05, 0.015)
_LINK_WHY = "beta per nat of a summed log-ratio: the link turns at 1 to 30 nats, from tied to loose"
_TARGET_WHY = "the square aims at a margin of 1 / (2 x): 1 to 33 nats"
_RATE_WHY = "no strength of its own: the learning rates are multiplied instead, for the same number of runs"


def _entry(loss: str, key: str = "beta", values: tuple[float, ...] = _LINK, why: str = _LINK_WHY,
           **fixed: Any) -> runs.Entry:
    return runs.Entry(loss, key, values, why, fixed)


ENTRIES: dict[str, runs.Entry] = {
    "dpo": _entry("dpo"),
    "cdpo": _entry("cdpo"),
    "robust_dpo": _entry("robust_dpo"),
    "ipo": _entry("ipo", "tau", _TARGET, _TARGET_WHY),
    "dpo:ln": _entry("dpo:ln", "beta", (20.0, 6.0, 2.0, 0.6),
                     "beta of a mean over tokens: dpo's times the usual length of 22"),
    "dpop": _entry("dpop"),
    "f_dpo, js": _entry("f_dpo", divergence="js"),
    "chi_po": _entry("chi_po"),
    "cal_dpo": _entry("cal_dpo", "beta", _TARGET, _TARGET_WHY),
    "apo:zero": _entry("apo:zero"),
    "exo": _entry("exo"),
    "aot": _entry("aot"),
    "sppo:hard": _entry("sppo:hard", "beta", _TARGET, _TARGET_WHY),
    "kto": _entry("kto"),
    "nca": _entry("nca"),
    "slic_hf": _entry("slic_hf", "delta", (1.0, 3.0, 10.0, 30.0), "the hinge's margin in nats; lam as published"),
    "cpo": _entry("cpo"),
    "orpo": _entry("orpo", "lam", (0.1, 0.3, 1.0, 3.0), "weight of the odds ratio beside SFT, from the paper's 0.1"),
    "simpo": _entry("simpo", "beta", (1.0, 2.5, 5.0, 10.0), "per token, around the paper's 2 to 10; gamma fixed"),
    "simper": _entry("simper", "learning_rate", (0.1, 0.3, 1.0, 3.0), _RATE_WHY),
}
"""The twenty losses: name -> loss, strength, its values and why those."""

CONTROLS: dict[str, runs.Entry] = {
    "sft": _entry("sft", "learning_rate", (0.1, 0.3, 1.0, 3.0), _RATE_WHY),
    SHUFFLED: dataclasses.replace(_entry("dpo"), scale=0.0),
}
ORDER = ("dpo", SHUFFLED, "sft", "ipo", "simpo", "kto", "orpo")
"""What runs first, so that an interrupted comparison holds what is asked for most."""

QUICK = runs.Sizes(strengths=2, rates=(3e-3,), seeds=1, marks=(2, 4), pairs=8, prompts=16, probe=8, best_of=16,
                   tiny=True)
QUICK_NAMES = ("dpo", "sft")


def done(folder: Path, sizes: runs.Sizes) -> dict[str, dict[str, Any]]:
    """name -> its line of the results, where that was made with these sizes; a torn last line counts as absent."""
    path, out, mark = folder / RESULTS, {}, json.loads(json.dumps(dataclasses.asdict(sizes)))
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["sizes"] == mark:
            out[row["name"]] = row
    return out


def append(folder: Path, row: dict[str, Any]) -> None:
    """Adds a line to the results, on a line of its own even after a torn one."""
    with (folder / RESULTS).open("a+b") as file:
        if file.tell() and not _ends(folder / RESULTS):
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def _ends(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def fill(folder: Path, names: Sequence[str], sizes: runs.Sizes, console: Any) -> dict[str, dict[str, Any]]:
    """Runs every population of `names` that is not done, and best-of-n; returns all lines by name."""
    from experiments import quickstart

    found = done(folder, sizes)
    left = [name for name in (BEST_OF_N, *names) if name not in found]
    if left:
        folder.mkdir(parents=True, exist_ok=True)
        console.print(f"{len(found)} done, {len(left)} to run: {', '.join(left)}", markup=False, highlight=False)
        world = runs.World(quickstart.get_config("tiny" if sizes.tiny else ""), folder, sizes, console)
    for number, name in enumerate(left, 1):
        entry = ENTRIES.get(name) or CONTROLS.get(name)
        if name == BEST_OF_N:
            result, spent = runs.timed(world.best_of_n)
        else:
            result, spent = runs.timed(lambda entry=entry: runs.stored(runs.run(world, entry)))
        row = {"name": name, "sizes": dataclasses.asdict(sizes), **spent, **result}
        append(folder, row)
        found[name] = json.loads(json.dumps(row))
        console.print(f"{number}/{len(left)} {name}: {spent['seconds']:.0f} s, {spent['cpu_seconds']:.0f} s of cores",
                      markup=False, highlight=False)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from rich.console import Console

    from alignax import population
    from alignax.launch import compilation_cache

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, to which a later call adds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join([*ENTRIES, *CONTROLS])}")
    parser.add_argument("--quick", action="store_true", help="two losses at toy size: a check that it runs, no result")
    parser.add_argument("--write", action="store_true", help="write docs/comparison.md and its figure from the results")
    given = parser.parse_args(arguments)
    every = [*ORDER, *(n for n in (*ENTRIES, *CONTROLS) if n not in ORDER)]
    if unknown := sorted(set(given.only or ()) - set(every)):
        parser.error(f"--only: {', '.join(unknown)} is not in the comparison; allowed: {', '.join(every)}")
    if given.quick and given.write:
        parser.error("--quick is no result; allowed with --write: a full run")
    console, sizes = Console(soft_wrap=True), QUICK if given.quick else runs.Sizes()
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        population.device_per_core()
    compilation_cache()
    found = fill(given.out, given.only or (QUICK_NAMES if given.quick else every), sizes, console)
    shown = {name: entry for name, entry in {**ENTRIES, **CONTROLS}.items() if name in found}
    report = page.Report(found, shown, sizes, REFERENCE, SHUFFLED, BEST_OF_N)
    figure = report.figure(PAGE.with_suffix("") / FIGURE if given.write else given.out / FIGURE)
    if given.write:
        missing = [name for name in every if name not in found]
        PAGE.write_text(report.text(COMMAND, f"{PAGE.stem}/{FIGURE}", missing), encoding="utf-8")
        console.print(f"{PAGE} and {figure}", markup=False, highlight=False)
    else:
        console.print(report.table(), markup=False, highlight=False, soft_wrap=True)
        console.print(f"figure: {figure}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
