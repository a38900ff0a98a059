"""Faults and what becomes of them: damaged checkpoints, full disks, two runs in one folder, memory, transfers."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from alignax import checkpoint, configs, context, data, memory, metrics, presence, supervise, train
from alignax.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def config_of(**over):
    """One supervised stage of a decoder of width 16 on eight-token stories."""
    config = configs.base(tokenizer="builtin:stories", stages=("sft",))
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=128)
    settings = dict(steps=8, batch_size=8, log_every=3, checkpoint_every=2, eval_every=100,
                    data=dict(max_records=32, eval_records=8))
    config.sft = configs.train_stage("sft", **settings | over)
    return config


def run(workdir: Path, **over) -> tuple[dict, str]:
    """(result, what was printed) of such a run."""
    out = io.StringIO()
    result = train.run(config_of(**over), workdir, console=Console(file=out, width=160))
    return result["stages"]["sft"], out.getvalue()


def rows(workdir: Path) -> list[dict]:
    """The training rows without timings."""
    return [{k: v for k, v in r.items() if not k.endswith("_per_second")}
            for r in metrics.read_metrics(workdir, split="train")]


class StopIn(context.Stop):
    """A flag that goes up in the n-th step of this process."""

    step = 0

    def __init__(self):
        self.seen = 0

    @property
    def requested(self):
        self.seen += 1
        return self.seen >= self.step


def stopped(workdir: Path, monkeypatch, step: int, **over) -> None:
    """Such a run, stopped in its n-th step."""
    with monkeypatch.context() as patch:
        patch.setattr(context, "Stop", type("Stop", (StopIn,), {"step": step}))
        with pytest.raises(context.Preempted):
            run(workdir, **over)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, result) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    return workdir, run(workdir)[0]


# Checkpoints


@pytest.fixture
def tree():
    return {"a": jnp.arange(4000.0), "b": {"c": jnp.ones((3, 5))}}


def filled(folder: Path, tree, steps=(2, 4, 6)) -> None:
    """A folder of checkpoints; the arrays of step n are those of `tree` plus n."""
    saved = checkpoint.Checkpoints(folder)
    for step in steps:
        saved.save(step, jax.tree.map(lambda a, n=step: a + n, tree), {"position": step})
    saved.close()


def biggest(folder: Path) -> Path:
    """The largest file of a checkpoint: the one with the arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil, words", [(flip, "other contents"), (truncate, "bytes instead of"),
                                          (remove, "is missing")])
def test_a_damaged_checkpoint_is_put_aside_and_the_previous_used(tmp_path, tree, spoil, words):
    filled(tmp_path / "c", tree)
    assert sorted(int(p.stem) for p in (tmp_path / "c.seals").glob("*.json")) == [4, 6]
    spoil(biggest(tmp_path / "c" / "6"))
    saved = checkpoint.Checkpoints(tmp_path / "c")
    assert saved.latest() == 4
    assert len(saved.notes) == 1 and "step 6 is damaged" in saved.notes[0] and words in saved.notes[0]
    state, plan = saved.restore(4, tree)
    assert plan["position"] == 4 and np.array_equal(state["a"], tree["a"] + 4)
    saved.save(6, tree, {"position": 6})  # the step can be written again
    saved.close()
    assert checkpoint.Checkpoints(tmp_path / "c").latest() == 6
    assert (tmp_path / "c.damaged" / "6").is_dir()


def test_an_unsealed_checkpoint_does_not_count(tmp_path, tree):
    filled(tmp_path / "c", tree)
    (tmp_path / "c.seals" / "6.json").unlink()
    saved = checkpoint.Checkpoints(tmp_path / "c")
    assert saved.latest() == 4 and "interrupted before it was sealed" in saved.notes[0]
    saved.close()


def test_only_damaged_checkpoints_leave_nothing_to_resume(tmp_path, tree):
    filled(tmp_path / "c", tree)
    for step in ("4", "6"):
        flip(biggest(tmp_path / "c" / step))
    saved = checkpoint.Checkpoints(tmp_path / "c")
    assert saved.latest() is None and len(saved.notes) == 2
    saved.close()


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(whole, tmp_path, monkeypatch):
    stopped(tmp_path / "w", monkeypatch, 7)
    flip(biggest(tmp_path / "w/stages/sft/checkpoints/7"))
    result, printed = run(tmp_path / "w")
    assert "step 7 is damaged" in printed and "resuming sft at step 6 of 8" in printed
    assert result["fingerprint"] == whole[1]["fingerprint"] and rows(tmp_path / "w") == rows(whole[0])


# Resuming


@pytest.mark.parametrize("step", [4, 5])
def test_a_window_of_the_log_is_averaged_over_the_resume(whole, tmp_path, monkeypatch, step):
    """log_every is 3: the stop falls inside the window of steps 4 to 6, whose row must hold all three."""
    stopped(tmp_path / "w", monkeypatch, step)
    result, printed = run(tmp_path / "w")
    assert f"resuming sft at step {step}" in printed
    assert result["fingerprint"] == whole[1]["fingerprint"]
    assert [r["step"] for r in rows(tmp_path / "w")] == [3, 6, 8]
    assert rows(tmp_path / "w") == rows(whole[0])


