"""Prepared datasets: records read once, split, sharded and stored as a TFDS dataset that is read at random places.

A prepared folder is a TFDS dataset (array_record shards, `features.json`, `dataset_info.json`; without TensorFlow)
with `alignax.json` beside: what was asked for, the source files with their SHA-256, the ledger of reading, and the
SHA-256 of every shard. It appears whole or not at all. Until then the work stands in a hidden folder next to it: the
same call after a kill goes on behind the last finished shard, and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignax.data import formats, tfds_builder
from alignax.data.ledger import Ledger
from alignax.data.records import Record
from alignax.types import ConfigError, DataError

MANIFEST = "alignax.json"
SPLIT_BY = ("prompt", "id")
_LAYOUT = 1  # of the folder; part of what was asked for

Paths = str | os.PathLike | Sequence[str | os.PathLike]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared folder: where it is, records per split, the ledger of reading, and whether this call made it."""

    folder: Path
    counts: Mapping[str, int]
    ledger: Ledger
    fresh: bool


def eval_share(record: Record, by: str) -> float:
    """Where a record falls in [0, 1): a function of its prompt's text (by="prompt") or of its id alone.

    Records with one prompt fall together, so that no prompt is trained on and evaluated on. A record without a
    prompt falls by its id.
    """
    if by not in SPLIT_BY:
        raise ConfigError(f"eval_share: by is {by!r}, allowed are {list(SPLIT_BY)}")
    key = tfds_builder.content_text(record.prompt) if by == "prompt" and record.prompt else f"id:{record.id}"
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2**64


def prepare(sources: Paths | Mapping[str, Paths], out: str | os.PathLike, *, format: str = "auto",
            source_split: str | None = None, eval_fraction: float = 0.0, split_by: str = "prompt",
            shard_records: int = 20000, on_identical: str = "error", console: Any = None) -> Prepared:
    """Reads files into a prepared folder `out`, and returns what it holds.

    sources: a file or several (or folders of files), or {"train": files, "eval": files} for given splits. format,
    source_split, on_identical: as for `formats.read` (source_split is its `split`). eval_fraction: the share of
    records that goes to the split `eval`, chosen by a stable hash (split_by: `prompt` keeps the records of one prompt
    together, or `id`). shard_records: records per shard. console: a rich console that shows progress, or None.

    Equal calls on equal files give equal bytes. Where `out` holds this very dataset already, nothing is done; other
    content in it is refused. Raises ConfigError for a setting that cannot work, DataError for a file that cannot be
    read, an id that two files share, and a split that stays empty.
    """
    request = _request(sources, format=format, source_split=source_split, eval_fraction=eval_fraction,
                       split_by=split_by, shard_records=shard_records, on_identical=on_identical)
    out = Path(out)
    found = _existing(out, request)
    if found is not None:
        return found
    tfds_builder.require_tfds()
    partial = out.parent / f".{out.name}.partial"
    ledger = Ledger()
    splits = _splits(request, ledger)
    with _working_folder(partial, request) as done:
        shards = {split: [records[start:start + shard_records] for start in range(0, len(records), shard_records)]
                  for split, records in splits.items()}
        made = _build(shards, partial, done, console)
        counts = {split: len(records) for split, records in splits.items()}
        ledger.keep(sum(counts.values()))
        manifest = {"kind": "alignax prepared dataset", "request": request, "records": counts,
                    "ledger": ledger.as_dict(), "files": {path.name: _digest(path) for path in sorted(made.iterdir())}}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", "utf-8")
        os.replace(made, out)  # over an empty folder or nothing: _existing has refused the rest
    shutil.rmtree(partial)
    return Prepared(out, counts, ledger, True)


