"""Runs on a cluster of `tests.slurm.cluster`: where they stand, what they said, what they gave."""

import json
from pathlib import Path

from tide_megatron.base.files import digest_of
from tide_megatron.base.nodes import expand_nodes
from tide_megatron.launch.job import JobOptions
from tide_megatron.launch.submit import submit

WORDS = ("checkpoints.every=8", "metrics.every=1")


def figures(folder):
    """Return every step's loss and gradient norm, the scores, and the student's bytes."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {
        record["step"]: (record["loss"], record["grad_norm"])
        for record in records
        if record["kind"] == "train"
    }
    scores = {record["step"]: record["nll_per_byte"] for record in records if record["kind"] == "evaluate"}
    return steps, scores, digest_of(folder / "model/model.safetensors")


class Running:
    """A submitted run."""

    def __init__(self, cluster, tiny, folder, steps=60, words=(), **options):
        self.cluster, self.folder, self.shape = cluster, folder, options.get("shape", "node")
        self.is_on_one_node = options.get("nodes") == 1
        options = JobOptions(**{"nodes": 2, "ranks_per_node": 2, "warning": 10, "time": "30"} | options)
        done = submit(tiny, [f"folder={json.dumps(str(folder))}", *WORDS, f"steps={steps}", *words], options)
        [self.job], self.log = done.numbers, Path(done.log)

    def said(self):
        return self.log.read_text() if self.log.is_file() else ""

    def is_at(self, step, seconds=90):
        """Wait until a start has applied so many updates."""
        self.cluster.within(seconds, lambda: self.is_running() and self.step() >= step, self.told)

    def is_running(self):
        return self.cluster.state(self.job).startswith("RUNNING")

    def step(self):
        try:
            return int((self.folder / "last_step").read_text())
        except (OSError, ValueError):
            return -1

    def is_back(self, restarts, seconds=60):
        """Wait until it stands in the queue again."""
        where = f"Restarts={restarts}"
        self.cluster.within(
            seconds, lambda: "JobState=PENDING" in self.facts() and where in self.facts(), self.told
        )

    def told(self):
        return f"{self.facts()}\n{self.said()}"

    def stopped_at(self):
        """Return the step that stopped.json names; None where there is none."""
        try:
            return json.loads((self.folder / "stopped.json").read_text())["clock"]["step"]
        except OSError:
            return None

    def nodes(self):
        return self.cluster.run("squeue", "--noheader", f"--jobs={self.job}", "--format=%N")

    def keep_off(self, nodes):
        """Take the first of some nodes away from the next start."""
        first = expand_nodes(nodes, "nodes")[0]
        self.cluster.run("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={first}")

    def facts(self):
        return self.cluster.run("scontrol", "show", "job", self.job)

    def ends(self, seconds=120):
        return self.cluster.wait_for(self.job, seconds, self.log)


def one_rank_of(run):
    """Return the process of one of the run's ranks, and not the first task's where there are several nodes.

    It is a fork of a launcher's fork server, or a task.
    """
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                word.split(b"=", 1) for word in (path / "environ").read_bytes().split(b"\0") if b"=" in word
            )
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            words = [Path(f"/proc/{each}/cmdline").read_bytes() for each in (path.name, parent)]
        except OSError:
            continue
        is_first = variables.get(b"SLURM_PROCID") == b"0"
        is_ours = variables.get(b"SLURM_JOB_ID") == run.job.encode() and is_first <= run.is_on_one_node
        kind = b"forkserver" if run.shape == "node" else b"tide_megatron.commands"
        if is_ours and kind in words[0] and (kind in words[1]) == (run.shape == "node"):
            return int(path.name)
    raise AssertionError("no rank found")
