"""`alignax convert`: a stage of a run or a model, as a Hugging Face folder or as a native one."""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import tempfile
import time
from typing import Any, NamedTuple

EXAMPLES = """examples:
  alignax convert --run runs/dpo --to-hf exported --dtype bfloat16
  alignax convert --run runs/dpo --stage sft --to-hf exported --max-shard-size 2GB
  alignax convert --run runs/lora --to-peft adapter
  alignax convert --model organisation/name@revision --to-native models/name
  alignax convert --model models/name --to-hf back

A Hugging Face folder is config.json, safetensors weights, tokenizer, chat template and generation settings: what
transformers and --config.model.path load. A native folder holds the same files with the weights in the layout of
the decoder (params/, an orbax checkpoint), which starts faster; --config.model.path and --model take it too.
A stage that trained adapters is written with them merged (--to-hf, --to-native), or as the adapters alone in the
layout of peft (--to-peft).

memory: no accelerator is used. A Hugging Face folder is read and written tensor by tensor: the host holds the model
once, in the chosen type, and one or two tensors. orbax takes up to twice the model to read a run or a native folder,
and up to three times the model to write a native one.
"""
DEFAULT_SHARD = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "convert", help="export a run's stage or a model as a Hugging Face folder, or import one",
        description="Writes a stage of a run (--run) or a model (--model) as a Hugging Face folder (--to-hf) or as a "
                    "native folder (--to-native).", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="the folder of a run of `alignax train`")
    source.add_argument("--model", metavar="FOLDER_OR_NAME",
                        help="a Hugging Face or native folder, or a model of the Hub (name, or name@revision)")
    parser.add_argument("--stage", default="", help="with --run: the train stage (default: the last finished)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to-hf", metavar="OUT", help="write a Hugging Face folder")
    target.add_argument("--to-native", metavar="OUT", help="write a native folder")
    target.add_argument("--to-peft", metavar="OUT", help="with --run: write a stage's adapters for peft")
    parser.add_argument("--dtype", choices=("stored", "float32", "bfloat16", "float16"), default="stored",
                        help="type of the weights (default: as stored)")
    parser.add_argument("--max-shard-size", metavar="SIZE", default=DEFAULT_SHARD,
                        help="with --to-hf: larger weights are cut into shards (default 5GB; B to TB, KiB to TiB)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in a folder that is not empty")
    parser.set_defaults(execute=run)


class _Source(NamedTuple):
    """What is converted: a name for messages, the shape, the parameters, and the folder of tokenizer and settings."""

    name: str
    config: Any
    params: Any
    folder: pathlib.Path


def parse_size(text: str) -> float:
    """Bytes of a size such as 2GB, 500MB, 1.5GiB or 4096; ConfigError where it is none."""
    from alignax.types import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--max-shard-size={text}: allowed: a number > 0 with one of "
                          "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, such as 2GB")
    return float(match[1]) * _UNITS[match[2].upper()]


def run(arguments, console) -> int:
    """Converts and reports what was written; returns the exit code."""
    import jax

    from alignax import metrics, models
    from alignax.types import ConfigError

    limit = parse_size(arguments.max_shard_size)
    out = pathlib.Path(arguments.to_hf or arguments.to_native or arguments.to_peft)
    if arguments.model and arguments.stage:
        raise ConfigError(f"--stage={arguments.stage}: goes with --run, not with --model")
    if arguments.to_peft:
        return _adapters(arguments, console)
    if arguments.to_native and arguments.max_shard_size != DEFAULT_SHARD:
        raise ConfigError(f"--max-shard-size={arguments.max_shard_size}: goes with --to-hf, not with --to-native")
    models.check_target(out, overwrite=arguments.overwrite)  # before a long read, not after it
    began = time.monotonic()
    # Nothing is computed: an accelerator would only have to be large enough.
    with (jax.default_device(_host()), metrics.progress(console) as bar,
          tempfile.TemporaryDirectory() as scratch):
        if arguments.run:
            source = _stage_source(arguments, pathlib.Path(scratch))
        else:
            source = _model_source(arguments, _reporting(bar, "reading"))
        leaves = jax.tree.leaves(source.params)
        size = sum(leaf.nbytes for leaf in leaves)
        more = "one or two tensors" if arguments.to_hf else f"up to {_size(2 * size)}"
        console.print(f"{source.name}: {source.config.family}, {sum(leaf.size for leaf in leaves):,} parameters; "
                      f"{_size(size)} in memory, and {more} more while writing", markup=False, highlight=False,
                      soft_wrap=True)
        if arguments.to_hf:
            models.save(out, source.config, source.params, dtype=arguments.dtype, max_shard_bytes=limit,
                        source=source.folder, overwrite=arguments.overwrite, reporting=_reporting(bar, "writing"))
        else:
            _save_native(out, source, arguments.dtype, arguments.overwrite)
    written = sorted(out.iterdir())
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    console.print(f"{out}: {', '.join(p.name for p in written)}; {_size(total)} in {time.monotonic() - began:.1f} s",
                  markup=False, highlight=False, soft_wrap=True)
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _host():
    """The CPU as a JAX device, present beside any accelerator."""
    import jax

    return jax.local_devices(backend="cpu")[0]


