"""A real Slurm on this machine: a run of two processes that is told to stop and then killed, and a sweep as an array.

Skipped, with the reason, where no controller and node can be started (slurm_cluster.available).
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import hosts
import pytest
import slurm_cluster

from alignax import cli, supervise
from alignax.launching import slurm

pytestmark = pytest.mark.slow

LIMIT = 150


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("submitit")
    if lack := slurm_cluster.available():
        pytest.skip(lack)
    with pytest.MonkeyPatch.context() as patch, slurm_cluster.started() as one:
        for key, value in one.environment.items():
            patch.setenv(key, value)
        patch.setenv("PYTHONPATH", str(hosts.ROOT))
        patch.setenv("ALIGNAX_HEARTBEAT_SECONDS", "8")
        yield one


def steps(workdir: Path) -> list[int]:
    """The training steps that were logged."""
    return [row["step"] for row in rows(workdir) if row["split"] == "train"]


def rows(workdir: Path) -> list[dict]:
    """The run's metrics without what a clock measured."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines if line.endswith("}")]


def fingerprint(workdir: Path) -> str:
    """The digest of the parameters that a run left."""
    return json.loads((workdir / "result.json").read_text())["stages"]["sft"]["fingerprint"]


def test_a_run_that_is_told_to_stop_and_one_that_is_killed_end_as_if_undisturbed(cluster, tmp_path, capfd):
    (tmp_path / "config.py").write_text(hosts.CONFIG.format(steps=70))

    def launch(name: str, expected: int = 0) -> tuple[Path, str]:
        workdir = tmp_path / name
        code = cli.main(["launch", "--backend=slurm", "--config", str(tmp_path / "config.py"), "--workdir",
                         str(workdir), "--processes=2", "--option", "minutes=10"])
        assert code == expected
        return workdir, slurm.known_jobs(str(workdir))["run"]

    def told() -> str:
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(tmp_path.glob("*.slurm/*.out")))

    quiet, first = launch("quiet")
    workdir, job = launch("disturbed")
    assert launch("disturbed", expected=2)[1] == job
    assert f"job {job} (run) is in Slurm's queue already" in capfd.readouterr().err

    def past(step: int, restarts: int) -> bool:
        assert not (workdir / "result.json").exists(), "the run ended before it was disturbed"
        return cluster.state(job) == f"RUNNING {restarts}" and steps(workdir)[-1:] > [step]

    cluster.when(lambda: past(5, 0), LIMIT, told)
    cluster.ask("scancel", "--signal=TERM", job)
    before = steps(workdir)[-1]
    cluster.when(lambda: past(before + 12, 1), LIMIT, told)
    beat = json.loads((supervise.folder_of(workdir) / "1.json").read_text())
    os.kill(beat["pid"], signal.SIGKILL)
    cluster.when(lambda: not slurm.alive([first, job]), LIMIT, told)

    assert cluster.state(job) == "COMPLETED 2" and cluster.state(first) == "COMPLETED 0", told()
    assert steps(workdir) == list(range(1, 71))
    assert rows(workdir) == rows(quiet)
    assert fingerprint(workdir) == fingerprint(quiet)
    output = slurm.log_of(str(workdir), job).read_text()
    assert "stopped at step" in output and "process 1 of 2" in output and output.count("resuming sft at step") == 2
    assert slurm.outcome(str(workdir), "run", job) == ("", False)


def test_a_notice_before_the_time_limit_queues_a_run_again_and_a_cancelled_one_stays_cancelled(cluster, tmp_path):
    (tmp_path / "config.py").write_text(hosts.CONFIG.format(steps=40000))
    workdir = tmp_path / "out"
    assert cli.main(["launch", "--backend=slurm", "--config", str(tmp_path / "config.py"), "--workdir",
                     str(workdir)]) == 0
    job = slurm.known_jobs(str(workdir))["run"]
    log = lambda: slurm.log_of(str(workdir), job).read_text(errors="replace")[-3000:]
    cluster.when(lambda: len(steps(workdir)) > 2, LIMIT, log)
    cluster.ask("scancel", "--signal=USR2", job)  # what Slurm sends before the time limit
    cluster.when(lambda: cluster.state(job) == "RUNNING 1" and log().count("resuming sft at step") == 1, LIMIT, log)
    before = len(steps(workdir))
    cluster.when(lambda: len(steps(workdir)) > before, LIMIT, log)
    cluster.ask("scancel", job)
    cluster.when(lambda: not slurm.alive([job]), LIMIT, log)
    assert cluster.state(job) == "CANCELLED 1"
    assert log().count("stopped at step") == 2 and not (workdir / "result.json").exists()


def test_a_sweep_is_an_array(cluster, tmp_path, capfd):
    (tmp_path / "config.py").write_text(hosts.CONFIG.format(steps=4))
    out = tmp_path / "out"
    command = ["sweep", "--backend=slurm", "--config", str(tmp_path / "config.py"), "--workdir", str(out),
               "--sweep", "sft.optim.learning_rate=0.001,0.01", "--option", "minutes=10"]
    assert cli.main(command) == 0, capfd.readouterr()
    jobs = slurm.known_jobs(str(out))
    root = jobs["0"].partition("_")[0]
    assert jobs == {"0": f"{root}_0", "1": f"{root}_1"}
    table = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["state"] for row in table] == ["finished"] * 2
    assert table[0]["metrics"] != table[1]["metrics"]
    assert cli.main(command) == 0
    assert slurm.known_jobs(str(out)) == jobs
    assert "2 of 2 members are finished already" in capfd.readouterr().out


def test_a_member_that_fails_is_told_with_its_reason(cluster, tmp_path, capfd):
    (tmp_path / "config.py").write_text(hosts.CONFIG.format(steps=4).replace("max_records=64", 'path="nowhere.jsonl"'))
    code = cli.main(["sweep", "--backend=slurm", "--config", str(tmp_path / "config.py"), "--workdir",
                     str(tmp_path / "out"), "--sweep", "seed=1"])
    said = capfd.readouterr().out
    assert code == 1 and "nowhere.jsonl" in said and "exit code 2" in said and "trying" not in said
