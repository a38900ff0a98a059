"""What every stage of a run shares: the model's shape, starting parameters, tokenizer, text policy, devices."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from alignax import checkpoint, data, models, sharding
from alignax.step import ModelSpec
from alignax.types import ConfigError

EXIT_RESUMABLE = 75


class Preempted(Exception):
    """A SIGTERM arrived and everything worth keeping is on disk; the same command resumes the run."""


@dataclasses.dataclass
class Context:
    """Shared by the stages of one run. `initial` holds the starting parameters, {"model": ...}."""

    workdir: pathlib.Path
    spec: ModelSpec
    initial: Any
    tokenizer: data.Tokenizer
    tokenizer_source: str  # its folder, where the chat template is looked for too; empty for the built-in one
    text: data.TextPolicy
    mesh: jax.sharding.Mesh
    seed: int
    console: Console
    stop: Stop
    rules: sharding.Rules = sharding.DEFAULT_RULES

    def stage_dir(self, stage: str) -> pathlib.Path:
        """The folder of a stage: parameters, pairs, samples, done.json."""
        return self.workdir / "stages" / stage

    def params_of(self, stage: str) -> Any:
        """The final parameters of a train stage, or the run's starting ones for `model`, on the mesh."""
        return self.place(stage_params(self.workdir, stage, self.initial))

    def place(self, params: Any) -> Any:
        """Puts parameters on the mesh by the sharding rules, as copies that nobody else holds."""
        return jax.tree.map(jnp.copy, jax.device_put(params, sharding.param_shardings(params, self.mesh, self.rules)))


class Stop:
    """Turns SIGTERM into a flag that the loop reads between two steps; a second one ends the process at once.

    One notice may come twice, from a parent that passes it on and from a cluster that signals every process of a job:
    what follows the first within AGAIN seconds counts as the same.
    """

    AGAIN = 2.0

    def __init__(self):
        self.requested, self._since = False, 0.0

    @contextlib.contextmanager
    def listening(self):
        """Handles SIGTERM inside the block and restores the former handler after it."""

        def handler(signum, frame):
            del frame
            if not self.requested:
                self.requested, self._since = True, time.monotonic()
            elif time.monotonic() - self._since > self.AGAIN:
                os._exit(128 + signum)

        try:
            former = signal.signal(signal.SIGTERM, handler)
        except ValueError:  # not the main thread: signals are the caller's business
            yield self
            return
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, former)


def save_stage_params(folder: pathlib.Path, params: Any, *, base: str, adapters: models.AdapterConfig | None) -> None:
    """Writes what a train stage made: the whole model, or its adapters with their settings and the name of the stage
    that they sit on (`base`)."""
    if adapters is None:
        checkpoint.save_tree(folder / "params", {"model": params["model"]})
    else:
        checkpoint.save_tree(folder / "adapters", params["adapters"])
        if jax.process_index() == 0:
            checkpoint.write_json(folder / "adapters.json", dataclasses.asdict(adapters) | {"base": base})
    for name in sorted(params):
        if name.endswith("_head"):
            checkpoint.save_tree(folder / name, params[name])


def stage_params(workdir: pathlib.Path, stage: str, initial: Any) -> Any:
    """{"model": ...} of a train stage of the run in `workdir`, adapters merged into the parameters that they were
    trained on; `initial` for the stage `model`. Raises ConfigError where the stage has no parameters."""
    if stage == "model":
        return {"model": initial["model"]}
    folder = workdir / "stages" / stage
    if (settings := stage_adapters(workdir, stage)) is None:
        return checkpoint.load_tree(folder / "params", {"model": initial["model"]})
    config, base = settings
    start = stage_params(workdir, base, initial)["model"]
    like = jax.eval_shape(lambda: models.init_adapters(start, config, jax.random.key(0)))
    return {"model": models.merge(start, checkpoint.load_tree(folder / "adapters", like), config)}


def stage_adapters(workdir: pathlib.Path, stage: str) -> tuple[models.AdapterConfig, str] | None:
    """The settings of the adapters that a stage trained, and the stage that they sit on; None where it has none."""
    file = workdir / "stages" / stage / "adapters.json"
    if not file.exists():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    base = settings.pop("base")
    return models.AdapterConfig(**settings | {"targets": tuple(settings["targets"])}), base


def adapters_like(config: models.DecoderConfig, adapters: models.AdapterConfig) -> Any:
    """The tree of jax.ShapeDtypeStruct of a stage's stored adapters."""
    return jax.eval_shape(lambda: models.init_adapters(models.abstract_params(config), adapters, jax.random.key(0)))


def finished_stages(workdir: pathlib.Path, stages: Sequence[str]) -> list[str]:
    """Those of `stages` that have final parameters, in their order."""
    return [s for s in stages if any((workdir / "stages" / s / part).exists() for part in ("params", "adapters.json"))]


def model_folder(model_path: str) -> pathlib.Path:
    """The local folder of `config.model.path`: the folder itself, or a model of the Hub (see models.resolve)."""
    try:
        return models.resolve(model_path)
    except ConfigError as error:
        raise ConfigError(f"config.model.path={error}") from error