def test_window_means_sums_and_state():
    window = metrics.Window()
    window.add({"loss": 1.0, "kl": 4.0})
    window.add({"loss": 2.0})
    again = metrics.Window(json.loads(json.dumps(window.state())))
    again.add({"loss": 6.0})
    assert again.take() == {"loss": 3.0, "kl": 4.0} and again.take() == {}


# The disk


def test_disk_errors_name_what_and_what_to_do():
    with pytest.raises(checkpoint.DiskError, match=r"x\.json could not be written .*No space left.*free space there"):
        with checkpoint.disk("x.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(checkpoint.DiskError, match="File too large"):
        with checkpoint.disk("x.json"):
            raise ValueError("UNKNOWN: Error writing [OS error 27: EFBIG File too large]")
    with pytest.raises(ValueError, match="shapes"):
        with checkpoint.disk("x.json"):
            raise ValueError("shapes differ")


def test_a_failed_save_is_told_by_the_next_call(tmp_path, tree, monkeypatch):
    """The error of the thread that writes reaches the loop, with the last good step; the folder stays usable."""
    filled(tmp_path / "c", tree, steps=(2,))
    saved = checkpoint.Checkpoints(tmp_path / "c")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "checksums", full)
        saved.save(4, tree, {"position": 4})
        with pytest.raises(checkpoint.DiskError, match=r"last good checkpoint: step 2; free space"):
            saved.wait()
    saved.close()
    assert checkpoint.Checkpoints(tmp_path / "c").latest() == 2


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from alignax import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def process(folder: Path, *before: str) -> subprocess.Popen:
    """`alignax train` of this file's config as a process."""
    (folder / "config.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                                      "from faults_test import config_of\n\ndef get_config():\n"
                                      "    return config_of()\n")
    command = [sys.executable, *before, "train", "--config", str(folder / "config.py"), "--workdir", str(folder / "w")]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_a_disk_without_room_ends_the_run_with_a_message_and_the_rerun_resumes(whole, tmp_path):
    """A limit on the size of files stands for the full disk: the arrays of a checkpoint do not fit."""
    (tmp_path / "limited.py").write_text(LIMITED)
    limit = biggest(next(iter((whole[0] / "stages/sft/checkpoints").glob("[0-9]*")))).stat().st_size // 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    one = process(tmp_path, "limited.py", str(limit))
    out = one.communicate(timeout=280)[0]
    assert one.returncode == checkpoint.EXIT_DISK, out
    # In one line of ours; orbax's own threads may complain before and after it.
    assert any("could not be written (File too large)" in line and "run the same command again" in line
               for line in out.splitlines()), out
    two = process(tmp_path, "-m", "alignax.cli")
    out = two.communicate(timeout=280)[0]
    assert two.returncode == 0, out
    result = json.loads((tmp_path / "w/result.json").read_text())["stages"]["sft"]
    assert result["fingerprint"] == whole[1]["fingerprint"]


