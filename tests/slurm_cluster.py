"""A Slurm controller, a node and the authentication service, started in a temporary folder: support of tests.

Needs Debian's `slurm-wlm` and `munge` and the rights of root, as a container has them; `available` says what lacks.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmdParameters=config_overrides
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
ReturnToService=2
MinJobAge=300
KillWait=2
MailProg=/bin/true
FirstJobId={first}
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def available() -> str:
    """"" where a cluster can be started here, else why not."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs the rights of root"


class Cluster:
    """A running cluster of one node; `environment` makes Slurm's commands find it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """The output of one of Slurm's commands, which has to succeed."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """JobState of a job, and how often it was started again, as `RUNNING 0`."""
        shown = self.ask("scontrol", "show", "job", job)
        return " ".join(re.findall(r"(?:JobState|Restarts)=(\S+)", shown)[:2])

    def when(self, ready: Callable[[], bool], limit: float, told: Callable[[], str] = str) -> None:
        """Waits for ready(); fails after `limit` seconds with what the cluster and `told` say."""
        deadline = time.monotonic() + limit
        while not ready():
            assert time.monotonic() < deadline, f"the moment never came\n{self.logs()}\n{told()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in self.folder.glob("*.log"))


@contextlib.contextmanager
def started() -> Iterator[Cluster]:
    """A cluster during the block. Raises RuntimeError with the daemons' logs where it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    folder.chmod(0o755)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge/key").write_bytes(os.urandom(128))
    (folder / "munge/key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, controller=hosts.free_port(),
                                                     node=hosts.free_port(), first=random.randrange(1000, 50000)))
    cluster, daemons = Cluster(folder), []

    def daemon(*command: str) -> None:
        with (folder / f"{Path(command[0]).name}.out.log").open("wb") as out:
            daemons.append(subprocess.Popen(command, env=os.environ | cluster.environment, stdout=out,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))

    try:
        daemon("munged", "--foreground", "--force", f"--key-file={folder}/munge/key",
               f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge.log",
               f"--seed-file={folder}/munge/seed")
        cluster.when(lambda: (folder / "munge.socket").exists(), 20)
        daemon("slurmctld", "-D", "-f", f"{folder}/slurm.conf", "-c")
        daemon("slurmd", "-D", "-f", f"{folder}/slurm.conf", "-N", host)

        def idle() -> bool:
            done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=os.environ | cluster.environment,
                                  capture_output=True, text=True, timeout=60)
            return done.stdout.strip() == "idle"

        cluster.when(idle, 40)
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            cluster.ask("scancel", "--user=root")
            cluster.when(lambda: not cluster.ask("squeue", "--noheader"), 20)
        for process in reversed(daemons):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)
