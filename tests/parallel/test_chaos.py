"""Three faults in one run, of `tools/chaos.py`'s: a rank stands still, a byte changes, a rank is killed.

Three starts of `tide train` in real processes; each goes on from where it says, and the end is that of a run
which nobody disturbed. `make chaos-sample`.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import planned
from chaos_runs import network
from chaos_runs.kinds import KINDS
from chaos_runs.seen import Seen, ended, resumed
from chaos_runs.starts import EVERY, STEPS, Site
from kill_test import descendants
from tests.parallel.test_launch import ROOT, within
from tests.slurm.runs import figures
from tests.tiny_run import write_tiny_run
from tide_megatron import api
from tide_megatron.checkpoint.retention import listed
from tide_megatron.train.history import read_history

HANG_SECONDS = 5
WORDS = (f"hang_seconds={HANG_SECONDS}", "checkpoints.asynchronous=false")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_three_faults_are_noticed_told_and_cost_no_more_than_they_must(tmp_path):
    tiny = write_tiny_run(tmp_path / "tiny")
    site = Site(tiny=tiny, folder=tmp_path / "run", words=WORDS)
    try:
        first = site.start()
        first.is_past(2 * EVERY)
        since = time.monotonic()
        os.kill(first.ranks()[1], signal.SIGSTOP)
        still = Seen(number=1, kind="stopped", limit=HANG_SECONDS + 12)
        still.notice(first, r"rank 1 of 2 failed first: it stands still: .* stopped by a signal", since)
        ended(first, 70)

        newest = listed(site.folder / "checkpoints")[-1]
        shard = newest / "__1_0.distcp"
        spoilt = bytearray(shard.read_bytes())
        spoilt[1000] ^= 1
        shard.write_bytes(spoilt)
        second = site.start()
        assert second.says(rf"{newest.name} is damaged \(.*__1_0\.distcp", 90)
        at = second.is_past(resumed_at(second) + EVERY)
        since = time.monotonic()
        os.kill(second.ranks()[0], signal.SIGKILL)
        killed = Seen(number=3, kind="killed", limit=10)
        killed.notice(second, "rank 0 of 2 failed first: it was killed by SIGKILL", since)
        ended(second, 70)

        third = site.start()
        ended(third, 0, seconds=120)
        went_on, lost = resumed(third)
        assert 0 <= went_on + lost - at <= 2
        assert lost <= EVERY
    finally:
        site.close()
    ends = [(start.end, start.why.partition(":")[0]) for start in read_history(site.folder)]
    assert ends == [
        ("failed", "rank 1 of 2 failed first"),
        ("failed", "rank 0 of 2 failed first"),
        ("finished", ""),
    ]
    undisturbed = tmp_path / "undisturbed"
    words = [f"folder={undisturbed}", f"steps={STEPS}", "checkpoints.every=0", "metrics.every=1"]
    api.train(tiny, words, ranks=2)
    assert figures(site.folder) == figures(undisturbed)


def resumed_at(start):
    """Return where a start went on from, once it has said so."""
    assert start.says("resumed from step", 90)
    return resumed(start)[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(network.why_not() is not None, reason=str(network.why_not()))
def test_a_tool_that_is_killed_leaves_nothing_behind(tmp_path):
    """Launchers, ranks, networks, and the mounts that give networks their names."""
    names, mounts = network.NAMESPACES, Path("/proc/self/mounts")
    before = {path.name for path in names.glob("*")}, mounts.read_text()
    command = [sys.executable, "tools/chaos.py", "--faults=1", "--kinds=the network", f"--page={tmp_path}/x"]
    tool = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    within(300, lambda: len(ranks_of(tool)) == 4, "two hosts have two ranks each")
    every = descendants(tool.pid)
    networks = {os.readlink(f"/proc/{rank}/ns/net") for rank in ranks_of(tool)}
    assert len(networks - {os.readlink("/proc/self/ns/net")}) == 2
    tool.kill()
    tool.wait()
    within(20, lambda: not any(map(runs, every)), "all processes have ended")
    assert ({path.name for path in names.glob("*")}, mounts.read_text()) == before


def ranks_of(tool):
    """Return the ranks of all launchers of a tool: each leads a session, and its parent a fork server."""
    found = []
    for pid in descendants(tool.pid):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if os.getsid(pid) == pid and b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.append(pid)
    return found


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_kind_comes_before_one_comes_twice_and_a_seed_plans_the_same():
    plan = planned(KINDS, 40, random.Random(7))
    assert len(plan) == 40
    assert set(plan) == set(KINDS)
    assert plan == planned(KINDS, 40, random.Random(7)) != planned(KINDS, 40, random.Random(8))
    assert len(set(planned(KINDS, 5, random.Random(7)))) == 5
