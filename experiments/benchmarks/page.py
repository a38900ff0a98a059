"""Writes docs/benchmarks.md from the JSON files that the benchmarks left.

    python experiments/benchmarks/page.py [--folder runs/benchmarks] [--write docs/benchmarks.md]

Without --write the page goes to standard output. What a file says could not run is on the page, too; a benchmark
without a file is named as not measured.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

ORDER = {"dpo_step": "dpo_step.py", "epochs_hh": "epochs.py hh", "epochs_reference": "epochs.py reference",
         "epochs_prefix": "epochs.py prefix", "win_rate": "win_rate.py", "sweep_peers": "sweep_peers.py",
         "layouts": "layouts.py", "generate": "generate.py", "memory": "memory.py", "losses": "losses.py",
         "live_diagnostics": "live_diagnostics.py", "cold_start": "cold_start.py", "population": "population.py"}
HEAD = """# Benchmarks

Ours beside TRL and Tunix, and ours beside ours. The tables are written by `python experiments/benchmarks/page.py
--write docs/benchmarks.md` from what the scripts under `experiments/benchmarks/` measured; this runs all of them at
these sizes:

    python experiments/benchmarks/all.py --folder runs/benchmarks --trl-python PYTHON --tunix-python PYTHON

Each peer has a virtual environment of its own, named by its python executable; without one its rows are missing and the
page says so. How it is measured:

- All contenders read one Hugging Face checkpoint and the same token ids, and use the same optimiser, clipping, learning
  rate and beta.
- Before anything is timed, log-probs of every sequence agree to 1e-4 nats plus four units in the last place of a
  float32 of that size, the loss of the first update to 1e-5, and later losses, which depend on gradients and
  optimiser, to 2e-3.
  The shared model rotates with base 1,000,000, since Tunix 0.1.7 uses that base whatever its config says.
- Contenders are processes that run in turn, a few updates in each round, another one first each time. Ratios are taken
  inside a round; tables give medians, with quartiles in brackets. Where whole runs are timed (time to a win rate,
  sweeps), every run starts in a fresh process instead, one after another.
- The machines are shared: ratios count, absolute times do not carry over. Memory of a process is the high-water mark of
  its resident pages.
"""


def cell(value: Any) -> str:
    """A cell of a Markdown table."""
    return str(value).replace("|", "\\|")


def markdown(table: dict[str, Any]) -> list[str]:
    """Title and table, first column left, others right."""
    columns = table["columns"]
    rule = "| --- |" + " ---: |" * (len(columns) - 1)
    lines = [f"**{table['title']}**", "", "| " + " | ".join(map(cell, columns)) + " |", rule]
    return lines + ["| " + " | ".join(map(cell, row)) + " |" for row in table["rows"]] + [""]


def draw_population(result: dict[str, Any], path: pathlib.Path) -> None:
    """Cost of a member's update against N, a panel for models and one for toys."""
    from alignax.diagnostics import style

    shown = [(name, title) for name, title in (("models", "quickstart-size models"), ("toys", "toys"))
             if name in result["data"]]
    figure = style.figure(4.5 * len(shown), 3.4)
    for place, (name, title) in enumerate(shown, 1):
        axes, rows = style.axes(figure, 1, len(shown), place), result["data"][name]
        members = [row["members"] for row in rows]
        lines = (("one device", "-"), ("all devices", "--"), ("alone", ":"), ("PyTorch", "-."))
        for (label, line), colour in zip(lines, (*style.COLOURS[:2], style.INK, style.MUTED), strict=True):
            values = [row[label] if row.get(label) is not None else float("nan") for row in rows]
            axes.plot(members, values, line, color=colour, marker="o" if "device" in label else None,
                      label=label)
        axes.set_xscale("log")
        axes.set_xticks(members, [str(n) for n in members])
        axes.minorticks_off()
        axes.set(xlabel="members N", ylabel="ms per update of a member")
        highest = max(row[label] for row in rows for label, _ in lines if row.get(label) is not None)
        if name == "toys":
            axes.set_yscale("log")
            axes.set_ylim(top=8 * highest)
        else:
            axes.set_ylim(0, 1.35 * highest)
        style.title(axes, title)
        style.legend(axes, ncols=2, loc="upper left")
    style.save(figure, path, vector=False)


def section(name: str, result: dict[str, Any]) -> list[str]:
    """One benchmark."""
    lines = [f"## {result['title']}", "", f"`python experiments/benchmarks/{ORDER[name]}`"]
    if one := result.get("machine"):
        lines[-1] += (f", {one['cores']} cores of a shared virtual machine with {one['memory_gigabytes']} GB of "
                      f"memory, load {one['load_before']} before it began, {result['seconds']:.0f} seconds in all.")
    lines += ["", *result["about"], ""]
    if result["quick"]:
        lines += ["*Toy sizes: these numbers show that the script runs, nothing else.*", ""]
    for table in result["tables"]:
        lines += markdown(table)
    if result["could_not_run"]:
        lines += ["Could not run: " + "; ".join(f"{who} ({why})" for who, why in result["could_not_run"].items()) + ".",
                  ""]
    found = {one["version"] for one in result.get("data", {}).get("measured", {}).values() if "version" in one}
    found |= set(result.get("data", {}).get("versions", {}).values())
    own = [f"{key} {value}" for key, value in result["versions"].items()]
    lines += ["Versions: " + ", ".join([*own, *sorted(v for v in found if not v.startswith("jax "))]) + ".", ""]
    return lines


def page(folder: pathlib.Path) -> str:
    """The whole page from the files of a folder."""
    lines, missing = [HEAD], []
    for name, command in ORDER.items():
        path = folder / f"{name}.json"
        if path.exists():
            lines += section(name, json.loads(path.read_text(encoding="utf-8")))
        else:
            missing.append(f"`{command}`")
    if missing:
        lines += ["## Not measured yet", "", ", ".join(missing) + ".", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"), help="of JSON files")
    parser.add_argument("--write", type=pathlib.Path, help="the page; standard output by default")
    args = parser.parse_args(argv)
    text = page(args.folder)
    drawn = args.folder / "population.json"
    if args.write and drawn.exists():
        draw_population(json.loads(drawn.read_text(encoding="utf-8")), args.write.parent / "population.png")
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
