"""Launching: options, names and folders that are refused, the manifests against golden files and the tools' schemas."""

from __future__ import annotations

import io
import os
import shlex
import signal
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from alignax import cli, context
from alignax.launching import job, local, options, pods, slurm, slurm_task
from alignax.types import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "launch"
JOB = job.Job("dpo-b01", "experiments/dpo.py:loss=ipo", "/runs/dpo b01", ("seed=3", "train.loss.tau=0.2"))
POD = ("image=europe-docker.pkg.dev/lab/images/alignax:1",)
CASES = {
    "xpk.sh": ("xpk", (*POD, "cluster=pool", "tpu_type=v5litepod-16", "slices=2", "project=lab", "zone=us-east5-b",
                       "storage=filestore")),
    "jobset.yaml": ("jobset", (*POD, "accelerator=tpu-v5-lite-podslice", "topology=4x4", "slices=2",
                               "volume=filestore:/runs", "queue=research", "folder=/alignax")),
    "gcloud.sh": ("gcloud", ("tpu=v4-32", "zone=us-central2-b", "folder=my alignax")),
    "sky_tpu.yaml": ("skypilot", ("accelerators=tpu-v5litepod-16", "infra=gcp/us-east5", "spot=true")),
    "sky_gpu.yaml": ("skypilot", ("accelerators=H100:8", "nodes=4", "volume=filestore:/runs")),
}


def made(name: str) -> pods.Submission:
    """The submission of one golden case."""
    backend, texts = CASES[name]
    return pods.submission(JOB, options.parse(backend, texts))


@pytest.mark.parametrize("name", CASES)
def test_what_is_submitted_is_as_it_was(name):
    path = GOLDEN / name
    if os.environ.get("ALIGNAX_WRITE_GOLDEN"):
        path.write_text(made(name).text())
    assert made(name).text() == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_every_backend_passes_the_same_config_overrides_and_folder(name):
    """However often a command is quoted on its way, a shell reads the same words in the end."""
    wanted = JOB.arguments(False)
    one = made(name)
    if "sh" in name:
        last = [word for word in one.command if word.startswith("--command=")][0].removeprefix("--command=")
        words = shlex.split(last)
    else:
        task = yaml.safe_load(one.manifest)
        words = (shlex.split(task["run"].splitlines()[-1]) if "run" in task else
                 task["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"])
    at = words.index("train")
    assert [w for w in words[at:] if w != "--distributed"] == wanted
    assert words[at - 2:at] == ["-m", "alignax.cli"] and ("--distributed" in words) == (name != "sky_gpu.yaml")


