"""Bytes on disk of a package and of everything that it requires, from the metadata of the environment that runs this.

    python experiments/benchmarks/install_size.py PACKAGE

Prints one line of JSON: bytes, packages, and the requirements that are not installed here. Sizes are those that the
installer wrote down (RECORD), so compiled Python files, which come later, do not count; extras count where a
requirement names them. Needs `packaging`, the installer's own copy where there is no other. Cost: a second.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys


def requirements():
    """The class that parses a requirement, `packaging`'s or the installer's copy of it."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement


def closure(name: str) -> tuple[dict[str, importlib.metadata.Distribution], list[str]]:
    """(name -> distribution of the package and all that it requires, requirements that are not installed)."""
    parse = requirements()
    found: dict[str, importlib.metadata.Distribution] = {}
    absent, seen, todo = set(), set(), [(name, "")]
    while todo:
        if (one := todo.pop()) in seen:
            continue
        seen.add(one)
        wanted, extra = one[0].lower().replace("_", "-").replace(".", "-"), one[1]
        try:
            found.setdefault(wanted, importlib.metadata.distribution(wanted))
        except importlib.metadata.PackageNotFoundError:
            absent.add(wanted)
            continue
        for text in found[wanted].requires or ():
            need = parse(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need.name, part) for part in ("", *need.extras)]
    return found, sorted(absent)


def size_of(distribution: importlib.metadata.Distribution) -> int:
    """Bytes of its files by RECORD; those that RECORD gives no size (RECORD itself) by the file."""
    total = 0
    for file in distribution.files or ():
        if file.suffix == ".pyc":
            continue
        place = str(distribution.locate_file(file))
        total += file.size if file.size is not None else os.path.getsize(place) if os.path.exists(place) else 0
    return total


def main() -> None:
    """One package per call."""
    found, absent = closure(sys.argv[1])
    sys.stdout.write(json.dumps(dict(bytes=sum(map(size_of, found.values())), packages=len(found), absent=absent,
                                     largest=max(found, key=lambda one: size_of(found[one]), default=None))) + "\n")


if __name__ == "__main__":
    main()
