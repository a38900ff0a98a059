"""Do the tests see what they should? Seeded mistakes, one at a time, each against the tests that have to fail.

Command: python experiments/docs/mutations.py [--only NAME ...] [--write] [--fresh]
Cost: about ten seconds a mistake on two idle cores, a quarter of an hour for all of mutants.py. Expected result: a
table without a row `survived`, exit status 0; --write makes docs/mutations.md of it.

Sources and tests are copied to a folder in the system's temporary directory, and only the copy is ever changed.
Results are kept there in results.json for as long as the mistake, its file and its tests are what they were, so that
the whole may be run in portions. --fresh runs every mistake again. The tests that failed are run on the unchanged copy
at the end: a test that fails there too has shown nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mutants import AREAS, MUTANTS, Mutant
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mutations.md"
WORK = Path(tempfile.gettempdir()) / "alignax-mutations"
COMMAND = "python experiments/docs/mutations.py --write"
COPIED = ("alignax", "tests", "experiments", "pyproject.toml", "setup.py", "README.md")
LIMIT = 300  # seconds for one mistake

KILLED, SURVIVED, ABSENT, BROKEN, LATE = "killed", "survived", "text not found", "does not run", "time limit"
STATES = {
    KILLED: "a test failed, as it should",
    SURVIVED: "the tests passed: they do not see the mistake",
    ABSENT: "the text to replace is not in the file exactly once",
    BROKEN: "pytest ran no test to its end, or the test that failed fails without the mistake too",
    LATE: f"the tests took more than {LIMIT} seconds",
}


class Outcome(NamedTuple):
    """What came of a mistake: one of STATES, the first test that failed (or what was said instead), seconds."""

    state: str
    test: str
    seconds: float


def copy_tree(folder: Path) -> None:
    """A fresh copy of sources and tests in `folder`, modification times kept."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(ROOT / name, folder / name)


def test_files(mutant: Mutant) -> list[str]:
    """The files of the selected tests."""
    return sorted({part.split("::")[0] for part in mutant.tests if part.startswith("tests/")})


