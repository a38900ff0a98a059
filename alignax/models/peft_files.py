"""Adapters in the file layout of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

PEFT names a matrix by its torch module and keeps a as lora_A [rank, in] and b as lora_B [out, rank], also where the
base keeps its matrix as [in, out]. Which module a matrix belongs to, and whether one module holds several of our
matrices, is read off the family's tensor table (alignax.models.families). A fused module (a packed query, key and
value) is written exactly, with factors in blocks: matrices that share their a share its columns, the others get columns
of their own, so that the rank of the module is the sum; reading gives every part the whole a and its own rows of b.

PEFT scales by alpha / rank of each module, we by one number of the config. Where the two ranks differ, the ratio goes
into b, both ways: deltas are equal, and a module's own rank and alpha (rank_pattern, alpha_pattern) and layers that
PEFT left out (layers_to_transform) lose nothing; missing columns of the stacked leaf are zeros, to which no gradient
ever flows, since it is a product with the zeros on the other side.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from alignax.models import families
from alignax.models.adapters import OUTSIDE_REASON, AdapterConfig, Adapters, adaptable, check, flatten, unflatten
from alignax.models.config import DecoderConfig
from alignax.models.decoder import abstract_params
from alignax.models.families import Slot
from alignax.models.files import list_names, read_json, write_text
from alignax.types import ConfigError

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = {"a": ".lora_A.weight", "b": ".lora_B.weight"}

# Settings that this module reads, and those that say nothing about what the stored adapter computes: bookkeeping,
# how it was initialised, dropout in training, and parameters of features that have a switch of their own.
_READ = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern",
         "alpha_pattern", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights")
_HARMLESS = ("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
             "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config",
             "ensure_weight_tying")
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base model too, which the stored files do not say.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Module(NamedTuple):
    """One torch module that can take an adapter: its name, the part of it behind the layer's number, its layer, the
    slot of its weight, and our paths inside params["layers"] that it holds, with their shapes [in, out]."""

    name: str
    kind: str
    layer: int
    slot: Slot
    parts: dict[str, tuple[int, int]]


def _modules(config: DecoderConfig) -> dict[str, Module]:
    """{module name: Module} of the linear layers inside the blocks, in the order of the family's table."""
    shapes, found = adaptable(abstract_params(config)), {}
    for tensor, slot in families.tensors(config).items():
        paths = ["/".join(place.path[1:]) for place in slot.places]
        layer, name = slot.places[0].layer, tensor.removesuffix(".weight")
        if layer is None or name == tensor or slot.places[0].path[0] != "layers" or not set(paths) <= set(shapes):
            continue
        kind = name.split(f".{layer}.", 1)[1]
        found[name] = Module(name, kind, layer, slot, {path: shapes[path][1:] for path in paths})
    return found


def _is_turned(module: Module) -> bool:
    """Whether the file keeps the module's weight as torch's [out, in]; Conv1D's [in, out] is not turned."""
    wide, width = next(iter(module.parts.values()))[0], sum(out for _, out in module.parts.values())
    if wide != width:
        return module.slot.shape == (width, wide)
    # A square matrix does not show it in its shape: mark the first input and see where the mark lands.
    marks = [np.zeros(shape, np.int8) for shape in module.parts.values()]
    for mark in marks:
        mark[0] = 1
    return bool(module.slot.from_params(*marks)[:, 0].all())


def _to_file(module: Module, turned: bool, parts: list[np.ndarray]) -> np.ndarray:
    """[rank, width of the module] of the b [rank, out_i] of its parts, in the column order of the file.

    The table's transforms are for whole matrices and act on the outputs alone, so rows of b pass as the first inputs
    of an otherwise empty matrix.
    """
    rank, rows = parts[0].shape[0], []
    wide = next(iter(module.parts.values()))[0]
    for start in range(0, rank, wide):
        whole = [np.zeros((wide, part.shape[1]), part.dtype) for part in parts]
        for matrix, part in zip(whole, parts, strict=True):
            matrix[:len(part[start:start + wide])] = part[start:start + wide]
        file = module.slot.from_params(*whole)
        rows.append((file.T if turned else file)[:min(wide, rank - start)])
    return np.concatenate(rows)


