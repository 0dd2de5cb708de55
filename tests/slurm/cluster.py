"""A real SLURM of four nodes on this machine: one controller, four `slurmd -N`, for as long as the tests run.

The nodes are called 127.0.0.1 to 127.0.0.4, so that a name out of SLURM's list of nodes leads somewhere
without touching this machine's /etc/hosts: every one of them is this machine. Needs root and Debian's
packages (`make test-slurm` installs them); the daemons are ended by the ids that they wrote, munged stays.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "munged")
SETTINGS = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPort={port}
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=30
MinJobAge=300
InactiveLimit=0
NodeName=127.0.0.[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=2000
PartitionName=low Nodes=127.0.0.[1-4] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=127.0.0.[1-4] PriorityTier=10 PreemptMode=OFF
"""
GUARD = """
while kill -0 "$1" 2>/dev/null && [ -e "$2" ]; do sleep 1; done
[ -e "$2/slurmctld.pid" ] || exit 0
SLURM_CONF="$2/slurm.conf" timeout 10 scancel --signal=KILL --full --user=root; sleep 2
cat "$2"/*.pid 2>/dev/null | xargs -r kill
"""
"""Ends the daemons when the process that wanted them has gone without ending them, as after SIGKILL."""
LEFT_OVER = ("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC")


def why_not() -> str | None:
    """Return why no cluster can be had here; None where one can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"SLURM's {', '.join(missing)} not here: `make test-slurm` installs them on Debian as root"
    if getpass.getuser() != "root":
        return "a SLURM of one's own needs root"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A running SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        host, first = socket.gethostname().partition(".")[0], _free_ports(5)
        # Jobs meet at a port that their number gives: those of two clusters of this machine must differ.
        settings = SETTINGS.format(
            folder=folder,
            host=host,
            port=first,
            first=first + 1,
            last=first + 4,
            first_job=1 + os.getpid() % 10000,
        )
        (folder / "slurm.conf").write_text(settings)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OVER)}
        self.environment = clean | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        _start_munge()
        subprocess.Popen(
            ["bash", "-c", GUARD, "guard", str(os.getpid()), str(folder)], start_new_session=True
        )

    def __enter__(self) -> "Cluster":
        self.run("slurmctld")
        for node in range(1, 5):
            self.run("slurmd", "-N", f"127.0.0.{node}")
        self.within(
            20, lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle"] * 4
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            self.within(15, lambda: not self.run("squeue", "-h"))
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        for path in self.folder.glob("*.pid"):
            path.unlink(missing_ok=True)

    def run(self, *words: str, seconds: float = 60) -> str:
        """Run a program of SLURM's; return what it said."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def within(self, seconds: float, condition, said=lambda: "") -> None:
        """Wait until something is so; `said` tells more about it where it does not come to be."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.run('squeue')}\n{said()}"
            time.sleep(0.1)

    def state(self, job: str) -> str:
        """Return a job's state and, when it has ended, its exit code."""
        facts = dict(
            word.split("=", 1)
            for word in self.run("scontrol", "--oneliner", "show", "job", job).split()
            if "=" in word
        )
        return f"{facts['JobState']} {facts['ExitCode']}"

    def start_now(self, job: str) -> None:
        """Take away the two minutes that SLURM lets a requeued job wait.

        Not in the second of the requeue: nodes would take the new start's credential for the revoked one.
        """
        time.sleep(2.5)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for(self, job: str, seconds: float, log: Path) -> str:
        """Wait until a job has ended, letting it start again whenever it was put back; return its state."""
        end = time.monotonic() + seconds
        while (state := self.state(job)).split()[0] in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
            "PREEMPTED",
        ):
            text = log.read_text() if log.is_file() else ""
            assert time.monotonic() < end, f"{state}\n{text}"
            if state.startswith("PENDING"):
                with contextlib.suppress(AssertionError):
                    self.start_now(job)
            time.sleep(0.2)
        return state


def _free_ports(count: int) -> int:
    """Return the first of some ports in a row that nobody listens at."""
    for first in range(17000, 19000, count):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("", port)))
            return first
    raise AssertionError("no free ports")


def _start_munge() -> None:
    """Start munged unless it runs; it belongs to the machine and stays."""
    running = Path("/run/munge/munged.pid")
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(running.read_text()), 0)
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True, timeout=20)