def is_prepared(path: str | os.PathLike) -> bool:
    """Whether `path` is a prepared folder."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of `alignax.json`; ConfigError where the folder has none or it is not one of ours."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{str(folder)!r} is not a prepared folder: no {MANIFEST}; make one with "
                          "`alignax data prepare`")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        manifest["request"]["layout"], manifest["records"], manifest["ledger"]["kept"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not the {MANIFEST} of a prepared folder: {error!r}") from error
    return manifest


def splits_of(folder: str | os.PathLike) -> list[str]:
    """Names of the splits of a prepared folder, `train` first."""
    return sorted(read_manifest(folder)["records"], key=lambda split: (split != "train", split))


class Store(Sequence):
    """The records of one split of a prepared folder, in the order of the sources, read when they are asked for.

    A source for grain too: `__getitems__` reads many at once, and a pickled store opens the files again where it
    arrives, so that worker processes can read.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train"):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(folder)
        if split not in self.manifest["records"]:
            raise ConfigError(f"{str(folder)!r} has no split {split!r}; it has {sorted(self.manifest['records'])}")
        for name, stored in self.manifest["files"].items():
            size = os.path.getsize(self.folder / name) if (self.folder / name).is_file() else None
            if size != stored["bytes"]:
                raise DataError(f"{self.folder / name}:0: {'no such file' if size is None else f'{size} bytes'}, but "
                                f"{MANIFEST} names it with {stored['bytes']} bytes; the prepared folder is damaged")
        self._rows: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def _opened(self):
        if self._rows is None:
            tfds = tfds_builder.require_tfds()
            self._rows = tfds.builder_from_directory(self.folder).as_data_source(split=self.split)
        return self._rows

    def __len__(self) -> int:
        return self.manifest["records"][self.split]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"record {place} of {len(self)}")
        return self.__getitems__([place])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """The records at `indices`, in that order."""
        places = [operator.index(index) % len(self) for index in indices]
        return [tfds_builder.record_of(row) for row in self._opened().__getitems__(places)] if places else []

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 256):
            yield from self.__getitems__(range(start, min(start + 256, len(self))))


def open_store(folder: str | os.PathLike, split: str = "train") -> Store:
    """Opens one split of a prepared folder. ConfigError for another folder or split, DataError for a damaged one."""
    return Store(folder, split)


def load_records(path: str | os.PathLike, *, format: str = "auto", split: str | None = None,
                 on_identical: str = "error", ledger: Ledger | None = None) -> list[Record]:
    """All records of a file or a folder of files (any of `formats`), or of one split of a prepared folder.

    The one entrance for whatever a user may name. split: as for `formats.read`; of a prepared folder, `train` where
    none is named. format and on_identical matter for files: a prepared folder was read under its own, which its
    manifest holds; what was dropped and noted then is merged into `ledger`, all splits together.
    """
    if not is_prepared(path):
        return formats.read(path, format, split=split, on_identical=on_identical, ledger=ledger)
    records = list(open_store(path, split or "train"))
    if ledger is not None:
        stored = Ledger.from_dict(read_manifest(path)["ledger"])
        ledger.dropped.update(stored.dropped)
        ledger.noted.update(stored.noted)
    return records


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _request(sources: Paths | Mapping[str, Paths], **settings: Any) -> dict[str, Any]:
    """What was asked for, as plain JSON: settings, and the source files with their size and SHA-256."""
    given = sources if isinstance(sources, Mapping) else {"train": sources}
    files = {split: [paths] if isinstance(paths, (str, os.PathLike)) else list(paths) for split, paths in given.items()}
    if not files or not all(files.values()):
        raise ConfigError(f"prepare: no source files for {[s for s, f in files.items() if not f] or 'any split'}")
    share, shard_records = settings["eval_fraction"], settings["shard_records"]
    if not 0 <= share < 1 or not math.isfinite(share):
        raise ConfigError(f"prepare: eval_fraction is {share}, expected 0 <= eval_fraction < 1")
    if share and "eval" in files:
        raise ConfigError(f"prepare: eval_fraction is {share}, but the split 'eval' has files of its own; give one")
    if shard_records < 1:
        raise ConfigError(f"prepare: shard_records is {shard_records}, expected at least 1")
    if settings["split_by"] not in SPLIT_BY:
        raise ConfigError(f"prepare: split_by is {settings['split_by']!r}, allowed are {list(SPLIT_BY)}")
    for split in files:
        if not split.isidentifier():
            raise ConfigError(f"prepare: split name {split!r}; expected letters, digits and underscores")
    return {"layout": _LAYOUT, **settings,
            "sources": {split: [entry for path in paths for entry in _entries(Path(path), settings["source_split"])]
                        for split, paths in files.items()}}


