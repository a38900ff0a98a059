"""From the name of a model to a local folder: a folder is taken as it is, else the Hugging Face cache, else the Hub."""

from __future__ import annotations

import os
import pathlib
import re

from alignax.models.files import INDEX, SINGLE, read_json
from alignax.types import ConfigError

# "name" or "organisation/name", then optionally "@" and a branch, tag or commit.
_REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[\w./-]+))?")
_TEXT = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
# Not every *.safetensors: some repositories hold the same weights twice, in another layout.
_WEIGHTS = (SINGLE, "model-*-of-*.safetensors")


def _lacks(folder: pathlib.Path, weights: bool) -> str:
    """The name of a file that a usable copy needs and `folder` lacks, or an empty string."""
    if not weights:
        return "" if (folder / "tokenizer.json").is_file() else "tokenizer.json"
    if not (folder / "config.json").is_file():
        return "config.json"
    if (folder / SINGLE).is_file():
        return ""
    if not (folder / INDEX).is_file():
        return SINGLE
    shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    return next((shard for shard in shards if not (folder / shard).is_file()), "")


def resolve(name_or_path: str | os.PathLike, *, revision: str | None = None, weights: bool = True) -> pathlib.Path:
    """The local folder of a model: `name_or_path` itself where it is a folder, else a repository of the Hub.

    A repository is `name` or `organisation/name`; `@REVISION` behind it (or `revision`) pins a branch, tag or commit.
    The cache of huggingface_hub comes first, so a model that was fetched once needs no network and does not change
    under a run; a name without a revision is then what was fetched, not what the Hub holds today. What the cache lacks
    is downloaded: JSON, tokenizer and template files, and safetensors weights (`weights` False: only a tokenizer is
    needed). Raises ConfigError for a path that is neither, an unknown name or revision, a repository without the files
    needed, and where there is no network.
    """
    text, path = os.fspath(name_or_path), pathlib.Path(name_or_path).expanduser()
    if text and path.is_dir():
        return path
    match = _REPOSITORY.fullmatch(text)
    if match is None or path.exists():
        raise ConfigError(f"{text!r}: {'a file' if path.is_file() else 'no such folder'}, allowed: a folder, or a "
                          "model of the Hugging Face Hub as organisation/name or organisation/name@revision")
    if match["revision"] and revision not in (None, match["revision"]):
        raise ConfigError(f"{text!r}: found the revision {revision!r} besides, allowed: one revision")
    import huggingface_hub

    wanted = dict(repo_id=match["name"], revision=match["revision"] or revision,
                  allow_patterns=[*_TEXT, *_WEIGHTS] if weights else list(_TEXT))
    lacking = ""
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
        lacking = _lacks(folder, weights)
        if not lacking:
            return folder
    except (OSError, ValueError):
        pass  # not in the cache, or in part: the second call says what is wrong where it cannot help either
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(**wanted))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0].strip()
        held = f"; the cache lacks {lacking}" if lacking else ""
        raise ConfigError(f"{text!r}: no such folder, and not to be had from the Hugging Face Hub{held} "
                          f"({type(error).__name__}: {reason}). Allowed: a local folder, a model in the cache "
                          "(HF_HOME), or a model that the Hub gives to you (network, HF_TOKEN, revision)") from error
    lacking = _lacks(folder, weights)
    if lacking:
        raise ConfigError(f"{text!r}: found no {lacking} in {folder}, allowed: a repository with "
                          + ("config.json and safetensors weights" if weights else "a tokenizer.json"))
    return folder
