"""Preempt one run again and again on a real SLURM of four nodes on this machine, and look for what is lost.

    python tools/preempt_test.py                    (20 preemptions, 2 nodes x 2 ranks: about 10 minutes)
    python tools/preempt_test.py --preemptions 4 --shape rank
    python tools/preempt_test.py --preemptions 6 --layouts 1x2,2x2,1x1    (nodes x ranks, in turns)

`tide submit` submits the run once. Five ways of preempting it take turns: SIGTERM to one rank, the warning
that sbatch's --signal sends to the batch shell, a job of a partition with a higher priority, `scontrol
requeue`, and SIGUSR1 to all tasks. After each one the run must stand in the queue again, saved; its next
start is kept off the first of the nodes that it had. At the end every step's loss and gradient norm, the
scores and the student's bytes are compared with those of the same run on 4 ranks of one launcher that nobody
disturbed. Each start must say that it lost no step, and none may have been trained twice.

With `--layouts` the job that was put back is cancelled each time, and the run submitted on the next number of
ranks, with the teacher cut over two of them where there are as many; then losses, gradient norms, scores and
weights must be those of the undisturbed run to 1e-5.

Needs root and Debian's SLURM packages (`make preempt-test`). Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.runs import WORDS, Running, figures, one_rank_of
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
URGENT = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 0.1")
STEPS_A_START, STEPS_PLANNED = 3, 9
"""A start is preempted after so many steps, or a few later; so many are planned for each."""
ACROSS_LAYOUTS = 1e-5
"""So far apart, as a share, may figures be that were computed on other ranks."""

WAYS = {
    "SIGTERM to one rank": lambda run: os.kill(one_rank_of(run), signal.SIGTERM),
    "USR1 to the batch shell": lambda run: run.cluster.run("scancel", "--batch", "--signal=USR1", run.job),
    "a job of higher priority": lambda run: run.cluster.run("sbatch", *URGENT),
    "scontrol requeue": lambda run: run.cluster.run("scontrol", "requeue", run.job),
    "USR1 to all tasks": lambda run: run.cluster.run("scancel", "--signal=USR1", run.job),
}


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--shape", choices=("node", "rank"), default="node")
    parser.add_argument("--layouts", default="2x2", help="nodes x ranks a node, of each start in turns")
    chosen = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    layouts = [Layout(*map(int, words.split("x"))) for words in chosen.layouts.split(",")]
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "cluster") as cluster:
        os.environ.update(cluster.environment)
        steps = STEPS_PLANNED * (chosen.preemptions + 2)
        starts = Starts(cluster, Path(folder), steps, chosen.shape, layouts)
        starts.run_undisturbed()
        faults = starts.preempt(chosen.preemptions)
        state = starts.run.ends(600)
        if state != "COMPLETED 0:0":
            faults.append(f"the job ended as {state}")
        else:
            faults += starts.compare()
        lost = re.findall(r"resumed from step \d+, (lost [^,]+),", starts.said())
        faults += [f"a start says: {each}" for each in lost if each != "lost no steps"]
        if len(lost) != chosen.preemptions:
            faults.append(f"{len(lost)} starts went on from a checkpoint")
        print(f"{chosen.preemptions} preemptions, {steps} steps, {len(lost)} resumes; state {state}")
        print("\n".join(faults) or f"{starts.outcome}; no step was lost or trained twice")
        if faults:
            print(starts.said())
    return bool(faults)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a start stands on."""

    nodes: int
    ranks_per_node: int

    @property
    def words(self) -> tuple[str, ...]:
        """Return what the recipe says of the teacher there."""
        return (f"teachers.moe.layout.expert={min(2, self.nodes * self.ranks_per_node)}",)


