"""TPU pods and clouds: the command, or the manifest and the command that submits it, of the tools that people use.

Exit codes of `alignax train` decide about restarts: 75 (told to stop, saved) and 69 (another process stopped) are
worth one, 2 (bad input) and 3 (a step that is not finite) would repeat themselves. Processes find each other through
JAX, which asks the TPU's metadata or, on machines of SkyPilot without TPUs, through the addresses that SkyPilot gives.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from alignax import distributed, supervise
from alignax.launching.job import Job
from alignax.launching.options import Gcloud, JobSet, SkyPilot, Xpk
from alignax.types import ConfigError

REPEATED = (2, 3)  # what the same command would give again
RESTARTED = (supervise.EXIT_PEER, supervise.RESUMABLE)
FILE = "{manifest}"  # in a command: the path of the written manifest
INSTALL = {
    "xpk": "pip install 'xpk>=1.16' (and Google Cloud's SDK)",
    "kubectl": "see https://kubernetes.io/docs/tasks/tools/",
    "gcloud": "see https://cloud.google.com/sdk/docs/install",
    "sky": "pip install 'skypilot[gcp]', or the extra of another cloud",
}
_PORT = 8476


@dataclasses.dataclass(frozen=True)
class Submission:
    """command: what submits the job, with FILE where the manifest's path goes. manifest: YAML, or ""."""

    command: tuple[str, ...]
    manifest: str = ""

    def text(self) -> str:
        """What --dry-run prints: the manifest, and the command as a line of a shell."""
        line = shlex.join(self.command).replace(shlex.quote(FILE), "FILE")
        return f"{self.manifest}---\n{line}\n" if self.manifest else f"{line}\n"


def _yaml(value: Any) -> str:
    import yaml  # flax depends on it

    class Blocks(yaml.SafeDumper):
        """Texts of several lines as blocks, which people can read."""

    def text(dumper: yaml.SafeDumper, value: str):
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Blocks.add_representer(str, text)
    return yaml.dump(value, Dumper=Blocks, sort_keys=False, width=110)


def xpk(job: Job, options: Xpk) -> Submission:
    """`xpk workload create`: xpk restarts on codes 42 and 127 to 255 by itself, on 69 and 75 because it is told."""
    words = ["xpk", "workload", "create", f"--workload={job.name}", f"--cluster={options.cluster}",
             f"--tpu-type={options.tpu_type}", f"--num-slices={options.slices}", f"--docker-image={options.image}"]
    words += [f"--{key}={value}" for key, value in (("project", options.project), ("zone", options.zone)) if value]
    words += [f"--storage={name}" for name in filter(None, options.storage.split(","))]
    words += [f"--max-restarts={options.restarts}",
              f"--restart-on-exit-codes={','.join(map(str, RESTARTED))}",
              f"--termination-grace-period-seconds={options.grace}",
              f"--command={job.shell(True, options.python)}"]
    return Submission(tuple(words))


def jobset(job: Job, options: JobSet) -> Submission:
    """A JobSet: one Job for each slice, a pod for each machine; a failed pod restarts all, codes 2 and 3 end all.

    Raises ConfigError for a topology that its machines' chips do not divide, and a volume that is not CLAIM:FOLDER.
    """
    sizes = options.topology.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--option=topology={options.topology}; expected sizes as in 4x4 or 2x2x4")
    chips = math.prod(map(int, sizes))
    if chips % options.chips:
        raise ConfigError(f"--option=topology={options.topology} has {chips} chips, which machines of "
                          f"--option=chips={options.chips} do not divide")
    machines = chips // options.chips
    container: dict[str, Any] = {
        "name": "alignax", "image": options.image, "command": job.command(True, options.python),
        "resources": {"limits": {"google.com/tpu": options.chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": options.grace,
        "hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": options.accelerator,
                         "cloud.google.com/gke-tpu-topology": options.topology},
        "containers": [container],
    }
    if options.folder:
        container["workingDir"] = options.folder
    if options.volume:
        claim, mount = _pair("volume", options.volume, "CLAIM:FOLDER")
        container["volumeMounts"] = [{"name": "runs", "mountPath": mount}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
    final = {"action": "FailJob", "onExitCodes": {"containerName": "alignax", "operator": "In",
                                                  "values": list(REPEATED)}}
    metadata: dict[str, Any] = {"name": job.name}
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": options.restarts, "rules": [
                {"name": "repeated", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]},
            "replicatedJobs": [{
                "name": "slice", "replicas": options.slices,
                "template": {"spec": {"parallelism": machines, "completions": machines, "backoffLimit": 0,
                                      "podFailurePolicy": {"rules": [final]}, "template": {"spec": pod}}},
            }],
        },
    }
    return Submission(("kubectl", "create", "-f", FILE), _yaml(manifest))