def _reporting(bar, words: str):
    """A callback for models.load and models.save that moves a line of the progress display; counts megabytes."""
    task = bar.add_task(words, total=None, numbers="MB")
    return lambda done, total: bar.update(task, completed=done // 10**6, total=max(total // 10**6, 1))


def _model_source(arguments, reporting) -> _Source:
    """A Hugging Face or native folder, or a model of the Hub, with its parameters on the host."""
    from alignax import models
    from alignax.types import ConfigError

    try:
        folder = models.resolve(arguments.model)
    except ConfigError as error:
        raise ConfigError(f"--model={error}") from error
    if (folder / models.NATIVE).is_dir():
        config = models.read_config(folder)
        params = _restore(folder / models.NATIVE, config, arguments.dtype)
    else:
        config, params = models.load(folder, arguments.dtype, host=True, reporting=reporting)
    return _Source(arguments.model, config, params, folder)


def _restore(folder: pathlib.Path, config, dtype: str):
    """The parameters of an orbax folder on the host, in `dtype`."""
    import jax
    import jax.numpy as jnp

    from alignax import checkpoint, models

    stored, like = checkpoint.stored_tree(folder), {"model": models.abstract_params(config)}
    place = jax.sharding.SingleDeviceSharding(_host())
    if jax.tree.structure(stored) == jax.tree.structure(like):  # another structure is refused by load_tree
        chosen = lambda held: held.dtype if dtype == "stored" else jnp.dtype(dtype)
        like = jax.tree.map(lambda leaf, held: jax.ShapeDtypeStruct(leaf.shape, chosen(held), sharding=place), like,
                            stored)
    return checkpoint.load_tree(folder, like)["model"]


def _adapters(arguments, console) -> int:
    """--to-peft: the adapters of a stage, which are small, without reading the base."""
    from alignax import checkpoint, context
    from alignax.models import peft_files
    from alignax.types import ConfigError

    out = pathlib.Path(arguments.to_peft)
    if not arguments.run:
        raise ConfigError(f"--to-peft={out}: goes with --run; a model has no adapters of its own")
    if out.exists() and not arguments.overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--to-peft={out}: found something there already, allowed: a new or an empty folder")
    folder, stored, stage = _finished(arguments)
    section = stored["model"]
    settings = context.stage_adapters(folder, stage)
    if settings is None:
        raise ConfigError(f"--stage={stage}: it trained all parameters and has no adapters; use --to-hf")
    config = context.shape_of(section, context.load_tokenizer(stored["tokenizer"], section["path"]).vocab_size)
    tree = checkpoint.load_tree(folder / "stages" / stage / "adapters", context.adapters_like(config, settings[0]))
    base = section["path"] if settings[1] == "model" else f"{folder} (stage {settings[1]}, exported by alignax convert)"
    peft_files.save_peft(out, config, settings[0], tree, base_model_name=base)
    console.print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}, adapters of {folder} (stage {stage})",
                  markup=False, highlight=False, soft_wrap=True)
    return 0


