"""Run every reproduction of this folder and write docs/reproductions.md with its figures.

    python -m experiments.papers.all [--only NAME ...] [--quick] [--out docs]

Cost: about a quarter of an hour of two idle cores for all. `--only` runs a few and keeps the others' reports of the
last run, which stand beside the figures in reports.json. `--quick` shrinks everything to a check that it runs; it
refuses to write into docs/. Expected result: a section per paper with figure, published number, ours, seeds, verdict
and why.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from alignax.launch import compilation_cache
from experiments.papers import harness

NAMES = ("three_d_properties", "three_d_losses", "squeezing", "gradient_field", "ipo_deterministic",
         "on_policy_bandit", "label_noise", "mixed_quality", "dpo_shift", "h_dpo", "overoptimisation", "odpo",
         "reference_strength", "compare_losses", "three_d_real", "gradient_entanglement", "likelihood_displacement",
         "tdpo_kl", "simpo_length", "implicit_explicit", "variants_by_start", "grokking_tickets")
FOLDER = "reproductions"


def parts(docstring: str) -> tuple[str, dict[str, str]]:
    """(title, {label: paragraph}) of a reproduction's docstring; ValueError where a label of LABELS is missing."""
    title, *rest = (" ".join(paragraph.split()) for paragraph in docstring.strip().split("\n\n"))
    found = {}
    for paragraph in rest:
        label, colon, text = paragraph.partition(": ")
        if colon and label in harness.LABELS:
            found[label] = text
    missing = [label for label in harness.LABELS if label not in found]
    if missing:
        raise ValueError(f"{title}: the docstring has no paragraph {', '.join(missing)}")
    return title.rstrip("."), found


def small(source: Path, target: Path) -> None:
    """Copy a PNG, one above PNG_LIMIT bytes with 256 colours; ValueError where it is still above."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if target.stat().st_size > harness.PNG_LIMIT:
        with Image.open(source) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    if target.stat().st_size > harness.PNG_LIMIT:
        raise ValueError(f"{target}: {target.stat().st_size} bytes, at most {harness.PNG_LIMIT}")


def _linked(text: str) -> str:
    """arXiv ids as links; < and > as text."""
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"\b(2\d{3}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def _cell(value: Any) -> str:
    return _linked(str(value)).replace("|", "\\|")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def section(name: str, report: Mapping[str, Any]) -> str:
    """Markdown of one reproduction; report as `harness.report` made it, figures as file names."""
    title, text = parts(importlib.import_module(f"experiments.papers.{name}").__doc__)
    lines = [f"## {_linked(title)}", "", f"**Verdict: {report['verdict']}.** Seeds: {report['seeds']}.", "",
             f"*Claim.* {_linked(_upper(text['Claim']))}", ""]
    for figure in report["figures"]:
        lines += [f"![{title}: {figure}]({FOLDER}/{figure})", ""]
    lines += [f"*Here.* {_linked(_upper(text['Here']))}", "", f"*Published.* {_linked(_upper(text['Published']))}", "",
              "| measured here (mean ± half-width of the 95% interval where seeds differ) | value |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in report["ours"].items()]
    lines += ["", "Checks:", ""]
    lines += [f"- {_linked(check)}" for check in report["why"].split("; ")]
    lines += ["", f"*What a small model can show.* {_linked(_upper(text['Small models']))}", "",
              f"*At scale.* {_linked(_upper(text['At scale']))}", "", f"Command: `{text['Command']}`", ""]
    return "\n".join(lines)


def document(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: what it is, a table of verdicts, and the sections in the order of NAMES."""
    names = [name for name in NAMES if name in reports]
    count = {v: sum(reports[n]["verdict"] == v for n in names) for v in harness.VERDICTS}
    head = ["# Published findings, run again in small", "",
            "Made by `python -m experiments.papers.all`; numbers, figures and verdicts come from the runs. A verdict "
            "is counted from checks that stand in the code: *reproduced* where all hold, *partly* where some do, *not* "
            "where none does. Bands in figures span all seeds unless they are said to be intervals.", "",
            f"{count['reproduced']} reproduced, {count['partly']} partly, {count['not']} not.", "",
            "| finding | published | verdict | checks held |", "|---|---|---|---|"]
    for name in names:
        title = parts(importlib.import_module(f"experiments.papers.{name}").__doc__)[0]
        checks = reports[name]["why"].split("; ")
        held = sum(check.startswith("holds:") for check in checks)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        head.append(f"| [{title}](#{anchor}) | {_cell(reports[name]['published'])} | {reports[name]['verdict']} | "
                    f"{held} of {len(checks)} |")
    return "\n".join(head) + "\n\n" + "\n".join(section(name, reports[name]) for name in names)


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run, copy the figures, write the page; 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="few seeds and steps: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (default: docs)")
    options = parser.parse_args(arguments)
    console = console or Console(soft_wrap=True)
    compilation_cache()
    if options.quick and options.out == Path("docs"):
        parser.error("--quick makes no results: give another folder with --out")
    store = options.out / FOLDER / "reports.json"
    reports = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    for name in options.only:
        began, module = time.monotonic(), importlib.import_module(f"experiments.papers.{name}")
        if lacking := getattr(module, "lacking", lambda: "")():
            console.print(f"{name}: left out, {lacking}", markup=False, highlight=False)
            continue
        report = module.run(harness.OUT, quick=options.quick)
        for figure in report["figures"]:
            small(figure, options.out / FOLDER / figure.name)
        reports[name] = {**report, "figures": [figure.name for figure in report["figures"]]}
        console.print(f"{name}: {report['verdict']} ({time.monotonic() - began:.0f} s)", markup=False, highlight=False)
        # After each, so that a run cut short keeps what it has.
        store.write_text(json.dumps(reports, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (options.out / "reproductions.md").write_text(document(reports), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
