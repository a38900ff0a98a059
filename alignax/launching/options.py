"""What each backend can be told: `--option KEY=VALUE`, with types, defaults and one line of help."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from alignax.types import ConfigError


def _option(help_: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_})


@dataclasses.dataclass(frozen=True)
class Local:
    """Processes on this machine."""

    processes: int = _option("processes of the run", 1)
    gpus: int = _option("GPUs for each process, cut from CUDA_VISIBLE_DEVICES' order; 0: all see all", 0)


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A Slurm cluster, through submitit."""

    nodes: int = _option("machines", 1)
    tasks_per_node: int = _option("processes on each; 0: one for each GPU, or one", 0)
    gpus_per_node: int = _option("GPUs on each machine", 0)
    cpus_per_task: int = _option("cores for each process; 0: the cluster's default", 0)
    mem_gb: int = _option("memory of each machine; 0: the cluster's default", 0)
    minutes: int = _option("time limit; a run that meets it saves and is queued again", 60)
    notice: int = _option("seconds before the time limit at which the run is told to save", 120)
    partition: str = _option("partition", "")
    account: str = _option("account", "")
    qos: str = _option("quality of service", "")
    constraint: str = _option("features that machines need", "")
    parallel: int = _option("members of a sweep at a time", 64)
    restarts: int = _option("how often a run that was told to stop is queued again", 100)
    retries: int = _option("restarts up to which a run that lost a process is queued again", 3)
    setup: str = _option("a shell line before the command, such as `module load cuda`", "")

    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)


@dataclasses.dataclass(frozen=True)
class Xpk:
    """A TPU cluster on GKE, through xpk."""

    cluster: str = _option("the cluster's name")
    tpu_type: str = _option("slice, such as v5litepod-16")
    image: str = _option("container image that holds alignax and the config file")
    slices: int = _option("number of slices", 1)
    project: str = _option("Google Cloud project; empty: gcloud's", "")
    zone: str = _option("zone; empty: gcloud's", "")
    storage: str = _option("storages of `xpk storage` that hold the run's folder, separated by commas", "")
    restarts: int = _option("restarts of the whole workload", 100)
    grace: int = _option("seconds between the notice and the end of a pod", 120)
    python: str = _option("Python of the image", "python3")


@dataclasses.dataclass(frozen=True)
class JobSet:
    """TPUs on GKE by a JobSet manifest, through kubectl."""

    accelerator: str = _option("value of cloud.google.com/gke-tpu-accelerator, such as tpu-v5-lite-podslice")
    topology: str = _option("value of cloud.google.com/gke-tpu-topology, such as 4x4")
    image: str = _option("container image that holds alignax and the config file")
    chips: int = _option("TPU chips of one machine", 4)
    slices: int = _option("number of slices", 1)
    volume: str = _option("CLAIM:FOLDER, a persistent volume claim (ReadWriteMany) and where it is mounted", "")
    folder: str = _option("working directory in the image; empty: the image's", "")
    queue: str = _option("Kueue's local queue", "")
    restarts: int = _option("restarts of the whole set", 100)
    grace: int = _option("seconds between the notice and the end of a pod", 120)
    python: str = _option("Python of the image", "python3")


@dataclasses.dataclass(frozen=True)
class Gcloud:
    """A TPU virtual machine or pod slice that exists, through gcloud."""

    tpu: str = _option("the TPU's name")
    folder: str = _option("folder of the checkout on every host", "alignax")
    zone: str = _option("zone; empty: gcloud's", "")
    project: str = _option("project; empty: gcloud's", "")
    python: str = _option("Python on the hosts", "python3")


@dataclasses.dataclass(frozen=True)
class SkyPilot:
    """Any cloud that SkyPilot knows, as a managed job."""

    accelerators: str = _option("such as tpu-v5litepod-16 or H100:8")
    nodes: int = _option("machines (of GPUs), or 1 for a TPU slice", 1)
    infra: str = _option("cloud, region or cluster, such as gcp/us-central2 or k8s; empty: SkyPilot chooses", "")
    spot: bool = _option("preemptible machines", False)
    volume: str = _option("VOLUME:FOLDER, a SkyPilot volume that holds the run's folder", "")
    setup: str = _option("shell line that installs alignax", "pip install .")
    restarts: int = _option("restarts after a process was lost", 100)
    python: str = _option("Python on the machines", "python3")


BACKENDS = {"local": Local, "slurm": Slurm, "xpk": Xpk, "jobset": JobSet, "gcloud": Gcloud, "skypilot": SkyPilot}


def parse(backend: str, texts: Sequence[str]) -> Any:
    """The options of a backend from `KEY=VALUE` texts.

    Raises ConfigError for an unknown backend or key (with the legal ones), a value of another type, a key that is given
    twice and one that is missing.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"--backend={backend}; allowed: {', '.join(BACKENDS)}")
    kind = BACKENDS[backend]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f" (did you mean {near[0]!r}?)" if near and key not in fields else ""
            raise ConfigError(f"--option={text}: expected KEY=VALUE{hint}; keys of {backend}: {', '.join(fields)}")
        if key in found:
            raise ConfigError(f"--option={text}: {key} is given twice")
        found[key] = _value(key, value, fields[key].type)
    lacking = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in found]
    if lacking:
        raise ConfigError(f"--backend={backend} needs " + ", ".join(f"--option {n}=... ({fields[n].metadata['help']})"
                                                                    for n in lacking))
    return kind(**found)


def _value(key: str, text: str, kind: str) -> Any:
    """`text` as the type whose name the field bears (annotations are texts here)."""
    if kind == "str":
        return text
    if kind == "bool":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--option={key}={text}; allowed: true, false")
        return text.lower() in ("true", "1")
    least = 1 if key in ("processes", "nodes", "minutes", "slices", "chips", "parallel") else 0
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--option={key}={text}; allowed: a whole number, at least {least}")
    return int(text)


def table() -> str:
    """The options of every backend, for --help."""
    lines = []
    for name, kind in BACKENDS.items():
        lines.append(f"{name}: {kind.__doc__.splitlines()[0]}")
        for field in dataclasses.fields(kind):
            default = "required" if field.default is dataclasses.MISSING else f"default {field.default!r}"
            lines.append(f"  {field.name}: {field.metadata['help']} ({default})")
    return "\n".join(lines)
