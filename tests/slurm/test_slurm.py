"""Runs of `tide submit` on a real SLURM of four nodes: both shapes, preemption, failures, odd names.

Every run is the tiny one on 2 nodes x 2 ranks; what it must give is the same run on 4 ranks of our launcher,
bit for bit. `make test-slurm`; skipped with a reason where no SLURM can be had.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import why_not
from tests.slurm.runs import WORDS, Running, figures, one_rank_of
from tests.tiny_run import write_tiny_run
from tests.unit.base.test_nodes import LISTS
from tide_megatron import api
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.nodes import expand_nodes
from tide_megatron.checkpoint.retention import listed
from tide_megatron.launch.job import directive
from tide_megatron.launch.status import look
from tide_megatron.train.history import read_history

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

ODD = 'it\'s "a" `b` $(touch canary) é %j; c'
"""Of a run folder and of a job."""
NAMES = [
    ODD,
    "-n",
    "a\\b",
    '\\"',
    "#SBATCH --hold",
    "日本 🌊",
    "x,y:z=[1-2]",
    "a'",
    "--",
    "$SLURM_JOB_ID %j %%",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Return what the run on 4 ranks of this machine gave."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert api.train(tiny, [f"folder={folder}", *WORDS, "steps=60"], ranks=4)["finished"]
    return figures(folder)


@pytest.mark.parametrize("shape", ["node", "rank"])
def test_both_shapes_give_the_figures_of_one_machine(cluster, tiny, undisturbed, tmp_path, shape):
    run = Running(cluster, tiny, tmp_path / f"{shape} {ODD}", shape=shape, name=f"{shape} {ODD}")
    assert f"JobName={shape} {ODD}\n" in run.facts()
    assert run.ends() == "COMPLETED 0:0", run.said()
    assert figures(run.folder) == undisturbed
    assert [path for path in Path.cwd().glob("canary*")] + [*tmp_path.rglob("canary*")] == []
    if shape == "node":
        assert "node 0 of 2 is up" in run.said()


def test_a_preflight_alone_ends_well_and_begins_nothing(cluster, tiny, tmp_path):
    run = Running(cluster, tiny, tmp_path / "run", preflight_only=True)
    assert run.ends() == "COMPLETED 0:0", run.said()
    assert "preflight: " in run.said()
    assert "4 equal rank(s) each" in run.said()
    assert [path.name for path in run.folder.iterdir()] == ["jobs"]


def test_a_preempted_run_goes_on_elsewhere_and_ends_as_if_nothing_had_been(
    cluster, tiny, undisturbed, tmp_path
):
    run = Running(cluster, tiny, tmp_path / "run")
    run.is_at(5)
    os.kill(one_rank_of(run), signal.SIGTERM)  # any rank: the others agree with it
    run.is_back(restarts=1)
    stopped = json.loads((run.folder / "stopped.json").read_text())
    assert stopped["clock"]["step"] >= 5
    assert "puts itself back into the queue" in run.said()

    cluster.run("scontrol", "update", f"JobId={run.job}", "ExcNodeList=127.0.0.[1-2]")
    cluster.start_now(run.job)
    run.is_at(stopped["clock"]["step"] + 2)
    assert "NodeList=127.0.0.[3-4]" in run.facts()
    assert f"resumed from step {stopped['clock']['step']}, lost no steps," in run.said()
    job = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.run("sbatch", *job)  # SLURM sends USR1 to the batch shell, as --signal=B:USR1@N does
    run.is_back(restarts=2)
    assert json.loads((run.folder / "stopped.json").read_text())["reason"] in ("SIGUSR1", "another rank")

    assert run.ends() == "COMPLETED 0:0", run.said()
    assert figures(run.folder) == undisturbed
    assert run.said().count("lost no steps") == 2


def test_a_cancelled_run_saves_and_stays_cancelled(cluster, tiny, tmp_path):
    run = Running(cluster, tiny, tmp_path / "run", nodes=1, shape="rank")
    run.is_at(3)
    cluster.run("scancel", run.job)
    cluster.within(
        40, lambda: cluster.state(run.job).startswith("CANCELLED") and "so it does not put" in run.said()
    )
    time.sleep(1)
    assert cluster.state(run.job).startswith("CANCELLED")
    stopped = json.loads((run.folder / "stopped.json").read_text())
    assert stopped["clock"]["step"] >= 3
    assert list(run.folder.glob(f"checkpoints/step-{stopped['clock']['step']:08d}-*"))


def test_a_rank_that_is_killed_ends_the_job_on_all_nodes_with_its_name(cluster, tiny, tmp_path):
    run = Running(cluster, tiny, tmp_path / "run", ranks_per_node=1, words=["checkpoints.every=0"])
    run.is_at(2)
    began = time.monotonic()
    os.kill(one_rank_of(run), signal.SIGKILL)
    assert run.ends(60) == "FAILED 1:0"
    assert time.monotonic() - began < 30
    assert "was killed by SIGKILL" in run.said()
    assert "of 2 failed first: it was killed by SIGKILL" in run.said(), "on its own node"
    assert re.search(r"error: node \d failed first: rank \d: it was killed", run.said()), (
        "and on the other one"
    )


def test_ranks_killed_after_a_save_cost_an_interval_each_and_a_host_that_lost_two_is_left_out(
    cluster, tiny, undisturbed, tmp_path
):
    run = Running(cluster, tiny, tmp_path / "run")
    cluster.within(180, lambda: list(run.folder.glob("checkpoints/step-*[0-9]")), run.told)
    assert look(run.folder).state == "training"
    os.kill(one_rank_of(run), signal.SIGKILL)
    run.is_back(restarts=1, seconds=120)
    assert look(run.folder).state == "failed, queued again"
    saved = listed(run.folder / "checkpoints")[-1]
    cluster.start_now(run.job)
    cluster.within(180, lambda: listed(run.folder / "checkpoints")[-1] != saved, run.told)
    os.kill(one_rank_of(run), signal.SIGKILL)
    run.is_back(restarts=2, seconds=120)
    cluster.within(60, lambda: "ExcNodeList=127.0.0.2\n" in run.facts(), run.told)
    cluster.start_now(run.job)
    cluster.within(120, run.is_running, run.told)
    nodes = expand_nodes(run.nodes(), "nodes")
    assert run.ends(240) == "COMPLETED 0:0", run.said()
    assert figures(run.folder) == undisturbed
    first, second, third = read_history(run.folder)
    for start in (first, second):
        assert "was killed by SIGKILL" in start.why
        assert start.lost_on == "127.0.0.2", "the node that is no first task's"
    for start in (second, third):
        assert 0 <= start.lost <= 16, "the save under way is not whole"
    assert "127.0.0.2" not in nodes
    assert (third.end, third.restarts, look(run.folder).state) == ("finished", 2, "finished")


def test_lists_of_nodes_are_read_as_scontrol_reads_them(cluster):
    told = {
        text: cluster.run("scontrol", "show", "hostnames", text).split()
        for text in LISTS
        if not text.endswith(",other") and ".site" not in text
    }
    assert len(told) > 7
    assert told == {text: expand_nodes(text, "LIST") for text in told}


@pytest.mark.parametrize("name", NAMES)
def test_sbatch_reads_every_value_as_it_was_meant(cluster, tmp_path, name):
    script = tmp_path / "job.sbatch"
    lines = [directive("job-name", name), directive("comment", name), "#SBATCH --hold", "true"]
    script.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    job = cluster.run("sbatch", "--parsable", str(script))
    assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%j") == name
    assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%k") == name
    cluster.run("scancel", job)


def test_a_refusal_of_sbatchs_is_told(cluster, tiny, tmp_path):
    with pytest.raises(
        ConfigError, match=r"job\.sbatch: sbatch refused it: sbatch: error: .*invalid partition"
    ):
        Running(cluster, tiny, tmp_path / "run", partition="no such")


def test_without_an_address_ranks_of_two_nodes_are_told_at_once(cluster, tmp_path):
    """An address that nobody can derive is demanded; nobody waits for 127.0.0.1."""
    code = "from tide_megatron.base.device import read_ranks; print(read_ranks())"
    words = ["srun", "-N2", "--ntasks-per-node=1", os.fspath(Path(os.sys.executable)), "-c", code]
    environment = {**cluster.environment, "MASTER_ADDR": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said.count("address='127.0.0.1'") == 2
    assert "rank=1, local_rank=0, world_size=2" in said
