"""What squeue says of jobs: when this one will end, so that a run can save before, and how others stand."""

from __future__ import annotations

import os
import subprocess
import time

from tide_megatron.base.nodes import seconds_of

ASK_SECONDS = 20.0
"""So long may squeue take to answer."""


def ask(number: str, format: str) -> str | None:
    """Return what squeue says of a job; None: it is not here, has forgotten the job, or does not answer."""
    words = ["squeue", "--noheader", f"--jobs={number}", f"--format={format}"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=ASK_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def job_end() -> float | None:
    """Return when this process's job ends, by `time.monotonic`; None: no job, no limit, or nobody says.

    SLURM_JOB_END_TIME says it (from SLURM 23.02 on, and in scripts of `tide submit`), else squeue is asked.
    """
    number, end = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_END_TIME", "")
    if not number:
        return None
    if end.isdecimal():
        return time.monotonic() + int(end) - time.time()
    left = seconds_of(ask(number, "%L") or "")
    return None if left is None else time.monotonic() + left
