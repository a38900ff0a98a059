"""Tensors in safetensors files, one at a time: a lazy reader and a streaming, atomic writer. Needs no torch.

A folder holds either one `model.safetensors` or shards with `model.safetensors.index.json`. Reading opens headers
only, then one tensor per call; writing keeps one tensor in memory, whatever the size of a shard. The types are the
floating ones that weights come in (float32, float16, bfloat16 through ml_dtypes, float64) and the plain integers.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from alignax.types import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
           "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
           "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# A streamed header has to be sized before its tensors are known. Its length may be padded with spaces, so every shard
# gets this much room (the tensors then begin on a page), and one that fills it up is closed.
_ROOM = 64 * 1024


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`; ConfigError naming the file where it is absent or not an object."""
    if not path.is_file():
        raise ConfigError(f"{path}: found no such file, allowed: a local Hugging Face folder that holds it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: found text that is not JSON ({error}), allowed: a JSON object") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found a JSON {type(found).__name__}, allowed: a JSON object")
    return found


def list_names(names: Iterable[str]) -> str:
    """Up to eight sorted names, and how many more there are; for messages."""
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


class _Entry(NamedTuple):
    """Where a tensor lies and what its file's header says of it."""

    file: pathlib.Path
    key: str
    shape: tuple[int, ...]
    code: str


