"""Rows of a file as plain objects: JSON lines, a JSON list, CSV (all three plain or gzipped), Parquet.

A .json file may hold a list, one object per line, or one object over many lines, as several published sets do. Each
row comes with its line, counted from 1: the line of the file for JSON lines and CSV, the number of the entry for a list
and Parquet.
What cannot be read is a DataError with file and line; nothing is repaired or skipped.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignax.data.ledger import Ledger
from alignax.types import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
MAX_CELL = 1 << 27  # characters of a CSV cell; the csv module's own bound of 131072 is shorter than long answers


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON decoder's (name, value) pairs; ValueError where a name stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object")
    return found


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of a plain or gzipped file; read errors become DataError with the line reached."""
    number = 0
    try:
        with (gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")) as handle:
            for number, raw in enumerate(handle, 1):
                yield number, raw
    except FileNotFoundError as error:
        raise DataError(f"{path}:0: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from error


def _text(path: Path, number: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not valid UTF-8: {error}") from error


def _object(path: Path, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
    return value


def json_lines(path: Path, ledger: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSON-lines file, plain or gzipped; blank lines are noted in the ledger.

    Raises DataError on a missing or truncated file, bad UTF-8, broken JSON, a field that stands twice, no object.
    """
    for number, raw in _raw_lines(path):
        if not raw.strip():
            ledger.note("blank line")
            continue
        try:
            value = json.loads(_text(path, number, raw), object_pairs_hook=unique_fields)
        except DataError:  # a ValueError too: bad UTF-8 has its own words
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: broken JSON: {error}") from error
        yield number, _object(path, number, value)


def _json(path: Path, ledger: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list, objects line by line, or one object over several lines, told apart by the first line with text."""
    first = next((raw.strip() for _, raw in _raw_lines(path) if raw.strip()), b"")
    if first.startswith(b"{"):
        single = _single(path) if not first.endswith(b"}") else None
        yield from [(1, single)] if single is not None else json_lines(path, ledger)
        return
    lines = [_text(path, number, raw) for number, raw in _raw_lines(path)]
    try:
        value = json.loads("".join(lines), object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: broken JSON: {error}") from error
    if not isinstance(value, list):
        raise DataError(f"{path}:1: expected a JSON list of objects, found {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield number, _object(path, number, item)


def _single(path: Path) -> dict[str, Any] | None:
    """The object that is the whole file, or None where the file is something else (whose reader says what)."""
    lines = [_text(path, number, raw) for number, raw in _raw_lines(path)]
    try:
        return _object(path, 1, json.loads("".join(lines), object_pairs_hook=unique_fields))
    except (ValueError, RecursionError) as error:
        # One object begun and not finished over lines: its own error is at a later line than that of JSON lines.
        if getattr(error, "lineno", 1) > 1 and lines[0].strip() == "{":
            raise DataError(f"{path}:{error.lineno}: broken JSON: {error}") from error
        return None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(_text(path, number, raw) for number, raw in _raw_lines(path))
    bound = csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise DataError(f"{path}:1: expected a header of distinct column names, found {header!r:.200}")
        line = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise DataError(f"{path}:{line}: {len(row)} cells for the {len(header)} columns {header!r:.200}")
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}") from error
    finally:
        csv.field_size_limit(bound)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        errors = importlib.import_module("pyarrow").ArrowException
    except ImportError as error:
        raise ConfigError(f"{str(path)!r} is a Parquet file; reading it needs pyarrow, which the extra "
                          "`data` holds: pip install 'alignax[data]', or pip install pyarrow") from error
    if not path.is_file():
        raise DataError(f"{path}:0: no such file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (errors, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read as Parquet: {error}") from error


def rows(path: Path, ledger: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of a file, by its suffix; ConfigError naming the suffixes known where it has another.

    CSV cells are strings; the fields of the other kinds are as JSON has them. Blank lines are noted in the ledger.
    """
    name = path.name.removesuffix(".gz")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return json_lines(path, ledger)
    if name.endswith(".json"):
        return _json(path, ledger)
    if name.endswith(".csv"):
        return _csv_rows(path)
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    raise ConfigError(f"{str(path)!r}: the suffix is none of {list(SUFFIXES)}")