def digest(mutant: Mutant) -> str:
    """Of the mistake, the file that it changes and the files of its tests: what a stored result belongs to."""
    parts = [json.dumps(mutant), *((ROOT / name).read_text(encoding="utf-8")
                                   for name in (mutant.file, *test_files(mutant)))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def pytest(folder: Path, arguments: Sequence[str], limit: float) -> tuple[int, str]:
    """(exit status, output) of pytest in a copy; subprocess.TimeoutExpired past `limit` seconds."""
    settings = {"PYTHONPATH": str(folder), "ALIGNAX_CACHE": os.environ.get("ALIGNAX_CACHE", str(ROOT / ".cache")),
                "ALIGNAX_SHARED": os.environ.get("ALIGNAX_SHARED", str(ROOT.parent / "shared"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-rfE", "-p", "no:cacheprovider", *arguments],
        cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=limit)
    return done.returncode, done.stdout + done.stderr


def failed_tests(output: str) -> list[str]:
    """The tests that pytest's summary names as failed, errors of fixtures included."""
    return re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.+?)(?: - .*)?$", output, re.MULTILINE)


def run_one(mutant: Mutant, folder: Path, number: int) -> Outcome:
    """Puts the mistake into the copy in `folder`, runs its tests, and takes it out again.

    number: differs between mistakes. The changed file's time is moved by it, so that no byte code compiled for another
    state of the file is taken for this one's.
    """
    path = folder / mutant.file
    source, stat = path.read_text(encoding="utf-8"), path.stat()
    if source.count(mutant.old) != 1:
        return Outcome(ABSENT, f"{source.count(mutant.old)} times in {mutant.file}", 0.0)
    began = time.monotonic()
    try:
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        os.utime(path, (stat.st_atime, stat.st_mtime + 10 * (number + 1)))
        code, output = pytest(folder, mutant.tests, LIMIT)
    except subprocess.TimeoutExpired:
        return Outcome(LATE, "", float(LIMIT))
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, (stat.st_atime, stat.st_mtime))
    seconds, failed = time.monotonic() - began, failed_tests(output)
    if code == 0:
        return Outcome(SURVIVED, "", seconds)
    if code == 1 and failed:
        return Outcome(KILLED, failed[0], seconds)
    return Outcome(BROKEN, output.strip().splitlines()[-1] if output.strip() else f"exit status {code}", seconds)


def control(outcomes: Mapping[str, Outcome], folder: Path) -> dict[str, Outcome]:
    """The outcomes, with those whose test fails without the mistake too marked as BROKEN.

    Runs the distinct killing tests on the unchanged copy, all in one process.
    """
    tests = sorted({o.test for o in outcomes.values() if o.state == KILLED})
    if not tests:
        return dict(outcomes)
    # Without -x: one bad test must not hide the others.
    code, output = pytest(folder, ["--maxfail=1000", *tests], 20 * 60)
    bad = set(failed_tests(output))
    if code not in (0, 1) or (code == 1 and not bad):
        raise SystemExit(f"the tests do not run on the unchanged copy:\n{output[-2000:]}")
    return {name: o._replace(state=BROKEN, test=f"fails anyway: {o.test}") if o.test in bad else o
            for name, o in outcomes.items()}


def stored(path: Path) -> dict[str, dict]:
    """name -> {digest, state, test, seconds} of earlier runs; {} where there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def selected(patterns: Iterable[str]) -> list[Mutant]:
    """The mistakes whose names match one of the patterns, all without patterns; SystemExit where one matches none."""
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(m.name, pattern) for m in MUTANTS):
            raise SystemExit(f"--only {pattern}: no such mistake; there are {', '.join(m.name for m in MUTANTS)}")
    return [m for m in MUTANTS if not patterns or any(fnmatch.fnmatch(m.name, p) for p in patterns)]


def run_all(chosen: Sequence[Mutant], work: Path, console: Console, *, fresh: bool) -> dict[str, Outcome]:
    """name -> outcome of the chosen mistakes, from results.json in `work` where it holds; a line is shown for each."""
    folder, results = work / "copy", work / "results.json"
    known = stored(results)
    copy_tree(folder)
    outcomes = {}
    for number, mutant in enumerate(chosen):
        mark, kept = digest(mutant), known.get(mutant.name)
        if not fresh and kept and kept["digest"] == mark and kept["state"] == KILLED:
            outcomes[mutant.name] = Outcome(kept["state"], kept["test"], kept["seconds"])
            continue
        outcome = outcomes[mutant.name] = run_one(mutant, folder, number)
        console.print(f"{number + 1}/{len(chosen)} {mutant.name}: {outcome.state} {outcome.test} "
                      f"({outcome.seconds:.0f} s)", markup=False, highlight=False, soft_wrap=True)
        known[mutant.name] = {"digest": mark, **outcome._asdict()}
        results.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return control(outcomes, folder)


def table(outcomes: Mapping[str, Outcome]) -> Table:
    """The outcomes for the terminal."""
    out = Table("mistake", "state", "test", "seconds")
    for name, outcome in outcomes.items():
        out.add_row(name, outcome.state, outcome.test, f"{outcome.seconds:.0f}",
                    style="" if outcome.state == KILLED else "red")
    return out


def page(outcomes: Mapping[str, Outcome]) -> str:
    """docs/mutations.md: every mistake with its meaning and the test that fails."""
    files = {m.file for m in MUTANTS}
    lines = [
        "# Seeded mistakes", "",
        f"Made by `{COMMAND}`; do not edit by hand. {len(MUTANTS)} mistakes in {len(files)} files, one at a time in a "
        "copy of the sources, each against a narrow selection of the tests. A row names the mistake, what it means for "
        "training, the file, and the first test that fails with it; that test passes without it. A mistake that no "
        "test sees would stand here as `survived`. Seconds include the start of the process and depend on what else "
        "the machine did.", "",
    ]
    for heading, rows in AREAS.items():
        lines += [f"## {heading}", "", "| Mistake | Meaning | File | Seen by | s |", "| --- | --- | --- | --- | ---: |"]
        for mutant in rows:
            outcome = outcomes[mutant.name]
            seen = f"`{outcome.test}`" if outcome.state == KILLED else f"**{outcome.state}**"
            means = mutant.means.replace("|", "\\|")
            lines.append(f"| {mutant.name} | {means} | `{mutant.file}` | {seen.replace('|', chr(92) + '|')} | "
                         f"{outcome.seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every chosen mistake was killed."""
    states = "; ".join(f"{name}: {meaning}" for name, meaning in STATES.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"states: {states}")
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="run this mistake alone; may hold * and be given several times")
    parser.add_argument("--write", action="store_true", help="write docs/mutations.md, of all mistakes")
    parser.add_argument("--fresh", action="store_true", help="run again what results.json holds")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder of the copy and the results [{WORK}]")
    given = parser.parse_args(arguments)
    if given.write and given.only:
        parser.error("--write is of all mistakes: give it without --only")
    console = Console()
    outcomes = run_all(selected(given.only), given.work, console, fresh=given.fresh)
    console.print(table(outcomes))
    if given.write:
        PAGE.write_text(page(outcomes), encoding="utf-8")
        console.print(f"wrote {PAGE}", markup=False)
    return 0 if all(o.state == KILLED for o in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