def _from_file(module: Module, turned: bool, b: np.ndarray) -> list[np.ndarray]:
    """The b [rank, out_i] of each part, of b [rank, width of the module]; the inverse of _to_file."""
    rank, width = b.shape
    wide, rows = next(iter(module.parts.values()))[0], []
    for start in range(0, rank, wide):
        whole = np.zeros((wide, width), b.dtype)
        piece = b[start:start + wide]
        whole[:len(piece)] = piece
        file = whole.T if turned else whole
        rows.append([place.to_params(file)[:len(piece)] for place in module.slot.places])
    return [np.concatenate(pieces) for pieces in zip(*rows, strict=True)]


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (rank ** 0.5 if rslora else rank)


# --- writing -------------------------------------------------------------------------------------------------------


def _blocks(parts: Mapping[str, tuple[int, int]], leaves: Mapping[str, Mapping[str, np.ndarray]]):
    """(a [layers, in, R], {path: rows of R}) of a module: parts with equal a share their columns, others add theirs."""
    columns: list[np.ndarray] = []
    starts: list[int] = []
    rows, rank = {}, 0
    for path in parts:
        if path not in leaves:
            continue
        a = leaves[path]["a"]
        same = next((start for column, start in zip(columns, starts, strict=True) if np.array_equal(column, a)), None)
        if same is None:
            same, rank = rank, rank + a.shape[-1]
            columns.append(a)
            starts.append(same)
        rows[path] = slice(same, same + a.shape[-1])
    return np.concatenate(columns, axis=-1), rows


def _target(kind: str, kinds: set[str], names: list[str]) -> str:
    """The shortest ending of `kind` that PEFT will not also find in a module without an adapter."""
    pieces = kind.split(".")
    for length in range(1, len(pieces) + 1):
        ending = ".".join(pieces[-length:])
        others = [name for name in names if f".{name}".endswith(f".{ending}")]
        if all(any(name.endswith(f".{own}") for own in kinds) for name in others):
            return ending
    return kind


