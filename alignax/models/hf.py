"""Hugging Face folders in and out: Llama configs, safetensors weights, generation ids. Needs no torch.

Both spellings of the config are read: transformers 5 writes `rope_parameters` and `dtype`, older releases
`rope_theta`, `rope_scaling` and `torch_dtype`; `save` writes both, so either release loads the result. Whatever the
decoder does not compute (biases, scaled rotary positions, windows, other activations, quantised weights) is refused
by name: a model that loads is the model that was saved.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors looks up by name)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from alignax.models.decoder import DecoderConfig, Params, abstract_params
from alignax.types import ConfigError

ARCHITECTURE = "LlamaForCausalLM"

# Our path inside a layer -> (the name between "model.layers.N." and ".weight", whether the matrix is transposed:
# torch keeps [out, in], this decoder [in, out]).
_LAYER = {
    ("attention_norm",): ("input_layernorm", False),
    ("attention", "query"): ("self_attn.q_proj", True),
    ("attention", "key"): ("self_attn.k_proj", True),
    ("attention", "value"): ("self_attn.v_proj", True),
    ("attention", "output"): ("self_attn.o_proj", True),
    ("mlp_norm",): ("post_attention_layernorm", False),
    ("mlp", "gate"): ("mlp.gate_proj", True),
    ("mlp", "up"): ("mlp.up_proj", True),
    ("mlp", "down"): ("mlp.down_proj", True),
}
_TOP = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}

# Old exports store the rotary frequencies beside the weights; they follow from rope_theta and carry no information.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`; ConfigError naming the file where it is absent or not an object."""
    if not path.is_file():
        raise ConfigError(f"{path}: found no such file, allowed: a local Hugging Face folder that holds it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: found text that is not JSON ({error}), allowed: a JSON object") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found a JSON {type(found).__name__}, allowed: a JSON object")
    return found


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """The DecoderConfig of `path`/config.json; ConfigError names each setting that the decoder does not compute."""
    place = pathlib.Path(path) / "config.json"
    raw = _read_json(place)

    def refuse(key, found, allowed):
        raise ConfigError(f"{place}: {key}: found {found!r}, allowed: {allowed}")

    def need(key):
        if raw.get(key) is None:
            refuse(key, raw.get(key), "a number (the key is required)")
        return raw[key]

    if raw.get("architectures") not in (None, [ARCHITECTURE]):
        refuse("architectures", raw["architectures"], [ARCHITECTURE])
    if raw.get("model_type") != "llama":
        refuse("model_type", raw.get("model_type"), "'llama'")
    for key, allowed in (("attention_bias", False), ("mlp_bias", False), ("sliding_window", None),
                         ("quantization_config", None), ("partial_rotary_factor", 1.0)):
        if raw.get(key, allowed) not in (allowed, None):
            refuse(key, raw[key], repr(allowed))
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", raw["hidden_act"], "'silu'")
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = raw.get(key)
        if found is None:
            continue
        if not isinstance(found, dict) or found.get("rope_type", found.get("type", "default")) != "default":
            refuse(key, found, "null or rope_type 'default' (unscaled rotary positions)")
        extra = sorted(set(found) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if extra or found.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(key, found, "the keys rope_type and rope_theta only")
        rope.update(found)
    thetas = {float(value) for value in (rope.get("rope_theta"), raw.get("rope_theta")) if value is not None}
    if len(thetas) > 1:
        refuse("rope_theta", sorted(thetas), "one value in rope_theta and rope_parameters")
    heads = need("num_attention_heads")
    given_heads, given_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    return DecoderConfig(
        vocab_size=need("vocab_size"), hidden_size=need("hidden_size"), intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"), num_heads=heads,
        num_kv_heads=heads if given_heads is None else given_heads,
        head_dim=need("hidden_size") // heads if given_dim is None else given_dim,
        # Absent keys mean the defaults of transformers' LlamaConfig.
        rope_theta=thetas.pop() if thetas else 10000.0, rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", 2048))


def _tensor_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> the file that holds it, for one model.safetensors or a sharded index. Opens headers only."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        with safe_open(single, framework="numpy") as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise ConfigError(f"{path}: found neither model.safetensors nor model.safetensors.index.json, allowed: one of "
                          "them (other weight formats are not read)")
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise ConfigError(f"{index}: weight_map: found {table!r}, allowed: an object of tensor name to file name")
    files = {}
    for shard in sorted(set(table.values())):
        place = path / shard
        if not place.is_file():
            raise ConfigError(f"{index}: found no file {shard!r} beside it, allowed: every shard of weight_map")
        with safe_open(place, framework="numpy") as file:
            held = set(file.keys())
        listed = {name for name, where in table.items() if where == shard}
        if held != listed:
            raise ConfigError(f"{place}: found tensors that differ from the index: {_names(held ^ listed)}, allowed: "
                              "exactly those that weight_map lists for this shard")
        files.update(dict.fromkeys(listed, place))
    return files


def _names(names) -> str:
    """Up to eight sorted names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def _expected(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], int | None, bool]]:
    """Tensor name -> (shape in the file, path in params, layer number or None, transposed)."""
    shapes, table = abstract_params(config), {}
    for key in _TOP.keys() & shapes.keys():
        table[_TOP[key]] = (shapes[key].shape, (key,), None, False)
    for number in range(config.num_layers):
        for path, (name, transposed) in _LAYER.items():
            leaf = shapes["layers"]
            for part in path:
                leaf = leaf[part]
            shape = leaf.shape[1:][::-1] if transposed else leaf.shape[1:]
            table[f"model.layers.{number}.{name}.weight"] = (shape, ("layers", *path), number, transposed)
    return table


def load(path: str | os.PathLike, dtype=jnp.float32, *, host: bool = False) -> tuple[DecoderConfig, Params]:
    """(config, params) of a local Hugging Face folder, every array cast to `dtype`.

    Tensors are read one at a time into their stacked place. host=True leaves numpy arrays, for a `jax.device_put`
    with shardings when the model does not fit one device. Raises ConfigError, naming file and tensor, for missing,
    unexpected or misshapen tensors, and for a setting the decoder does not compute (see read_config). A stored
    lm_head.weight of a tied model is accepted only where it equals the embedding.
    """
    path = pathlib.Path(path)
    config = read_config(path)
    files, expected = _tensor_files(path), _expected(config)
    missing = expected.keys() - files.keys()
    spare = {_TOP["head"]} if config.tie_embeddings else set()
    unexpected = {name for name in files.keys() - expected.keys() - spare if not _DERIVED.fullmatch(name)}
    if missing or unexpected:
        parts = [f"{word}: {_names(found)}"
                 for word, found in (("missing", missing), ("unexpected", unexpected)) if found]
        raise ConfigError(f"{path}: found tensors that do not fit config.json ({'; '.join(parts)}), allowed: exactly "
                          f"the {len(expected)} tensors of this {ARCHITECTURE}")
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, jnp.dtype(dtype)), abstract_params(config))

    by_file: dict[pathlib.Path, list[str]] = {}
    for name in expected:
        by_file.setdefault(files[name], []).append(name)
    for place, names in by_file.items():
        with safe_open(place, framework="numpy") as file:
            for name in names:
                shape, where, number, transposed = expected[name]
                tensor = file.get_tensor(name)
                if tensor.shape != shape:
                    raise ConfigError(f"{place}: {name}: found shape {tensor.shape}, allowed: {shape} by config.json")
                if not jnp.issubdtype(tensor.dtype, jnp.floating):
                    raise ConfigError(f"{place}: {name}: found dtype {tensor.dtype}, allowed: a floating type")
                leaf = params
                for part in where:
                    leaf = leaf[part]
                leaf[... if number is None else number] = tensor.T if transposed else tensor
    if spare & files.keys():
        name = _TOP["head"]
        with safe_open(files[name], framework="numpy") as file:
            stored = file.get_tensor(name)
        if not np.array_equal(stored.astype(params["embedding"].dtype), params["embedding"]):
            raise ConfigError(f"{files[name]}: {name}: found values that differ from {_TOP['embedding']}, allowed: "
                              "equal ones, or tie_word_embeddings false in config.json")
    return config, params if host else jax.tree.map(jnp.asarray, params)


def save(path: str | os.PathLike, config: DecoderConfig, params: Params, *, bos_token_id: int | None = None,
         eos_token_id: int | tuple[int, ...] | list[int] | None = None) -> None:
    """Writes config.json, generation_config.json and model.safetensors so that transformers loads the model.

    Arrays keep their dtype, which must be one for the whole tree. The tokenizer's files are not written. Raises
    ConfigError where params do not fit the config or an id lies outside the vocabulary. Needs the parameters once on
    the host.
    """
    expected = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    found = {jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    wanted = {jax.tree_util.keystr(key): leaf.shape for key, leaf in expected}
    if found.keys() != wanted.keys():
        raise ConfigError(f"save(params=): found parameters that do not fit the config: "
                          f"{_names(found.keys() ^ wanted.keys())}, allowed: the leaves of abstract_params(config)")
    for key, leaf in found.items():
        if leaf.shape != wanted[key]:
            raise ConfigError(f"save(params=): {key}: found shape {leaf.shape}, allowed: {wanted[key]}")
    dtypes = sorted({str(leaf.dtype) for leaf in found.values()})
    if len(dtypes) != 1 or dtypes[0] not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"save(params=): found dtypes {dtypes}, allowed: one of float32, bfloat16, float16 for all")
    eos = list(eos_token_id) if isinstance(eos_token_id, (tuple, list)) else eos_token_id
    for name, ids in (("bos_token_id", [bos_token_id]), ("eos_token_id", eos if isinstance(eos, list) else [eos])):
        for number in ids:
            if number is not None and not 0 <= number < config.vocab_size:
                raise ConfigError(f"save({name}=): found {number}, allowed: 0 .. {config.vocab_size - 1}")

    host, tensors = jax.tree.map(np.asarray, jax.device_get(params)), {}
    for name, (_, where, number, transposed) in _expected(config).items():
        leaf = host
        for part in where:
            leaf = leaf[part]
        leaf = leaf if number is None else leaf[number]
        tensors[name] = np.ascontiguousarray(leaf.T if transposed else leaf)
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    dump = lambda name, content: (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    dump("config.json", {
        "architectures": [ARCHITECTURE], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": bos_token_id, "eos_token_id": eos,
        "torch_dtype": dtypes[0], "dtype": dtypes[0]})
    dump("generation_config.json", {"bos_token_id": bos_token_id, "eos_token_id": eos})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _tokenizer_ids(path: pathlib.Path, settings: dict[str, Any]) -> Callable[[str], int | None]:
    """A look-up from a role ("pad", ...) to its token id, through tokenizer_config.json and tokenizer.json."""
    table: dict[str, int] = {}
    if (path / "tokenizer.json").is_file():
        tokenizer = _read_json(path / "tokenizer.json")
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
    raw = [(path / name, _read_json(path / name)) for name in ("generation_config.json", "config.json")
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
                lookup = _tokenizer_ids(path, _read_json(path / "tokenizer_config.json"))
            found = lookup(role)
        ids = found if isinstance(found, list) and role == "eos" else [] if found is None else [found]
        for number in ids:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ConfigError(f"{place}: {key}: found {found!r}, allowed: an integer >= 0"
                                  + (" or a list of them" if role == "eos" else ""))
        result[role] = tuple(dict.fromkeys(ids)) if role == "eos" else (ids[0] if ids else None)
    return result
