"""Who holds something: a process by host and pid, how to tell it from others, and whether it still runs."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
from pathlib import Path

from tide_megatron.base.device import SlurmJob

_ENDED = "ZXx"
"""States of a process that only waits to be collected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease."""

    token: str
    """Of this one lease; never used again."""
    host: str = ""
    pid: int = 0
    machine: str = ""
    """Equal where a pid means the same process: of one boot, and of one container."""
    process_start: str = ""
    """Tells the process from a later one of the same pid."""
    job: str = ""
    """SLURM's; empty outside of it."""
    restarts: int = 0
    """How often SLURM has restarted the job."""

    @staticmethod
    def here(job: SlurmJob | None) -> Holder:
        """Return this process as a holder."""
        pid = os.getpid()
        return Holder(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=pid,
            machine=_machine(),
            process_start=_process(pid)[1],
            job=job.name if job else "",
            restarts=job.restarts if job else 0,
        )

    def described(self) -> str:
        """Name host, pid and job."""
        if not self.host:
            return "a process that did not say its name"
        return f"host {self.host}, pid {self.pid}" + (f", SLURM job {self.job}" if self.job else "")

    def is_gone(self, other: Holder) -> bool:
        """Say whether this holder's process has certainly ended, as `other` on the same machine sees it."""
        if not self.machine or self.machine != other.machine or not self.process_start:
            return False
        state, start = _process(self.pid)
        if state:
            return start != self.process_start or state in _ENDED
        return not _exists(self.pid)

    def is_here(self, other: Holder) -> bool:
        """Say whether this holder's process runs on the machine of `other`."""
        return bool(self.machine) and self.machine == other.machine and not self.is_gone(other)

    def is_succeeded_by(self, other: Holder) -> bool:
        """Say whether `other` is the same SLURM job after a later restart."""
        return bool(self.job) and self.job == other.job and other.restarts > self.restarts


def _machine() -> str:
    """Return what is equal where pids mean the same processes; empty where nobody can tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """Return state and start of a process, both empty where it is not seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _exists(pid: int) -> bool:
    """Say whether there is a process, also one that /proc hides from us."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