class TensorReader:
    """The tensors of one folder by name; only headers are held. Made by `open_tensors`."""

    def __init__(self, entries: dict[str, _Entry]):
        self._entries = entries

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the files and, inside one, of its header."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of a tensor; ConfigError for a type that weights are not read from, such as float8."""
        entry = self._entries[name]
        if entry.code not in _DTYPES:
            raise ConfigError(f"{entry.file}: {name}: found dtype {entry.code}, allowed: {', '.join(_DTYPES)}")
        return _DTYPES[entry.code]

    def file(self, name: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self._entries[name].file

    def nbytes(self, name: str) -> int:
        """The size of a tensor in its file."""
        return int(np.prod(self.shape(name), dtype=np.int64)) * self.dtype(name).itemsize

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, [*shape(name)] in dtype(name); the only call that reads more than a header."""
        self.dtype(name)
        # Opened anew each time: a mapping that stays open keeps every page it has read in the process's memory.
        with _opened(self._entries[name].file) as file:
            return file.get_tensor(self._entries[name].key)

    def renamed(self, names: Mapping[str, str]) -> TensorReader:
        """A reader of the tensors names[new], each under its new name."""
        return TensorReader({new: self._entries[old] for new, old in names.items()})


def _opened(place: pathlib.Path):
    try:
        return safe_open(place, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{place}: found no whole safetensors file ({error}), allowed: one that was downloaded or "
                          "written to its end") from error


def _header(place: pathlib.Path) -> dict[str, _Entry]:
    with _opened(place) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: _Entry(place, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def open_tensors(path: str | os.PathLike) -> TensorReader:
    """A TensorReader of a folder with model.safetensors or a sharded index. Opens headers only.

    Raises ConfigError, naming the file, where there is neither, where a file is cut short or is no safetensors file,
    and where index and shards disagree.
    """
    path = pathlib.Path(path)
    single, index = path / SINGLE, path / INDEX
    if single.is_file():
        return TensorReader(_header(single))
    if not index.is_file():
        raise ConfigError(f"{path}: found neither {SINGLE} nor {INDEX}, allowed: one of them (other weight formats are "
                          "not read)")
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise ConfigError(f"{index}: weight_map: found {table!r}, allowed: an object of tensor name to file name")
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(table.values())):
        place = path / shard
        if pathlib.PurePath(shard).name != shard or not place.is_file():
            raise ConfigError(f"{index}: found no file {shard!r} beside it, allowed: every shard of weight_map")
        held = _header(place)
        listed = {name for name, where in table.items() if where == shard}
        if held.keys() != listed:
            raise ConfigError(f"{place}: found tensors that differ from the index: {list_names(held.keys() ^ listed)}, "
                              "allowed: exactly those that weight_map lists for this shard")
        entries |= held
    return TensorReader(entries)


class _Shard:
    """One file being written: room for the header, then the tensors as they come."""

    def __init__(self, part: pathlib.Path):
        self.part, self.size = part, 0
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._text = len(json.dumps(self.header))
        self._file = part.open("wb")
        self._file.write(b"\0" * _ROOM)

    def takes(self, name: str, array: np.ndarray, limit: float) -> bool:
        """Whether the tensor goes into this shard: size, room in the header, alignment (readers map the bytes)."""
        fits = not self.size or self.size + array.nbytes <= limit
        return fits and self.size % array.itemsize == 0 and self._text + self._cost(name, array) <= _ROOM - 8

    def _cost(self, name: str, array: np.ndarray) -> int:
        return len(json.dumps({name: self._entry(array)})) + 2

    def _entry(self, array: np.ndarray) -> dict[str, Any]:
        return {"dtype": _CODES[array.dtype], "shape": list(array.shape),
                "data_offsets": [self.size, self.size + array.nbytes]}

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends the bytes of a tensor."""
        self._text += self._cost(name, array)
        self.header[name] = self._entry(array)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.size += array.nbytes

    def close(self) -> None:
        """Writes the header into its room and puts the whole file on disk."""
        text = json.dumps(self.header).encode("utf-8").ljust(_ROOM - 8)
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Removes what was written."""
        self._file.close()
        self.part.unlink(missing_ok=True)


def weight_files(path: str | os.PathLike) -> list[pathlib.Path]:
    """The files that make up the weights of a folder, the index first; empty where there are none."""
    path = pathlib.Path(path)
    return [p for p in (path / INDEX, path / SINGLE, *sorted(path.glob("model-*-of-*.safetensors"))) if p.is_file()]


def write_tensors(path: str | os.PathLike, items: Iterable[tuple[str, np.ndarray]], *,
                  max_shard_bytes: float = MAX_SHARD_BYTES, overwrite: bool = False) -> list[pathlib.Path]:
    """Streams named arrays into `path`/model.safetensors, or into shards and an index; returns the files.

    A shard holds at most max_shard_bytes of tensors, or one tensor that is larger by itself. Files bear temporary names
    until all of them are on disk, and the index comes last, so that an interrupted call leaves nothing that
    `open_tensors` takes for whole (an error also removes the parts). Existing weights are refused, or with `overwrite`
    replaced at the end. Raises ConfigError for a repeated name, a type that safetensors files of weights do not hold,
    and no items at all.
    """
    if not max_shard_bytes > 0:
        raise ConfigError(f"write_tensors(max_shard_bytes=): found {max_shard_bytes!r}, allowed: a number > 0")
    path = pathlib.Path(path)
    old = weight_files(path)
    if old and not overwrite:
        raise ConfigError(f"{path}: found {old[0].name}, allowed: a folder without weights, or overwrite=True")
    path.mkdir(parents=True, exist_ok=True)
    for part in path.glob("model-*.safetensors.part"):  # of a call that was killed
        part.unlink()
    shards: list[_Shard] = []
    seen: set[str] = set()
    try:
        for name, array in items:
            array = np.asarray(array)
            if name in seen:
                raise ConfigError(f"write_tensors(items=): found {name!r} twice, allowed: each name once")
            if array.dtype not in _CODES:
                raise ConfigError(f"write_tensors(items=): {name}: found dtype {array.dtype}, allowed: "
                                  f"{', '.join(str(dtype) for dtype in _CODES)}")
            if not shards or not shards[-1].takes(name, array, max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(path / f"model-{len(shards) + 1:05d}.safetensors.part"))
            if not shards[-1].takes(name, array, max_shard_bytes):
                raise ConfigError(f"write_tensors(items=): found a name of {len(name)} letters, allowed: one that fits "
                                  f"a header of {_ROOM} bytes")
            shards[-1].add(name, array)
            seen.add(name)
        if not shards:
            raise ConfigError("write_tensors(items=): found no tensors, allowed: one or more")
        shards[-1].close()
    except BaseException:
        for shard in shards:
            shard.abandon()
        raise
    for file in old:
        file.unlink()
    if len(shards) == 1:
        return [shards[0].part.replace(path / SINGLE)]
    files, table = [], {}
    for number, shard in enumerate(shards, 1):
        files.append(shard.part.replace(path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"))
        table |= dict.fromkeys(shard.header.keys() - {"__metadata__"}, files[-1].name)
    index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": dict(sorted(table.items()))}
    write_text(path / INDEX, json.dumps(index, indent=2) + "\n")
    return [path / INDEX, *files]


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file through a temporary name, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