def gcloud(job: Job, options: Gcloud) -> Submission:
    """`gcloud compute tpus tpu-vm ssh --worker=all`: the command in the checkout of every host. Nothing restarts it."""
    line = f"cd {shlex.quote(options.folder)} && {job.shell(True, options.python)}"
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", options.tpu]
    words += [f"--{key}={value}" for key, value in (("project", options.project), ("zone", options.zone)) if value]
    return Submission((*words, "--worker=all", f"--command={line}"))


def skypilot(job: Job, options: SkyPilot) -> Submission:
    """A task of SkyPilot, launched as a managed job: it is recovered after a preemption and after codes 69 and 75.

    Raises ConfigError for several nodes of TPUs, which SkyPilot counts as one, and a volume not VOLUME:FOLDER.
    """
    tpu = options.accelerators.startswith("tpu-")
    if tpu and options.nodes > 1:
        raise ConfigError(f"--option=nodes={options.nodes} with {options.accelerators}: a TPU slice is one node of "
                          "SkyPilot; allowed: 1")
    lines = []
    if options.nodes > 1:
        values = (f'"$(echo "$SKYPILOT_NODE_IPS" | head -n1):{_PORT}"', '"$SKYPILOT_NUM_NODES"',
                  '"$SKYPILOT_NODE_RANK"')
        lines = [f"export {key}={value}" for key, value in zip(distributed.ENV.values(), values, strict=True)]
    lines.append(job.shell(tpu, options.python))
    resources: dict[str, Any] = {"accelerators": options.accelerators}
    if options.infra:
        resources["infra"] = options.infra
    resources |= {"use_spot": options.spot, "job_recovery": {
        "strategy": "FAILOVER", "max_restarts_on_errors": 0, "recover_on_exit_codes": list(RESTARTED)}}
    task: dict[str, Any] = {"name": job.name, "workdir": ".", "num_nodes": options.nodes, "resources": resources}
    if options.volume:
        volume, mount = _pair("volume", options.volume, "VOLUME:FOLDER")
        task["volumes"] = {mount: volume}
    task |= {"setup": options.setup, "run": "\n".join(lines) + "\n"}
    return Submission(("sky", "jobs", "launch", "--yes", FILE), _yaml(task))


def _pair(key: str, text: str, form: str) -> tuple[str, str]:
    left, _, right = text.partition(":")
    if not left or not right.startswith("/"):
        raise ConfigError(f"--option={key}={text}; expected {form}, the folder as an absolute path")
    return left, right


MAKERS: dict[type, Callable[[Job, Any], Submission]] = {Xpk: xpk, JobSet: jobset, Gcloud: gcloud, SkyPilot: skypilot}


def submission(job: Job, options: Any) -> Submission:
    """What submits `job` to the backend that the options are of."""
    return MAKERS[type(options)](job, options)


def submit(made: Submission) -> int:
    """Runs the tool and returns its exit code. Raises ConfigError, with what to install, where the tool is absent."""
    tool = made.command[0]
    if shutil.which(tool) is None:
        raise ConfigError(f"{tool} is not installed: {INSTALL[tool]}; --dry-run shows what would be submitted")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "job.yaml"
        path.write_text(made.manifest, encoding="utf-8")
        return subprocess.run([word.replace(FILE, str(path)) for word in made.command], check=False).returncode