def _finished(arguments) -> tuple[pathlib.Path, dict, str]:
    """The folder of a run, its config, and the finished train stage that is meant."""
    from alignax import configs, context
    from alignax.types import ConfigError

    folder = pathlib.Path(arguments.run)
    stored = configs.of_run(folder, "--run=")
    finished = context.finished_stages(folder, stored["stages"])
    stage = arguments.stage or (finished[-1] if finished else "")
    if stage not in finished:
        raise ConfigError(f"--stage={stage or '(none)'}: no parameters; finished train stages: "
                          f"{', '.join(finished) or 'none'}")
    return folder, stored, stage


def _stage_source(arguments, scratch: pathlib.Path) -> _Source:
    """A finished train stage of a run; `scratch` takes the tokenizer and settings where no folder holds them."""
    import jax

    from alignax import context, data

    folder, stored, stage = _finished(arguments)
    section, name = stored["model"] | {"attention": "auto"}, stored["tokenizer"]
    tokenizer = context.load_tokenizer(name, section["path"])
    config = context.shape_of(section, tokenizer.vocab_size)
    data.check_vocab(tokenizer, config.vocab_size)
    if context.stage_adapters(folder, stage) is None:
        params = _restore(folder / "stages" / stage / "params", config, arguments.dtype)
    else:
        _, initial = context.load_model(section, vocab_size=tokenizer.vocab_size, seed=stored["seed"])
        params = context.stage_params(folder, stage, initial)["model"]
        if arguments.dtype != "stored":
            params = jax.tree.map(lambda leaf: leaf.astype(arguments.dtype), params)
    if section["path"] and not name:
        settings = context.model_folder(section["path"])
    else:
        settings = _settings(scratch, name, section["path"], tokenizer, stored["text"]["add_bos"])
    return _Source(f"{folder} (stage {stage})", config, params, settings)


def _settings(scratch: pathlib.Path, name: str, model_path: str, tokenizer, add_bos: bool) -> pathlib.Path:
    """`scratch`, filled with the tokenizer that the run names and with the ids of its model or, without a model folder,
    of its tokenizer."""
    from alignax import checkpoint, context, data, models

    if name in ("", "builtin:stories"):
        _write_builtin(scratch, tokenizer, add_bos)
    elif (place := context.tokenizer_place(name, model_path)).is_file():
        shutil.copyfile(place, scratch / "tokenizer.json")
    else:
        models.copy_companions(place, scratch)
    if not model_path:
        policy = data.text_policy(tokenizer)
        checkpoint.write_json(scratch / "generation_config.json", {
            "bos_token_id": policy.bos_id, "eos_token_id": policy.eos_id, "pad_token_id": policy.pad_id})
        return scratch
    for file in ("config.json", "generation_config.json"):
        if (context.model_folder(model_path) / file).is_file():
            shutil.copyfile(context.model_folder(model_path) / file, scratch / file)
    return scratch


def _write_builtin(scratch: pathlib.Path, tokenizer, add_bos: bool) -> None:
    """The built-in tokenizer as transformers reads it; like the run, it opens a text with BOS where `add_bos`."""
    import tokenizers

    from alignax import checkpoint
    from alignax.data.tokens import BOS, EOS, PAD, UNK

    tokenizer.save(scratch / "tokenizer.json")
    if add_bos:
        core = tokenizers.Tokenizer.from_file(str(scratch / "tokenizer.json"))
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_id(BOS))])
        core.save(str(scratch / "tokenizer.json"))
    checkpoint.write_json(scratch / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "unk_token": UNK, "clean_up_tokenization_spaces": False})


def _save_native(out: pathlib.Path, source: _Source, dtype: str, overwrite: bool) -> None:
    """A folder like a Hugging Face one, with the parameters as an orbax tree in place of safetensors files."""
    from alignax import checkpoint, models

    width = models.saved_dtype(source.params, dtype)
    with models.staged(out, overwrite=overwrite) as part:
        models.describe(part, source.config, str(width), source=source.folder)
        checkpoint.save_tree(part / models.NATIVE, {"model": source.params})