def test_a_jobset_has_a_pod_for_each_machine_and_is_not_restarted_for_what_repeats_itself():
    spec = yaml.safe_load(made("jobset.yaml").manifest)["spec"]
    slices = spec["replicatedJobs"][0]
    assert slices["replicas"] == 2 and slices["template"]["spec"]["parallelism"] == 4
    rule = slices["template"]["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["values"] == [cli.EXIT_ERROR, 3]
    assert context.EXIT_RESUMABLE in pods.RESTARTED and not set(pods.RESTARTED) & set(pods.REPEATED)


@pytest.mark.parametrize("backend, texts, words", [
    ("slrum", (), "allowed: local, slurm, xpk, jobset, gcloud, skypilot"),
    ("slurm", ("nodse=2",), "did you mean 'nodes'"),
    ("slurm", ("nodes=0",), "nodes=0; allowed: a whole number, at least 1"),
    ("slurm", ("nodes=two",), "at least 1"),
    ("slurm", ("nodes=2", "nodes=3"), "nodes is given twice"),
    ("slurm", ("nodes",), "expected KEY=VALUE"),
    ("skypilot", ("accelerators=L4:1", "spot=maybe"), "spot=maybe; allowed: true, false"),
    ("xpk", ("cluster=c",), "needs --option tpu_type=... .*, --option image=..."),
])
def test_options_that_are_refused(backend, texts, words):
    with pytest.raises(ConfigError, match=words):
        options.parse(backend, texts)


@pytest.mark.parametrize("backend, texts, words", [
    ("jobset", (*POD, "accelerator=a", "topology=4by4"), "expected sizes"),
    ("jobset", (*POD, "accelerator=a", "topology=2x3"), "6 chips, which machines of --option=chips=4"),
    ("jobset", (*POD, "accelerator=a", "topology=2x2", "volume=claim"), "expected CLAIM:FOLDER"),
    ("skypilot", ("accelerators=tpu-v4-16", "nodes=2"), "one node of SkyPilot"),
])
def test_jobs_that_no_tool_could_run_are_refused(backend, texts, words):
    with pytest.raises(ConfigError, match=words):
        pods.submission(JOB, options.parse(backend, texts))


def test_names_and_folders():
    assert job.name_of("runs/DPO_beta 0.1/") == "dpo-beta-0-1" and job.name_of("runs/3") == "run-3"
    assert job.NAME.fullmatch(job.name_of("x" * 39 + "-" + "y"))
    for name in ("", "Dpo", "3x", "a" * 41, "a-"):
        with pytest.raises(ConfigError, match="--name="):
            job.Job(name, "c.py", "w")
    for folder in ("gs://bucket/run", "s3://b/r"):
        with pytest.raises(ConfigError, match="an object store has neither"):
            job.Job("a", "c.py", folder)


def test_a_tool_that_is_absent_is_named_with_its_installation(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="kubectl is not installed: see https"):
        pods.submit(made("jobset.yaml"))


def test_a_tool_gets_the_manifest_and_its_code_is_passed_on(monkeypatch, tmp_path):
    tool = tmp_path / "kubectl"
    tool.write_text(f'#!/bin/sh\ncp "$3" {tmp_path}/got.yaml; echo "$1 $2" > {tmp_path}/words; exit 7\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert pods.submit(made("jobset.yaml")) == 7
    assert (tmp_path / "got.yaml").read_text() == made("jobset.yaml").manifest
    assert (tmp_path / "words").read_text() == "create -f\n"


# Local


def test_local_processes_get_a_number_each_and_their_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = local.environments(options.Local(processes=2, gpus=2), 1234)
    assert [g["ALIGNAX_PROCESS_ID"] for g in given] == ["0", "1"]
    assert {g["ALIGNAX_COORDINATOR"] for g in given} == {"127.0.0.1:1234"}
    assert [g["CUDA_VISIBLE_DEVICES"] for g in given] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [g["CUDA_VISIBLE_DEVICES"] for g in local.environments(options.Local(2, 1), 1)] == ["5", "7"]
    assert not any(key.startswith("ALIGNAX") for key in local.environments(options.Local(), 1)[0])


@pytest.mark.parametrize("codes, code", [
    ((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((69, 2), 2), ((69, 69), 69), ((69, 75), 69), ((-9, 69), 137),
])
def test_one_exit_code_for_a_run(codes, code):
    assert local.exit_code(codes) == code


# Signals


def test_a_notice_that_comes_twice_is_one_and_a_later_one_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with context.Stop().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and not ended
        stop._since -= stop.AGAIN + 1
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


# Slurm without a Slurm


@pytest.fixture
def queue(monkeypatch):
    """queue(state, restarts): a controller that says so; returns what it was asked to queue again."""
    asked: list[list[str]] = []

    def build(state: str, restarts: int = 0, rank: int = 0) -> list[list[str]]:
        def run(command, **_):
            if command[0] == "scontrol":
                asked.append(command)
                told.append(int(signal.SIGTERM))
            return type("Done", (), {"stdout": f"{state}\n", "returncode": 0})

        for key, value in (("SLURM_JOB_ID", "12"), ("SLURM_RESTART_COUNT", restarts), ("SLURM_PROCID", rank)):
            monkeypatch.setenv(key, str(value))
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        monkeypatch.setattr(slurm_task.subprocess, "run", run)
        return asked

    told: list[int] = []
    build.told = told
    return build


@pytest.mark.parametrize("code, state, restarts, again", [
    (75, "RUNNING", 0, True), (75, "RUNNING", 4, True), (75, "RUNNING", 5, False), (75, "COMPLETING", 0, False),
    (69, "RUNNING", 0, True), (137, "RUNNING", 1, True), (69, "RUNNING", 2, False), (2, "RUNNING", 0, False),
    (3, "RUNNING", 0, False), (0, "RUNNING", 0, False), (71, "RUNNING", 0, False),
])
def test_which_ends_are_queued_again(queue, code, state, restarts, again):
    asked = queue(state, restarts)
    task = slurm_task.Task([], "", restarts=5, retries=2)
    assert task._again(code, queue.told) == again
    assert asked == [["scontrol", "requeue", "12"]] * again


def test_an_element_of_an_array_is_queued_again_under_its_own_number(queue, monkeypatch):
    asked = queue("RUNNING")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_task.Task([], "", 5, 2)._again(75, queue.told) and asked == [["scontrol", "requeue", "40_3"]]


def test_the_batch_script(tmp_path):
    pytest.importorskip("submitit")
    texts = ("nodes=2", "gpus_per_node=4", "partition=gpu", "minutes=90", "notice=60", "setup=module load cuda")
    made = slurm.script("dpo", str(tmp_path / "run"), options.parse("slurm", texts))
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "#SBATCH --requeue",
                 "#SBATCH --signal=USR2@60", "#SBATCH --time=90", "#SBATCH --partition=gpu", "module load cuda"):
        assert line in made.splitlines()
    assert "--kill-on-bad-exit=0" in made and "--array" not in made
    assert "#SBATCH --array=0-7%2" in slurm.script("dpo", "run", options.parse("slurm", ("parallel=2",)), 8)


# The command


CONFIG = """
from alignax import configs

def get_config(arg=""):
    config = configs.base(tokenizer="builtin:stories", stages=("sft",))
    config.sft = configs.train_stage("sft", steps=2, batch_size=2, data=dict(max_records=8, eval_records=2))
    return config
"""


@pytest.fixture
def launch(tmp_path):
    """launch(*words) -> (exit code, what stands on the console) of `alignax launch` in a fresh folder."""
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*words: str) -> str:
        parser = cli._parser()
        overrides = [w.removeprefix("--config.") for w in words if w.startswith("--config.")]
        argv = ["launch", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "Run_1")]
        arguments = parser.parse_args(argv + [w for w in words if not w.startswith("--config.")])
        arguments.overrides, out = overrides, io.StringIO()
        assert arguments.execute(arguments, Console(file=out, width=120)) == 0
        assert not (tmp_path / "Run_1").exists()
        return out.getvalue()

    return run


def test_dry_runs_print_and_write_nothing(launch):
    xpk = ("--backend=xpk", "--option=cluster=c", "--option=tpu_type=v4-8", "--option=image=i", "--dry-run")
    shown = launch(*xpk, "--config.seed=7")
    assert shown.startswith("xpk workload create --workload=run-1 ") and "--config.seed=7" in shown
    lines = launch("--backend=local", "--processes=2", "--dry-run").splitlines()
    assert [line.split()[2] for line in lines] == ["ALIGNAX_PROCESS_ID=0", "ALIGNAX_PROCESS_ID=1"]
    shown = launch(*xpk, "--members", "--sweep=seed=1,2").splitlines()
    assert [line.split()[3] for line in shown] == ["--workload=run-1-0", "--workload=run-1-1"]
    assert "members/1" in shown[1] and "--config.seed=2" in shown[1]


@pytest.mark.parametrize("words, said", [
    (("--backend=local", "--config.sede=1"), "unknown key"),
    (("--backend=local", "--members"), "allowed: slurm, xpk, jobset, skypilot"),
    (("--backend=local", "--sweep=seed=1,2"), "need --members"),
    (("--backend=gcloud", "--option=tpu=t", "--processes=2"), "allowed with: local, slurm"),
    (("--backend=slurm", "--option=nodes=2", "--processes=3"), "multiples of 2"),
])
def test_commands_that_are_refused(launch, words, said):
    with pytest.raises(ConfigError, match=said):
        launch(*words, "--dry-run")


# The tools' own schemas (second tier)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sky_tpu.yaml", "sky_gpu.yaml"])
def test_skypilot_takes_the_task(name):
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load(made(name).manifest)
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


@pytest.mark.slow
def test_kubernetes_takes_the_jobset():
    """The models are generated from JobSet's and Kubernetes' own schemas; what they do not know they drop."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = yaml.safe_load(made("jobset.yaml").manifest)
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


@pytest.mark.slow
def test_xpk_takes_the_command():
    main = pytest.importorskip("xpk.parser.core")
    import argparse

    parser = argparse.ArgumentParser()
    main.set_parser(parser)
    found = parser.parse_args(list(made("xpk.sh").command[1:]))
    assert found.workload == JOB.name and found.command == JOB.shell(True) and found.max_restarts == "100"