def load_model(model: dict, *, vocab_size: int, seed: int, mesh: jax.sharding.Mesh | None = None,
               rules: sharding.Rules = sharding.DEFAULT_RULES) -> tuple[ModelSpec, Any]:
    """Decoder and starting parameters from a model section (plain dict), in the section's `dtype`.

    `path` is a Hugging Face folder, the name of one on the Hub, a folder of `alignax convert --to-native`, or empty for
    random parameters. mesh: parameters are read or drawn where `rules` place them, and no device holds all of them;
    None: on the default device. The values do not depend on it. Raises ConfigError for a folder that is missing or a
    model that alignax does not know.
    """
    dtype = model.get("dtype", "float32")

    def placed(config):
        like = {"model": models.abstract_params(config, dtype)}
        return like, None if mesh is None else sharding.param_shardings(like, mesh, rules)["model"]

    if model["path"]:
        path = model_folder(model["path"])
        if (path / models.NATIVE).is_dir():
            config = models.read_config(path)
            like, shardings = placed(config)
            params = checkpoint.load_tree(path / models.NATIVE, like, shardings and {"model": shardings})["model"]
        else:
            shardings = placed(models.read_config(path))[1]
            config, params = models.load(path, dtype, shardings=shardings)
    else:
        config = shape_of(model, vocab_size)
        draw = lambda key: models.init_params(config, key, dtype)
        # Compiled on one device too, so that every mesh has the same bits.
        params = jax.jit(draw, out_shardings=placed(config)[1])(jax.random.key(seed))
    return model_spec(config, model), {"model": params}


def shape_of(model: dict, vocab_size: int) -> models.DecoderConfig:
    """The decoder of a model section, read without its weights: config.json of `path`, or the section's numbers."""
    if model["path"]:
        try:
            return models.read_config(models.resolve(model["path"], weights=False))
        except ConfigError as error:
            raise ConfigError(f"config.model.path={error}") from error
    shape = {k: v for k, v in model.items()
             if k not in ("path", "remat", "head_megabytes", "unroll", "dtype", "attention")}
    shape["vocab_size"] = shape["vocab_size"] or vocab_size
    return models.DecoderConfig(**shape)


def model_spec(config: models.DecoderConfig, model: dict) -> ModelSpec:
    """What a forward pass needs besides parameters, from a model section; the logits' budget is that of one device.

    Raises ConfigError for an attention that cannot run here."""
    attention = models.choose_attention(model.get("attention", "auto"), config, model.get("dtype", "float32"),
                                        jax.default_backend())
    return ModelSpec(config, remat=model["remat"], byte_budget=int(model["head_megabytes"] * 1e6),
                     unroll=model["unroll"], attention=attention)


def load_tokenizer(name: str, model_path: str) -> data.Tokenizer:
    """`builtin:stories`, a tokenizer file or folder, or (empty) the model's folder."""
    if name == "builtin:stories" or (not name and not model_path):
        return data.stories_tokenizer()
    return data.load_tokenizer(tokenizer_place(name, model_path))


def tokenizer_place(name: str, model_path: str) -> pathlib.Path:
    """The tokenizer file or folder that `config.tokenizer` names, on the Hub if need be, or the model's folder."""
    if not name:
        return model_folder(model_path)
    if pathlib.Path(name).is_file():
        return pathlib.Path(name)
    try:
        return models.resolve(name, weights=False)
    except ConfigError as error:
        raise ConfigError(f"config.tokenizer={error}") from error


def template_place(name: str, model_path: str) -> str:
    """Where the chat template of a run lies, beside its tokenizer; empty for the built-in one (see load_tokenizer)."""
    source = name or model_path
    return "" if not source or source.startswith("builtin:") else str(tokenizer_place(name, model_path))


def text_policy(tokenizer: data.Tokenizer, model_path: str, *, add_bos: bool, eos_id: int) -> data.TextPolicy:
    """The one BOS/EOS policy of the run: ids from the model's generation config, else the tokenizer's own.

    eos_id: which end token is appended; -1 takes the first of the generation config's set.
    Raises ConfigError when the chosen end token is not in the set.
    """
    if model_path:
        folder = model_folder(model_path)
        ends = models.read_generation_ids(folder)["eos"]
        if not ends:
            raise ConfigError(f"config.model.path={model_path!r}: no end token in generation_config.json or "
                              "config.json")
        policy = data.load_policy(folder, eos_id=ends[0] if eos_id < 0 else eos_id)
    else:
        policy = data.text_policy(tokenizer)
    return policy if add_bos else dataclasses.replace(policy, bos_id=None)


def fingerprint(tree: Any) -> str:
    """sha256 over paths, shapes, dtypes and bytes of a tree: equal exactly when the parameters are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        digest.update(f"{sharding.path_name(path)}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions and devices, for environment.json."""
    import importlib.metadata
    import platform

    names = ("alignax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions,
            "backend": jax.default_backend(), "devices": [str(d) for d in jax.devices()]}
