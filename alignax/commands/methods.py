"""`alignax methods`: the list of methods."""

from __future__ import annotations

import json
import pathlib
import sys


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser("methods", help="list the methods",
                                  description="Lists id, kind, arXiv id, fidelity, signature and file of every method.")
    parser.add_argument("--json", action="store_true", help="a JSON list of objects with `id`")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Prints the table or its JSON form; returns the exit code."""
    import inspect

    from rich.table import Table

    from alignax import losses

    root = pathlib.Path(losses.__file__).resolve().parents[2]
    rows = []
    for name in losses.names():
        loss = losses.get(name)
        file = pathlib.Path(inspect.getsourcefile(loss.fn)).resolve()
        config = root / "experiments" / "methods" / f"{loss.fn.__name__}.py"
        rows.append({"id": name, "kind": loss.info.kind, "system": loss.info.system, "arxiv": loss.info.arxiv,
                     "fidelity": loss.info.fidelity, "signature": f"{loss.fn.__name__}{inspect.signature(loss.fn)}",
                     "file": str(file.relative_to(root)),
                     "config": str(config.relative_to(root)) if config.exists() else None})
    if arguments.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    table = Table("id", "kind", "arXiv", "fidelity", "signature", "file", "config")
    for row in rows:
        table.add_row(row["id"], row["kind"], row["arxiv"], row["fidelity"], row["signature"], row["file"],
                      row["config"] or "")
    console.print(table)
    return 0