# Two runs in one folder


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with presence.locked(tmp_path) as note:
        assert note == ""
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*remove .*run\.lock"):
            with presence.locked(tmp_path):
                pass
        assert (tmp_path / presence.LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_the_loop_holds_the_lock_and_lets_go(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    with presence.locked(tmp_path / "w"):
        with pytest.raises(ConfigError, match="in use by process"):
            run(tmp_path / "w")
    assert not list((tmp_path / "w").iterdir())


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen(["sleep", "0.2"])
    me = presence.whoami() | {"pid": dead.pid, "born": presence._stat(dead.pid)[1]}
    assert presence.gone(me) is False
    (tmp_path / presence.LOCK).write_text(json.dumps(me))
    time.sleep(0.7)  # it has ended, but nobody asked for its exit code: a zombie is dead too
    with presence.locked(tmp_path) as note:
        assert f"process {dead.pid}" in note and "taken over" in note
    dead.wait()
    reborn = presence.whoami() | {"born": 1}  # the number is used again by another process
    (tmp_path / presence.LOCK).write_text(json.dumps(reborn))
    with presence.locked(tmp_path) as note:
        assert "taken over" in note


@pytest.mark.parametrize("silent, taken", [(10, False), (100, True)])
def test_the_lock_of_another_machine_is_stale_after_silence(tmp_path, silent, taken):
    path = tmp_path / presence.LOCK
    path.write_text(json.dumps(presence.whoami() | {"host": "elsewhere"}))
    then = time.time() - silent
    os.utime(path, (then, then))
    if taken:
        with presence.locked(tmp_path, stale_after=60) as note:
            assert "elsewhere" in note
    else:
        with pytest.raises(ConfigError, match="on elsewhere"):
            with presence.locked(tmp_path, stale_after=60):
                pass


# Processes that stop, without processes


def test_peers_are_judged_by_signs_end_and_blame(tmp_path):
    here = presence.whoami()

    def beat(index, **over):
        presence.replace_json(tmp_path / f"{index}.json", here | {"index": index, "count": 4, "token": f"t{index}",
                                                                  "beat": 1, "where": "in sft", "message": ""} | over)

    beat(3, beat=77)  # left by an earlier session: it never changes
    peers = presence.Peers(tmp_path, "t0")
    for index in range(3):
        beat(index)
    own, others = peers.look()
    assert own["index"] == 0 and [b["index"] for b in others] == [1, 2]
    assert supervise._stopped(others) is None
    presence.replace_json(tmp_path / "1.end", {"token": "t1", "code": 0, "message": "", "blames": False})
    assert supervise._stopped(peers.look()[1]) is None
    presence.replace_json(tmp_path / "1.end", {"token": "t1", "code": 69, "message": "process 2", "blames": True})
    follower = supervise._stopped(peers.look()[1])
    assert follower["index"] == 1
    said = []
    assert supervise._judge(-signal.SIGKILL, peers, follower, said.append) == (-9, "") and not said
    assert supervise._judge(-signal.SIGABRT, peers, follower, said.append)[0] == supervise.EXIT_PEER and said
    beat(2, pid=2**22 + 1)  # no such process
    assert supervise._stopped(peers.look()[1])["index"] == 2  # the cause, not who blamed it
    beat(2, host="elsewhere")
    presence.replace_json(tmp_path / "1.end", {"token": "old", "code": 5, "message": "", "blames": False})
    assert supervise._stopped(peers.look()[1]) is None


# Memory


def test_out_of_memory_names_the_big_parts_and_what_helps():
    raw = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17.5GiB. [bfc]")
    parts, advice = {"batch": 12, "optimiser": 8_000_000_000}, {"a.batch_size": "8"}
    with pytest.raises(memory.OutOfMemory) as caught:
        with memory.explained(lambda: ("sft: step 3", parts, advice)):
            raise raw
    text = str(caught.value)
    assert text.startswith("sft: step 3: out of memory; the request that failed: 17.5GiB")
    assert text.index("optimiser 8 GB") < text.index("batch 12 B") and "a.batch_size=8" in text
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with memory.explained(lambda: 1 / 0):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_the_loop_explains_memory_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from alignax import step

    make = step.make_update

    def greedy(*rest, **more):
        update = make(*rest, **more)

        def inner(state, *others):
            def grow(number):
                if number == 4:
                    raise MemoryError("RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes")
                return np.int32(0)

            wanted = jax.pure_callback(grow, jax.ShapeDtypeStruct((), jnp.int32), state.step)
            return update(state._replace(step=state.step + wanted), *others)

        return inner

    monkeypatch.setattr(step, "make_update", greedy)
    with pytest.raises(memory.OutOfMemory) as caught:
        run(tmp_path / "w")
    text = str(caught.value)
    for word in ("sft: step", "parameters", "optimiser", "logits", "config.sft.accumulation", "config.sft.batch_size",
                 "config.model.remat"):
        assert word in text, text
    assert (tmp_path / "w/stages/sft/checkpoints/2").is_dir()


# Transfers


def test_the_steps_of_the_loop_move_nothing_implicitly(tmp_path, monkeypatch):
    """From the second step to the last, whatever is moved to or from the devices is moved by name."""
    batch_indices, steps = data.Plan.batch_indices, []

    def guarded(self, number):
        steps.append(number)
        guard = "disallow" if 1 <= number < 7 and len(steps) > 8 else "allow"
        jax.config.update("jax_transfer_guard", guard)
        return batch_indices(self, number)

    monkeypatch.setattr(data.Plan, "batch_indices", guarded)
    try:
        run(tmp_path / "w", checkpoint_every=100)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert steps[-8:] == list(range(8)), "the plan was not asked as the test assumes"


def test_the_guard_of_the_test_can_fail():
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="[Dd]isallowed"):
        jax.jit(lambda a: a + 1)(np.arange(3))


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_preemption_notice_saves_and_names_the_step(whole, tmp_path, number):
    one = process(tmp_path, "-m", "alignax.cli")
    limit = time.monotonic() + 240
    while not (tmp_path / "w/stages/sft/checkpoints").is_dir() and time.monotonic() < limit:
        time.sleep(0.002)
    one.send_signal(number)
    out = one.communicate(timeout=240)[0]
    assert one.returncode == context.EXIT_RESUMABLE and "run the same command again" in out, out
    assert not (tmp_path / "w" / presence.LOCK).exists()
    result, _ = run(tmp_path / "w")
    assert result["fingerprint"] == whole[1]["fingerprint"] and rows(tmp_path / "w") == rows(whole[0])
