"""Three faults in one run, of `tools/chaos.py`'s: a rank stands still, a byte changes, a rank is killed.

Three starts of `tide train` in real processes; each goes on from where it says, and the end is that of a run
which nobody disturbed. `make chaos-sample`.
"""

import os
import random
import signal
import time

import pytest

from chaos import planned
from chaos_runs.kinds import KINDS
from chaos_runs.seen import Seen, ended, resumed
from chaos_runs.starts import EVERY, STEPS, Site
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


def test_every_kind_comes_before_one_comes_twice_and_a_seed_plans_the_same():
    plan = planned(KINDS, 40, random.Random(7))
    assert len(plan) == 40
    assert set(plan) == set(KINDS)
    assert plan == planned(KINDS, 40, random.Random(7)) != planned(KINDS, 40, random.Random(8))
    assert len(set(planned(KINDS, 5, random.Random(7)))) == 5
