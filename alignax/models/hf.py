"""Hugging Face folders in and out: config.json, safetensors weights, tokenizer files, generation ids. Needs no torch.

What a config.json and its tensors mean is said by alignax.models.families; whatever the decoder does not compute is
refused there by name: a model that loads is the model that was saved. Weights stream (alignax.models.stream), so
neither direction needs the host memory of a whole model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from alignax.models import families
from alignax.models.decoder import DecoderConfig, Params, abstract_params
from alignax.models.files import (
    MAX_SHARD_BYTES,
    TensorReader,
    list_names,
    open_tensors,
    read_json,
    weight_files,
    write_tensors,
    write_text,
)
from alignax.models.stream import Reporting, drain, fill, fits, floating_dtype
from alignax.types import ConfigError

# What belongs to a model besides config.json and its weights. generation_config.json is merged, not copied.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
              "spiece.model", "additional_chat_templates")
NATIVE = "params"
PART = ".alignax-part"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """The DecoderConfig of `path`/config.json; ConfigError names each setting that the decoder does not compute."""
    place = pathlib.Path(path) / "config.json"
    return families.read_config(read_json(place), place)


def _matched(path: pathlib.Path, config: DecoderConfig, reader: TensorReader) -> TensorReader:
    """The reader under the family's own names, with exactly the tensors that the config asks for."""
    family = families.FAMILIES[config.family]
    expected, held = family.tensors(config), set(reader.names())
    full = {name: name if name in expected or not family.prefix else family.prefix + name for name in held}
    names = {full[name]: name for name in held if full[name] in expected}
    head, embedding = family.tied
    spare: set[str] = set()
    if config.tie_embeddings and head in held and head not in expected:
        spare = {head}
        names.setdefault(embedding, head)
    missing = expected.keys() - names.keys()
    unexpected = {name for name in held - set(names.values()) - spare
                  if not re.fullmatch(family.derived, full[name]) and not re.fullmatch(family.derived, name)}
    if missing or unexpected:
        parts = [f"{word}: {list_names(found)}"
                 for word, found in (("missing", missing), ("unexpected", unexpected)) if found]
        raise ConfigError(f"{path}: found tensors that do not fit config.json ({'; '.join(parts)}), allowed: exactly "
                          f"the {len(expected)} tensors of this {family.architectures[0]}")
    if spare and names[embedding] != head and not np.array_equal(reader.read(head), reader.read(names[embedding])):
        raise ConfigError(f"{reader.file(head)}: {head}: found values that differ from {embedding}, allowed: equal "
                          "ones, or tie_word_embeddings false in config.json")
    return reader.renamed(names)


def load(path: str | os.PathLike, dtype: Any = None, *, shardings: Any = None, host: bool = False,
         reporting: Reporting | None = None) -> tuple[DecoderConfig, Params]:
    """(config, params) of a local Hugging Face folder.

    dtype: `float32` (also None), `bfloat16` or another floating type for every array, or `stored` for the types of the
    file. Each tensor is read alone and written into its place in the stacked array on the devices, so that the host
    holds one tensor (and the devices the model). shardings: a tree of shardings like the parameters; None: the default
    device. host=True leaves numpy arrays on the host instead. reporting(done, total) is called after each tensor with
    bytes of the files. Raises ConfigError, naming file and tensor, for missing, unexpected or misshapen tensors, and
    for a setting the decoder does not compute (see read_config). A stored output matrix of a tied model is accepted
    only where it equals the embedding.
    """
    path = pathlib.Path(path)
    if host and shardings is not None:
        raise ConfigError("load(shardings=): found shardings together with host=True, allowed: one of them")
    config = read_config(path)
    reader = _matched(path, config, open_tensors(path))
    return config, fill(reader, families.tensors(config), abstract_params(config),
                        dtype="float32" if dtype is None else dtype, shardings=shardings, host=host,
                        reporting=reporting)


