"""Readers of published layouts: the index FORMATS, and `read`, which turns a file or a folder into records.

A format is a short pure function from the fields of a row to records; it says what it leaves out, and what is left
out is counted. Another layout is one function and one entry.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignax.data.formats import human, maths, plain, rated
from alignax.data.formats.base import Fields, Format, Place, Unusable
from alignax.data.ledger import Ledger
from alignax.data.records import Collector, Record, check_on_identical
from alignax.data.rows import SUFFIXES, rows
from alignax.types import ConfigError, DataError

FORMATS: dict[str, Format] = {f.name: f for module in (plain, human, rated, maths) for f in module.FORMATS}
PLAIN = "alignax"
PROBED = 8  # rows that `auto` looks at

__all__ = ["FORMATS", "Fields", "Format", "Place", "Unusable", "detect", "files_of", "get", "read"]


def get(name: str) -> Format:
    """The format of that name; ConfigError naming all of them where there is none."""
    if name not in FORMATS:
        raise ConfigError(f"format is {name!r}, allowed are 'auto' and {sorted(FORMATS)}")
    return FORMATS[name]


def detect(examples: list[Mapping[str, Any]], where: str) -> Format:
    """The only format that accepts all example rows; the project's own layouts where no published one does.

    Where none accepts all of them, the only one that accepts the first: its reader then says which line is at fault,
    and how. Raises DataError naming the fields found where none accepts them, and the candidates where several do.
    """
    def accepting(rows):
        fitting = [f for f in FORMATS.values() if f.automatic and all(f.accepts(fields) for fields in rows)]
        return [f for f in fitting if f.name != PLAIN] or fitting

    chosen = accepting(examples) or accepting(examples[:1])
    if len(chosen) == 1 and examples:
        return chosen[0]
    found = sorted({str(name) for fields in examples for name in fields})
    if not examples:
        raise DataError(f"{where}:0: no row to tell the format by")
    if chosen:
        raise DataError(f"{where}:1: the fields {found} fit several formats: {[f.name for f in chosen]}; name one")
    raise DataError(f"{where}:1: the fields {found} fit no format; known are {sorted(FORMATS)}")


def files_of(path: Path, split: str | None) -> list[Path]:
    """The files to read: `path` itself, or those of a folder, of one split where it is named.

    A file belongs to a split where its name holds the split's name as a word (`train.jsonl`, `train_prefs.parquet`,
    `data-test-00000.jsonl.gz`). Raises DataError where the folder has none, naming what is there.
    """
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if split is not None:
        words = {p: re.split(r"[^a-z0-9]+|_", p.relative_to(path).as_posix().lower()) for p in found}
        chosen = [p for p in found if split.lower() in words[p]]
    else:
        chosen = found
    if not chosen:
        raise DataError(f"{path}:0: no file of split {split!r} with one of the suffixes {list(SUFFIXES)}; found "
                        f"{[p.name for p in found][:20]}")
    return chosen


def _fields(path: Path, tally: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a file; null columns of a Parquet row are absent fields."""
    for number, values in rows(path, tally):
        if path.name.endswith(".parquet"):
            values = {name: value for name, value in values.items() if value is not None}
        yield number, values


def _read_file(path: Path, format: str, split: str | None, tally: Ledger, strict: bool) -> tuple[Format, list[Record]]:
    """All records of one file, before duplicates and identical completions are looked at."""
    stream = _fields(path, tally)
    first = list(itertools.islice(stream, PROBED))
    rule = detect([values for _, values in first], str(path)) if format == "auto" else get(format)
    decode = ".csv" in path.name
    out: list[Record] = []
    for number, values in itertools.chain(first, stream):
        place = Place(str(path), number)
        if split is not None:
            if "split" not in values:
                raise DataError(f"{place}: split is {split!r} but the row has no field 'split': {sorted(values)}")
            if values["split"] != split:
                tally.note("row of another split")
                continue
        for name in rule.ignored(values):
            tally.note(f"ignored field {name!r}")
        try:
            out += rule.parse(Fields(values, place, decode=decode), place)
        except Unusable as unusable:
            if strict:
                raise
            tally.drop(unusable.reason)
    return rule, out


def read(path: str | os.PathLike, format: str = "auto", *, split: str | None = None, on_identical: str = "error",
         ledger: Ledger | None = None) -> list[Record]:
    """Reads a file (.jsonl, .json, .csv, each also gzipped, .parquet) or all such files of a folder.

    format: a name of FORMATS, or `auto` for the only one that accepts the first rows. split: of a folder, the files
    whose name says so; of a file, the rows whose field `split` says so. on_identical: as in `read_jsonl`.
    ledger: rows that state nothing to learn from (ties, empty answers, ...) are dropped and counted in it under
    their reason, fields that are not read are noted; without a ledger such a row is a DataError, since nothing is
    dropped uncounted. Afterwards records returned + dropped = rows read (layouts that spread one prompt over
    several rows, or hold several in one row, note the difference).

    Raises DataError with file and line on everything that cannot be read; ConfigError on an unknown format, suffix
    or `on_identical`, and where a package for the suffix is missing.
    """
    check_on_identical("read", on_identical, ledger)
    if format != "auto":
        get(format)
    path, tally = Path(path), Ledger() if ledger is None else ledger
    of_file = split if not path.is_dir() else None
    collected = Collector(on_identical, tally)
    for file in files_of(path, split):
        rule, records = _read_file(file, format, of_file, tally, strict=ledger is None)
        if rule.gather is not None:
            joined = rule.gather(records)
            if len(joined) < len(records):
                tally.note("rows joined with the row before them", len(records) - len(joined))
            records = joined
        per_row = len({record.line for record in records})
        if per_row < len(records):
            tally.note("further records of a row", len(records) - per_row)
        for record in records:
            collected.add(record, "completions")
    return collected.records
