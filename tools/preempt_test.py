"""Preempt one run again and again on a real SLURM of four nodes on this machine, and look for what is lost.

    python tools/preempt_test.py                    (20 preemptions, 2 nodes x 2 ranks: about 10 minutes)
    python tools/preempt_test.py --preemptions 4 --shape rank

`tide submit` submits the run once. Five ways of preempting it take turns: SIGTERM to one rank, the warning
that sbatch's --signal sends to the batch shell, a job of a partition with a higher priority, `scontrol
requeue`, and SIGUSR1 to all tasks. After each one the run must stand in the queue again, saved; its next
start is kept off the first of the nodes that it had. At the end every step's loss and gradient norm, the
scores and the student's bytes are compared with those of the same run on 4 ranks of one launcher that nobody
disturbed. Each start must say that it lost no step, and none may have been trained twice. Needs root and
Debian's SLURM packages (`make preempt-test`). Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.runs import WORDS, Running, figures, one_rank_of
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
URGENT = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 0.1")
STEPS_A_START, STEPS_PLANNED = 3, 9
"""A start is preempted after so many steps, or a few later; so many are planned for each."""


WAYS = {
    "SIGTERM to one rank": lambda run: os.kill(one_rank_of(run), signal.SIGTERM),
    "USR1 to the batch shell": lambda run: run.cluster.run("scancel", "--batch", "--signal=USR1", run.job),
    "a job of higher priority": lambda run: run.cluster.run("sbatch", *URGENT),
    "scontrol requeue": lambda run: run.cluster.run("scontrol", "requeue", run.job),
    "USR1 to all tasks": lambda run: run.cluster.run("scancel", "--signal=USR1", run.job),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--shape", choices=("node", "rank"), default="node")
    chosen = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "cluster") as cluster:
        os.environ.update(cluster.environment)
        file = write_tiny_run(Path(folder) / "tiny")
        steps = STEPS_PLANNED * (chosen.preemptions + 2)
        words = [*WORDS, f"steps={steps}"]
        undisturbed = Path(folder) / "undisturbed"
        train = [sys.executable, "-m", "tide_megatron.commands", "train", str(file), "--ranks=4"]
        subprocess.run([*train, f"folder={undisturbed}", *words], check=True, capture_output=True, cwd=ROOT)
        run = Running(cluster, file, Path(folder) / "run", steps=steps, shape=chosen.shape, restarts=1000)
        faults = preempt(run, chosen.preemptions)
        state = run.ends(600)
        if state != "COMPLETED 0:0":
            faults.append(f"the job ended as {state}")
        elif figures(run.folder) != figures(undisturbed):
            faults.append("the figures are not those of the undisturbed run")
        lost = re.findall(r"resumed from step \d+, (lost [^,]+),", run.said())
        faults += [f"a start says: {each}" for each in lost if each != "lost no steps"]
        if len(lost) != chosen.preemptions:
            faults.append(f"{len(lost)} starts went on from a checkpoint")
        print(f"{chosen.preemptions} preemptions, {steps} steps, {len(lost)} resumes; state {state}")
        print("\n".join(faults) or "bit-equal to the undisturbed run; no step was lost or trained twice")
        if faults:
            print(run.said())
    return bool(faults)


def preempt(run: Running, count: int) -> list[str]:
    """Preempt a run so often, each time after some steps of its own; return what was wrong."""
    at, faults = 0, []
    for number in range(count):
        way = list(WAYS)[number % len(WAYS)]
        run.is_at(at + STEPS_A_START, seconds=240)
        began, nodes = time.monotonic(), run.nodes()
        WAYS[way](run)
        run.is_back(restarts=number + 1, seconds=120)
        at, told = run.step(), run.stopped_at()
        print(
            f"{number + 1:3d}  {way:25} on {nodes:18} at step {at}, {time.monotonic() - began:.1f} s",
            flush=True,
        )
        if told != at:
            faults.append(f"preemption {number + 1} ({way}): saved at step {told}, trained to {at}")
        run.keep_off(nodes)
        run.cluster.start_now(run.job)
    return faults


if __name__ == "__main__":
    sys.exit(main())