class Starts:
    """The starts of one run, whose job is put back after each preemption or followed by another one."""

    def __init__(
        self, cluster: Cluster, folder: Path, steps: int, shape: str, layouts: Sequence[Layout]
    ) -> None:
        """Write the run and submit it on the first layout."""
        self._cluster, self._folder, self._steps, self._shape = cluster, folder, steps, shape
        self._layouts, self._submitted = layouts, 0
        self._tiny = write_tiny_run(folder / "tiny")
        self._undisturbed = folder / "undisturbed"
        self._earlier: list[str] = []
        self.outcome = "bit-equal to the undisturbed run"
        self.run: Running

    def submit(self) -> None:
        """Submit the run on the next layout."""
        layout = self._layouts[self._submitted % len(self._layouts)]
        self._submitted += 1
        self.run = Running(
            self._cluster,
            self._tiny,
            self._folder / "run",
            steps=self._steps,
            words=layout.words,
            shape=self._shape,
            nodes=layout.nodes,
            ranks_per_node=layout.ranks_per_node,
            restarts=1000,
        )

    def said(self) -> str:
        """Return what all jobs said."""
        return "\n".join([*self._earlier, self.run.said()])

    def run_undisturbed(self) -> None:
        """Run it on 4 ranks of one launcher."""
        words = [f"folder={self._undisturbed}", *WORDS, f"steps={self._steps}", *Layout(1, 4).words]
        train = [
            sys.executable,
            "-m",
            "tide_megatron.commands",
            "train",
            str(self._tiny),
            "--ranks=4",
            *words,
        ]
        subprocess.run(train, check=True, capture_output=True, cwd=ROOT)

    def preempt(self, count: int) -> list[str]:
        """Preempt the run so often, each time after some steps of its own; return what was wrong."""
        at, faults, restarts = 0, [], 0
        self.submit()
        for number in range(count):
            way = list(WAYS)[number % len(WAYS)]
            self.run.is_at(at + STEPS_A_START, seconds=240)
            began, nodes = time.monotonic(), self.run.nodes()
            WAYS[way](self.run)
            restarts += 1
            self.run.is_back(restarts=restarts, seconds=120)
            at, told = self.run.step(), self.run.stopped_at()
            layout = self._layouts[(self._submitted - 1) % len(self._layouts)]
            where = f"{nodes} ({layout.nodes}x{layout.ranks_per_node})"
            print(
                f"{number + 1:3d}  {way:25} on {where:24} at step {at}, {time.monotonic() - began:.1f} s",
                flush=True,
            )
            if told != at:
                faults.append(f"preemption {number + 1} ({way}): saved at step {told}, trained to {at}")
            if len(self._layouts) == 1:
                self.run.keep_off(nodes)
                self._cluster.start_now(self.run.job)
            else:
                self._cluster.run("scancel", self.run.job)
                self._earlier.append(self.run.said())
                self.submit()
                restarts = 0
        return faults

    def compare(self) -> list[str]:
        """Hold the run's figures against the undisturbed one's; return what is wrong."""
        if len(self._layouts) == 1:
            is_equal = figures(self.run.folder) == figures(self._undisturbed)
            return [] if is_equal else ["the figures are not those of the undisturbed run"]
        apart = _apart(self.run.folder, self._undisturbed)
        told = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        self.outcome = f"apart from the undisturbed run: {told}"
        return [f"more than 1e-5: {told}"] if max(apart.values()) > ACROSS_LAYOUTS else []


def _apart(folder: Path, undisturbed: Path) -> dict[str, float]:
    """Return by what share losses, gradient norms, scores and weights of two runs differ at most."""
    (steps, scores, _), (wanted, wanted_scores, _) = figures(folder), figures(undisturbed)
    assert (steps.keys(), scores.keys()) == (wanted.keys(), wanted_scores.keys()), "other steps"
    weights, others = (load_file(each / "model/model.safetensors") for each in (folder, undisturbed))
    return {
        "losses": max(abs(steps[at][0] / wanted[at][0] - 1) for at in wanted),
        "gradient norms": max(abs(steps[at][1] / wanted[at][1] - 1) for at in wanted),
        "scores": max(abs(scores[at] / wanted_scores[at] - 1) for at in wanted_scores),
        "weights": max(
            float((weights[name] - other).abs().max() / other.abs().max()) for name, other in others.items()
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
