"""What is launched: one `alignax train`, the same config file, overrides and folder on every backend."""

from __future__ import annotations

import dataclasses
import re
import shlex

from alignax.types import ConfigError

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: config (`FILE[:ARG]`) with overrides (`key=value`) in the folder workdir.

    name: what the cluster calls it; letters, digits and dashes as Kubernetes takes them, at most 40.
    Raises ConfigError for another name, and for a folder that check_workdir refuses.
    """

    name: str
    config: str
    workdir: str
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"--name={self.name}; allowed: up to 40 small letters, digits and dashes, a letter first")
        check_workdir(self.workdir)

    def arguments(self, distributed: bool) -> list[str]:
        """The words after `alignax`. distributed: JAX asks the cluster for the other processes."""
        words = ["train", "--config", self.config, "--workdir", self.workdir]
        return words + [f"--config.{text}" for text in self.overrides] + ["--distributed"] * distributed

    def command(self, distributed: bool, python: str = "python3") -> list[str]:
        """The whole command, for a machine where `python` finds alignax."""
        return [python, "-m", "alignax.cli", *self.arguments(distributed)]

    def shell(self, distributed: bool, python: str = "python3") -> str:
        """The command as one line of a POSIX shell."""
        return shlex.join(self.command(distributed, python))


def name_of(text: str) -> str:
    """A legal name that resembles `text`: `runs/DPO_beta` gives `dpo-beta`."""
    kept = re.sub(r"[^a-z0-9]+", "-", text.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return (kept if kept[:1].isalpha() else f"run-{kept}")[:40].strip("-")


def check_workdir(workdir: str) -> None:
    """Raises ConfigError for an address such as gs://bucket/run: runs need a file system.

    The lock and the signs of life of a run rest on hard links and on renames that replace, which object stores lack.
    """
    if _SCHEME.match(workdir):
        raise ConfigError(f"--workdir={workdir}: a run needs a folder of a file system that all its processes see "
                          "(local disk, NFS, Filestore, Lustre), with hard links and renames; an object store has "
                          "neither. Copy the finished folder there")
