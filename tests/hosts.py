"""Several processes of one run on this machine, with bounded waits and free ports: support of tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 280.0
CONFIG = """
from alignax import configs

def get_config(arg=""):
    config = configs.base(tokenizer="builtin:stories", stages=("sft",))
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=128)
    config.sft = configs.train_stage("sft", steps={steps}, batch_size=8, log_every=1, checkpoint_every=10,
                                     eval_every=1000, data=dict(max_records=64, eval_records=8))
    return config
"""


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(command: Callable[[int], Sequence[str]], count: int, folder: Path, *, heartbeat: float = 8.0,
          devices: int = 1) -> list[subprocess.Popen]:
    """`python *command(index)` for each of `count` processes of one run; each writes to folder/log<index>."""
    shared = os.environ | {"PYTHONPATH": str(ROOT), "ALIGNAX_HEARTBEAT_SECONDS": str(heartbeat),
                           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if count > 1:
        shared |= {"ALIGNAX_COORDINATOR": f"127.0.0.1:{free_port()}", "ALIGNAX_PROCESS_COUNT": str(count)}
    out = []
    for index in range(count):
        with (folder / f"log{index}").open("wb") as log:
            out.append(subprocess.Popen([sys.executable, *command(index)], cwd=folder, stdout=log,
                                        stderr=subprocess.STDOUT, env=shared | {"ALIGNAX_PROCESS_ID": str(index)}))
    return out


def train(config: Path, workdir: Path, count: int, **rest) -> list[subprocess.Popen]:
    """`alignax train` on `count` processes."""
    return start(lambda index: ["-m", "alignax.cli", "train", "--config", str(config), "--workdir", str(workdir)],
                 count, workdir.parent, **rest)


def finish(processes: Sequence[subprocess.Popen], folder: Path, limit: float = LIMIT) -> list[tuple[int, str]]:
    """(exit code, output) of each process. One that does not end within `limit` seconds is killed: an error."""
    deadline = time.monotonic() + limit
    late = []
    for index, process in enumerate(processes):
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            late.append(index)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
    texts = [(folder / f"log{index}").read_text() for index in range(len(processes))]
    assert not late, f"processes {late} did not end within {limit} seconds:\n" + "\n".join(t[-2000:] for t in texts)
    return [(p.returncode, t) for p, t in zip(processes, texts, strict=True)]


def when(ready: Callable[[], bool], processes: Sequence[subprocess.Popen], folder: Path, limit: float = LIMIT) -> None:
    """Waits for ready(); fails where a process ends before, or after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not ready():
        ended = [i for i, p in enumerate(processes) if p.poll() is not None]
        if ended or time.monotonic() > deadline:
            texts = [t for _, t in finish(processes, folder, 1 if not ended else 60)]
            raise AssertionError(f"the moment never came; ended: {ended}\n" + "\n".join(t[-3000:] for t in texts))
        time.sleep(0.005)