def _entries(path: Path, split: str | None) -> list[dict[str, Any]]:
    """The files of one source; `split` chooses files of a folder by their names, rows of a file by their field."""
    if is_prepared(path):
        raise ConfigError(f"prepare: {str(path)!r} is a prepared folder already; expected files or a folder of files")
    if path.is_dir():
        return [{"path": os.fspath(file), "split": None, **_digest(file)} for file in formats.files_of(path, split)]
    if not path.is_file():
        raise DataError(f"{path}:0: no such file")
    return [{"path": os.fspath(path), "split": split, **_digest(path)}]


def _existing(out: Path, request: Mapping[str, Any]) -> Prepared | None:
    """The dataset in `out` where it is the one asked for, None where `out` is free; else ConfigError."""
    if is_prepared(out):
        manifest = read_manifest(out)
        if manifest["request"] != request:
            other = sorted(key for key in request.keys() | manifest["request"].keys()
                           if manifest["request"].get(key) != request.get(key))
            raise ConfigError(f"{str(out)!r} holds a dataset prepared otherwise; what differs: {', '.join(other)}; "
                              "name another folder or remove this one")
        counts = {split: len(open_store(out, split)) for split in splits_of(out)}
        return Prepared(out, counts, Ledger.from_dict(manifest["ledger"]), False)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        content = sorted(path.name for path in out.iterdir())[:5] if out.is_dir() else ["a file"]
        raise ConfigError(f"{str(out)!r} holds something else ({', '.join(content)}); expected a new or empty folder")
    if not out.parent.is_dir():
        raise ConfigError(f"{str(out)!r}: no folder {str(out.parent)!r} to make it in")
    return None


@contextlib.contextmanager
def _working_folder(partial: Path, request: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of finished shards inside `partial`, emptied where it belongs to another request, and locked."""
    try:
        import fcntl
    except ImportError as error:
        raise ConfigError(f"prepare: file locks need a POSIX system ({error})") from error
    partial.mkdir(exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{str(partial)!r} is in use by another process that prepares it") from error
        done, note, text = partial / "shards", partial / "request.json", json.dumps(request, sort_keys=True)
        if not note.is_file() or note.read_text("utf-8") != text:
            shutil.rmtree(done, ignore_errors=True)
            note.write_text(text, "utf-8")
        done.mkdir(exist_ok=True)
        yield done


def _splits(request: Mapping[str, Any], ledger: Ledger) -> dict[str, list[Record]]:
    """The records of every split; DataError on an id that stands twice and on an empty split."""
    splits: dict[str, list[Record]] = {split: [] for split in request["sources"]}
    if request["eval_fraction"]:
        splits["eval"] = []
    places: dict[str, str] = {}
    for split, files in request["sources"].items():
        for file in files:
            for record in formats.read(file["path"], request["format"], split=file["split"],
                                       on_identical=request["on_identical"], ledger=ledger):
                if record.id in places:
                    raise DataError(f"{record.place}: field 'id': {record.id!r} is already used at "
                                    f"{places[record.id]}; ids must be unique")
                places[record.id] = record.place
                held_out = request["eval_fraction"] and \
                    eval_share(record, request["split_by"]) < request["eval_fraction"]
                splits["eval" if held_out else split].append(record)
    for split, records in splits.items():
        if not records:
            raise DataError(f"prepare: split {split!r} is empty; {len(places)} records were read, eval_fraction is "
                            f"{request['eval_fraction']}")
    return splits


def _build(shards: Mapping[str, Sequence[Sequence[Record]]], partial: Path, done: Path, console: Any) -> Path:
    """Writes the TFDS dataset below `partial` and returns its folder."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    root = partial / "tfds"
    shutil.rmtree(root, ignore_errors=True)  # what a killed run left; its finished shards are in `done`
    total = sum(len(shard) for parts in shards.values() for shard in parts)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=console, disable=console is None)
    with bar:
        task = bar.add_task("records written", total=total)
        builder = tfds_builder.builder_class()(shards, done, lambda: bar.advance(task), data_dir=root)
        builder.download_and_prepare()
    return Path(builder.data_dir)