def save_peft(folder: str | os.PathLike, config: DecoderConfig, adapter_config: AdapterConfig,
              adapters: Mapping[str, Any], *, base_model_name: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for peft's PeftModel.from_pretrained.

    adapters: the tree as trained (b not multiplied by the scale), in a floating dtype that is kept. base_model_name:
    what PEFT is told that the adapter belongs to. Raises ConfigError where adapters do not fit the model.
    """
    check(abstract_params(config), adapters)
    leaves = {path: {part: np.asarray(array) for part, array in leaf.items()}
              for path, leaf in flatten(adapters).items()}
    if not leaves:
        raise ConfigError("save_peft(adapters=): found an empty tree, allowed: one or more adapted matrices")
    for path, leaf in leaves.items():
        for part, array in leaf.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ConfigError(f"save_peft(adapters=): {path}/{part}: found dtype {array.dtype}, allowed: a "
                                  "floating type")
    rslora = adapter_config.scaling == "rslora"
    modules = _modules(config)
    known = {path for module in modules.values() for path in module.parts}
    if leaves.keys() - known:
        raise ConfigError(f"save_peft(adapters=): found {list_names(leaves.keys() - known)}, which no module of family "
                          f"{config.family!r} holds, allowed: {list_names(known)}")

    tensors, ranks, conv = {}, {}, False
    blocks: dict[str, tuple[np.ndarray, dict[str, slice]]] = {}
    for module in modules.values():
        if not leaves.keys() & module.parts.keys():
            continue
        if module.kind not in blocks:
            blocks[module.kind] = _blocks(module.parts, leaves)
        a, rows = blocks[module.kind]
        ranks[module.kind] = rank = a.shape[-1]
        turned = _is_turned(module)
        conv |= not turned
        ratio = adapter_config.scale / _scale(adapter_config.alpha, rank, rslora)
        parts = []
        for path, (_, out) in module.parts.items():
            part = np.zeros((rank, out), leaves[next(iter(rows))]["b"].dtype)
            if path in rows:
                part[rows[path]] = leaves[path]["b"][module.layer]
            parts.append(part if ratio == 1 else (part * np.asarray(ratio, np.float64)).astype(part.dtype))
        tensors[f"{_PREFIX}{module.name}{_SIDES['a']}"] = np.ascontiguousarray(a[module.layer].T)
        tensors[f"{_PREFIX}{module.name}{_SIDES['b']}"] = np.ascontiguousarray(_to_file(module, turned, parts).T)

    names = [name.removesuffix(".weight") for name in families.tensors(config)]
    alpha = adapter_config.alpha
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model_name,
        "inference_mode": True, "r": adapter_config.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": rslora, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": conv, "use_dora": False,
        "modules_to_save": None, "init_lora_weights": True, "alpha_pattern": {},
        "target_modules": sorted({_target(kind, set(ranks), names) for kind in ranks}),
        "rank_pattern": {kind: rank for kind, rank in sorted(ranks.items()) if rank != adapter_config.rank}}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (TENSOR_FILE + ".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / TENSOR_FILE)
    write_text(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")


# --- reading -------------------------------------------------------------------------------------------------------


def _read_settings(place: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json, with every setting that would change the result and is not computed refused by name."""
    raw = read_json(place)

    def refuse(key, allowed):
        raise ConfigError(f"{place}: {key}: found {raw.get(key)!r}, allowed: {allowed}")

    for key, allowed in (("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None)), ("bias", ("none", None)),
                         ("init_lora_weights", _PLAIN_STARTS), ("use_rslora", (True, False, None))):
        if raw.get(key) not in allowed:
            refuse(key, ", ".join(map(repr, allowed)))
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        refuse("r", "an integer >= 1")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        refuse("lora_alpha", "a finite number > 0")
    for key, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        kinds = (int,) if key == "rank_pattern" else (int, float)
        found = raw.get(key) or {}
        if not isinstance(found, dict) or not all(isinstance(value, kinds) and not isinstance(value, bool)
                                                  and least <= value < float("inf") for value in found.values()):
            refuse(key, f"an object of module patterns to numbers >= {least}")
    targets = raw.get("target_modules")
    if not targets or not (isinstance(targets, str) or isinstance(targets, list)):
        refuse("target_modules", "a list of module names or a regular expression")
    for key, value in raw.items():
        # False, null, 0, "" and empty collections switch a feature off.
        if value and key not in _READ and key not in _HARMLESS:
            refuse(key, "absent, null or off (not computed)")
    return raw


def _adapted(raw: Mapping[str, Any], modules: Mapping[str, Module]) -> dict[str, Module]:
    """The modules that PEFT's settings name, by PEFT's rules: endings where a list, a whole match where a text."""
    ends = lambda name, endings: any(f".{name}".endswith(f".{ending}") for ending in endings)
    targets, excluded = raw["target_modules"], raw.get("exclude_modules") or []
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    patterns = raw.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def chosen(module):
        if re.fullmatch(excluded, module.name) if isinstance(excluded, str) else ends(module.name, excluded):
            return False
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, module.name) is not None
        if not ends(module.name, targets):
            return False
        numbered = not patterns or any(re.match(rf"(?:^|.*?\.){pattern}\.{module.layer}\.", module.name)
                                       for pattern in patterns)
        return module.name in targets or not layers or (numbered and module.layer in layers)

    return {name: module for name, module in modules.items() if chosen(module)}


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default):
    """The value of the first key that matches the end of the module's name, else default."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def load_peft(folder: str | os.PathLike, config: DecoderConfig, dtype=jnp.float32) -> tuple[AdapterConfig, Adapters]:
    """(adapter config, adapters cast to `dtype`) of a PEFT folder for a model of `config`.

    The tree is as PEFT trained it: `scaled` and `merge` apply the scale. Dropout is not read, it acts in training only.
    Raises ConfigError, naming file and setting or tensor, for what is not plain LoRA on linear layers inside the
    blocks (DoRA, trained biases, modules_to_save, adapters of embedding or head, initialisations that change the base),
    and for missing, unexpected or misshapen tensors.
    """
    folder = pathlib.Path(folder)
    place = folder / TENSOR_FILE
    raw = _read_settings(folder / CONFIG_FILE)
    if not place.is_file():
        raise ConfigError(f"{place}: found no such file, allowed: adapters in safetensors (other formats are not read)")
    try:
        tensors = load_file(place)
    except SafetensorError as error:
        raise ConfigError(f"{place}: found a file that is not safetensors ({error}), allowed: a whole one") from error
    every = _modules(config)
    modules = _adapted(raw, every)
    wanted = {f"{_PREFIX}{name}{side}" for name in modules for side in _SIDES.values()}
    outside = [name for name in tensors.keys() - wanted
               if not any(name.startswith(f"{_PREFIX}{module}.") for module in every)]
    if outside:
        raise ConfigError(f"{place}: found {list_names(outside)}, which belong to no linear layer inside the blocks of "
                          f"this {config.family} model, allowed: lora_A and lora_B of those ({OUTSIDE_REASON})")
    if wanted != tensors.keys() or not wanted:
        parts = [f"{word}: {list_names(names)}" for word, names in (
            ("missing", wanted - tensors.keys()), ("unexpected", tensors.keys() - wanted)) if names]
        raise ConfigError(f"{place}: found tensors that do not fit {CONFIG_FILE} ({'; '.join(parts) or 'none at all'}),"
                          " allowed: lora_A.weight and lora_B.weight of every module that target_modules names")

    rslora = bool(raw.get("use_rslora"))
    base = _scale(raw["lora_alpha"], raw["r"], rslora)
    kinds: dict[str, list[Module]] = {}
    for module in modules.values():
        kinds.setdefault(module.kind, []).append(module)
    flat: dict[str, dict[str, np.ndarray]] = {}
    for members in kinds.values():
        ranks = {m.name: _of_pattern(raw.get("rank_pattern"), m.name, raw["r"]) for m in members}
        turned = _is_turned(members[0])
        for path, (wide, out) in members[0].parts.items():
            flat[path] = {"a": np.zeros((config.num_layers, wide, max(ranks.values())), jnp.dtype(dtype)),
                          "b": np.zeros((config.num_layers, max(ranks.values()), out), jnp.dtype(dtype))}
        for module in members:
            rank = ranks[module.name]
            a, b = (tensors[f"{_PREFIX}{module.name}{side}"] for side in _SIDES.values())
            wide, width = next(iter(module.parts.values()))[0], sum(out for _, out in module.parts.values())
            for side, tensor, shape in (("a", a, (rank, wide)), ("b", b, (width, rank))):
                name = f"{_PREFIX}{module.name}{_SIDES[side]}"
                if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
                    raise ConfigError(f"{place}: {name}: found {tensor.dtype} {tensor.shape}, allowed: a floating type "
                                      f"{shape}")
            ratio = _scale(_of_pattern(raw.get("alpha_pattern"), module.name, raw["lora_alpha"]), rank, rslora) / base
            rows = b.T if ratio == 1 else b.T.astype(np.float64) * ratio
            for path, part in zip(module.parts, _from_file(module, turned, rows), strict=True):
                flat[path]["a"][module.layer, :, :rank] = a.T
                flat[path]["b"][module.layer, :rank] = part
    adapter_config = AdapterConfig(rank=raw["r"], alpha=raw["lora_alpha"], targets=tuple(sorted(flat)),
                                   scaling="rslora" if rslora else "alpha/r")
    return adapter_config, unflatten({path: {part: jnp.asarray(array) for part, array in leaf.items()}
                                      for path, leaf in flat.items()})
