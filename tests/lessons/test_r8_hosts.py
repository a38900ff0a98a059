"""R8: hosts agree before any collective; where one fails, all end with a message that names it; the rerun resumes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from alignax import presence, supervise

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hosts  # noqa: E402  (support beside the other tests)

pytestmark = pytest.mark.slow

MINUTE = 60


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.py").write_text(hosts.CONFIG.format(steps=120))
    return tmp_path


def steps(workdir: Path) -> list[int]:
    """The training steps that were logged."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [r["step"] for r in found if r["split"] == "train"]


def worker(workdir: Path, index: int) -> int:
    """The number of the worker process behind a supervisor."""
    return presence.read_json(supervise.folder_of(workdir) / f"{index}.json")["pid"]


def test_a_process_that_stops_is_named_and_the_rerun_resumes(folder):
    """On one run, one after another: killed, its coordinator killed, hung, told to stop by SIGTERM; then finished."""
    workdir = folder / "w"

    def interrupted(strike, *, past: int) -> list[tuple[int, str]]:
        processes = hosts.train(folder / "config.py", workdir, 2)
        hosts.when(lambda: len(steps(workdir)) and steps(workdir)[-1] >= past, processes, folder)
        strike(processes)
        return hosts.finish(processes, folder, MINUTE)

    # Process 1 is killed, supervisor and worker at once.
    ends = interrupted(lambda processes: processes[1].kill(), past=12)
    assert ends[1][0] == -signal.SIGKILL
    assert ends[0][0] == supervise.EXIT_PEER, ends[0][1]
    assert "process 1 of 2" in ends[0][1] and "was killed in sft at step" in ends[0][1]
    assert "run the same command again" in ends[0][1]

    # The worker of process 0, which holds the coordination service, is killed: JAX aborts the other at once.
    before = steps(workdir)[-1]
    ends = interrupted(lambda _: os.kill(worker(workdir, 0), signal.SIGKILL), past=before + 5)
    assert ends[1][0] == supervise.EXIT_PEER, ends[1][1]
    assert "process 0 of 2" in ends[1][1]
    assert "was killed" in ends[1][1] or "was ended by signal 9" in ends[1][1]
    assert "resuming sft at step" in ends[0][1]

    # The worker of process 1 hangs: nothing breaks, it is only silent.
    before = steps(workdir)[-1]
    ends = interrupted(lambda _: os.kill(worker(workdir, 1), signal.SIGSTOP), past=before + 5)
    assert ends[0][0] == supervise.EXIT_PEER, ends[0][1]
    assert "process 1 of 2" in ends[0][1] and "no sign of life" in ends[0][1]

    # One process is told to stop: both save at the same step.
    before = steps(workdir)[-1]
    ends = interrupted(lambda processes: processes[1].send_signal(signal.SIGTERM), past=before + 3)
    assert [code for code, _ in ends] == [75, 75], ends
    told = [text[text.index("stopped at step"):].split()[3] for _, text in ends]
    assert told[0] == told[1] and (workdir / "stages/sft/checkpoints" / told[0]).is_dir()

    ends = hosts.finish(hosts.train(folder / "config.py", workdir, 2), folder)
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"resuming sft at step {told[0]} of 120" in ends[0][1]
    assert steps(workdir) == list(range(1, 121))
    assert not supervise.folder_of(workdir).exists()


def test_hosts_with_other_settings_or_files_end_together(folder):
    """A config that differs, then a file that only one host lacks: nobody hangs, and the message names the process."""
    workdir = folder / "w"
    common = ["-m", "alignax.cli", "train", "--config", str(folder / "config.py"), "--workdir", str(workdir)]
    ends = hosts.finish(hosts.start(lambda i: [*common, f"--config.seed={i}"], 2, folder), folder, 3 * MINUTE)
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("the config: process 1 has" in text for _, text in ends)
    assert not workdir.exists()

    (folder / "half.py").write_text(hosts.CONFIG.format(steps=120).replace("    config =", '''
    import os
    from alignax.types import ConfigError
    if os.environ["ALIGNAX_PROCESS_ID"] == "1":
        raise ConfigError("the data of this host are not mounted")
    config =''', 1))
    ends = hosts.finish(hosts.train(folder / "half.py", workdir, 2), folder, 3 * MINUTE)
    assert ends[1][0] == 2 and "not mounted" in ends[1][1]
    assert ends[0][0] == supervise.EXIT_PEER
    assert "process 1 of 2" in ends[0][1] and "ended with code 2" in ends[0][1] and "not mounted" in ends[0][1]