def check_target(path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raises ConfigError where `path` is a file, or a folder that is not empty (unless `overwrite`)."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: found a file, allowed: a folder, or a name that is free")
    present = [p.name for p in path.iterdir() if p.name != PART] if path.exists() else []
    if present and not overwrite:
        raise ConfigError(f"{path}: found a folder that is not empty ({list_names(present)}), allowed: an empty or a "
                          "new one, or overwrite=True")


@contextlib.contextmanager
def staged(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A hidden folder inside `path`; what is written there moves to `path` at the end, config.json last.

    A folder without config.json is no model to any reader, so an interrupted call leaves nothing that looks whole; an
    error removes what it wrote. Refuses a `path` that is a file, or that holds anything, unless `overwrite`: then
    files of the same names and all former weights are replaced at the end, and other files stay. Raises ConfigError.
    """
    path = pathlib.Path(path)
    check_target(path, overwrite=overwrite)
    created = not path.exists()
    part = path / PART
    shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        if created:
            path.rmdir()
        raise
    (path / "config.json").unlink(missing_ok=True)
    for old in weight_files(path):
        old.unlink()
    if (path / NATIVE).is_dir():
        shutil.rmtree(path / NATIVE)
    for new in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
        target = path / new.name
        if target.is_dir():
            shutil.rmtree(target)
        new.replace(target)
    part.rmdir()


def copy_companions(source: pathlib.Path, path: pathlib.Path) -> None:
    """Copies those of COMPANIONS that the folder `source` holds into the folder `path`."""
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, path / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copyfile(source / name, path / name)


def describe(path: pathlib.Path, config: DecoderConfig, dtype: str, *, source: str | os.PathLike | None = None,
             bos_token_id: int | None = None, eos_token_id: int | tuple[int, ...] | list[int] | None = None) -> None:
    """Writes everything of a model's folder but the weights: config.json, generation_config.json, companions.

    dtype: the name that config.json gives for the weights. source: a folder from which tokenizer, template and
    generation settings come; ids that are given here take the place of its own. Raises ConfigError for a source that is
    no folder, ids outside the vocabulary, and a config that its family's config.json cannot express.
    """
    raw = {name: {} for name in ("config.json", "generation_config.json")}
    if source is not None:
        source = pathlib.Path(source)
        if not source.is_dir():
            raise ConfigError(f"save(source=): found {str(source)!r}, allowed: a local folder")
        raw = {name: read_json(source / name) if (source / name).is_file() else {} for name in raw}
    eos = list(eos_token_id) if isinstance(eos_token_id, (tuple, list)) else eos_token_id
    given = {"bos_token_id": bos_token_id, "eos_token_id": eos}
    given = {key: value for key, value in given.items() if value is not None}
    ids = {"bos_token_id": None, "eos_token_id": None}
    ids |= {key: raw["config.json"][key] for key in _IDS if raw["config.json"].get(key) is not None} | given
    generation = {**ids, **raw["generation_config.json"], **given}
    for name, value in [*ids.items(), *((key, generation.get(key)) for key in _IDS)]:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (isinstance(number, int) and 0 <= number < config.vocab_size):
                raise ConfigError(f"save({name}=): found {number!r}, allowed: 0 .. {config.vocab_size - 1}")
    settings = families.write_config(config) | ids | {"torch_dtype": dtype, "dtype": dtype}
    path.mkdir(parents=True, exist_ok=True)
    if source is not None:
        copy_companions(source, path)
    write_text(path / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_text(path / "config.json", json.dumps(settings, indent=2) + "\n")


def saved_dtype(params: Params, dtype: Any = None) -> np.dtype:
    """The one dtype that `save` writes: `dtype`, or (None, `stored`) that of all arrays; ConfigError where they
    differ, and for one that weights are not saved in."""
    chosen = None if dtype is None else floating_dtype(dtype, "save(dtype=)")
    found = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}) if chosen is None else [str(chosen)]
    if len(found) != 1 or found[0] not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"save({'params' if chosen is None else 'dtype'}=): found dtypes {found}, allowed: one of "
                          "float32, bfloat16, float16 for all (dtype= converts)")
    return jax.numpy.dtype(found[0])


def save(path: str | os.PathLike, config: DecoderConfig, params: Params, *, dtype: Any = None,
         max_shard_bytes: float = MAX_SHARD_BYTES, source: str | os.PathLike | None = None,
         bos_token_id: int | None = None, eos_token_id: int | tuple[int, ...] | list[int] | None = None,
         overwrite: bool = False, reporting: Reporting | None = None) -> None:
    """Writes a folder that transformers loads: config, generation settings, safetensors and the source's companions.

    Tensors leave the devices one at a time. dtype: `bfloat16`, `float16` or `float32` for every tensor; None or
    `stored`: as the arrays are, which must be one dtype for the whole tree. max_shard_bytes: beyond it, the weights are
    cut into shards with an index. source: the folder whose tokenizer, chat template and generation settings are copied
    (COMPANIONS); the ids given here take the place of the source's. overwrite: see `staged`; without it, a folder that
    holds anything is refused. reporting(done, total) is called after each tensor with bytes. Raises ConfigError where
    params do not fit the config or an id lies outside the vocabulary; nothing is left behind then.
    """
    fits(params, abstract_params(config))
    width, slots = saved_dtype(params, dtype), families.tensors(config)
    with staged(path, overwrite=overwrite) as part:
        describe(part, config, str(width), source=source, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        write_tensors(part, drain(params, slots, dtype=width, reporting=reporting), max_shard_bytes=max_shard_bytes)


def _tokenizer_ids(path: pathlib.Path, settings: dict[str, Any]) -> Callable[[str], int | None]:
    """A look-up from a role ("pad", ...) to its token id, through tokenizer_config.json and tokenizer.json."""
    table: dict[str, int] = {}
    if (path / "tokenizer.json").is_file():
        tokenizer = read_json(path / "tokenizer.json")
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, dict):
            table.update(vocabulary)
        table.update({entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())})
    table.update({entry["content"]: int(number) for number, entry in settings.get("added_tokens_decoder", {}).items()})

    def find(role):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        if token not in table:
            raise ConfigError(f"{path / 'tokenizer_config.json'}: {role}_token: found {token!r}, allowed: a token of "
                              "tokenizer.json or of added_tokens_decoder")
        return table[token]

    return find


def read_generation_ids(path: str | os.PathLike) -> dict[str, Any]:
    """{"bos": int | None, "eos": tuple[int, ...], "pad": int | None} of a Hugging Face folder.

    Each id comes from the first file that gives it: generation_config.json, config.json, tokenizer_config.json (a
    token, looked up in tokenizer.json). eos is the whole set of that file, in its order, empty where none gives one;
    pad is None where none gives one, and is never replaced by eos. ConfigError where an id is not an integer >= 0.
    """
    path = pathlib.Path(path)
    raw = [(path / name, read_json(path / name)) for name in ("generation_config.json", "config.json")
           if (path / name).is_file()]
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    if not raw and not has_tokenizer:
        raise ConfigError(f"{path}: found none of generation_config.json, config.json, tokenizer_config.json, allowed: "
                          "a local Hugging Face folder with one of them")
    lookup = None
    result: dict[str, Any] = {}
    for role in ("bos", "eos", "pad"):
        key = f"{role}_token_id"
        given = ((file, content[key]) for file, content in raw if content.get(key) is not None)
        place, found = next(given, (path / "tokenizer_config.json", None))
        if found is None and has_tokenizer:
            if lookup is None:
                lookup = _tokenizer_ids(path, read_json(path / "tokenizer_config.json"))
            found = lookup(role)
        ids = found if isinstance(found, list) and role == "eos" else [] if found is None else [found]
        for number in ids:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ConfigError(f"{place}: {key}: found {found!r}, allowed: an integer >= 0"
                                  + (" or a list of them" if role == "eos" else ""))
        result[role] = tuple(dict.fromkeys(ids)) if role == "eos" else (ids[0] if ids else None)
    return result
