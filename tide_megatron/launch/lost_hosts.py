"""Hosts that ranks were lost on: a job that goes back into the queue leaves one out that failed twice.

A launcher that ends because a rank was killed or stood still, or because a node was lost, writes the host
down in a file of the job's (`TIDE_LOST_HOSTS`, set by its script), with the number of the start: the
launchers of several nodes tell the same loss. The script counts starts, and asks SLURM to leave a host out.
"""

from __future__ import annotations

import contextlib
import os
import platform

VARIABLE = "TIDE_LOST_HOSTS"


def own_host() -> str:
    """Return this host's name, SLURM's where there is one."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def note_lost_host(host: str) -> None:
    """Write down that the job that this process is a part of lost a rank on a host; empty: unknown."""
    path = os.environ.get(VARIABLE)
    if not path or not host:
        return
    line = f"{os.environ.get('SLURM_RESTART_COUNT') or 0} {host}\n"
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
