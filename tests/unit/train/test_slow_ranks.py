"""A rank that the others wait for is told; ranks that wait are not, nor those that are all alike."""

import logging

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.base.phases import PHASES
from tide_megatron.train.sinks import Record
from tide_megatron.train.slow_ranks import AGAIN_SECONDS, WINDOW_SECONDS, SlowRanks

SLOW = (
    "rank 2 (c) keeps the others waiting: in the last 10 s it needed 8.0 s for student, the median rank 1.0 s"
)


class Watched:
    """Ranks whose records come every second of a clock that is told."""

    def __init__(self, hosts):
        self.seconds = 0.0
        self.slow = SlowRanks(hosts, lambda: self.seconds)

    def run(self, seconds, *ranks):
        """Let time pass; each rank says its seconds by phase for a record of one second."""
        for _ in range(int(seconds)):
            self.seconds += 1.0
            rows = [[of_rank.get(name, 0.0) for name in PHASES] for of_rank in ranks]
            self.slow.write(Record(kind="train", clock=Clock(total_steps=9), values={}, rank_seconds=rows))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "tide_megatron")

    def said():
        return [record.getMessage() for record in caplog.records]

    said.clear = caplog.clear
    return said


WAITS, WORKS = {"student": 0.1, "optimizer": 0.8}, {"student": 0.8, "optimizer": 0.1}


def test_the_rank_that_works_while_the_others_wait_is_told_once_in_a_while(said):
    watched = Watched("abcd")
    watched.run(WINDOW_SECONDS, WAITS, WAITS, WORKS, WAITS)
    assert said() == [SLOW]
    watched.run(AGAIN_SECONDS - 20, WAITS, WAITS, WORKS, WAITS)
    assert len(said()) == 1
    watched.run(40, WAITS, WAITS, WORKS, WAITS)
    assert len(said()) == 2


def test_ranks_that_are_alike_or_few_or_slow_for_a_moment_are_not_told(said):
    Watched("abcd").run(100, WORKS, WORKS, WORKS, WORKS)
    Watched("ab").run(100, WORKS, WAITS)
    watched = Watched("abcd")
    for _ in range(10):
        watched.run(1, WAITS, WAITS, WORKS, WAITS)
        watched.run(9, WAITS, WAITS, WAITS, WAITS)
    assert said() == []


def test_every_window_stands_for_itself_and_scores_are_no_record_of_time(said):
    watched = Watched("abc")
    watched.slow.write(Record(kind="evaluate", clock=Clock(total_steps=9), values={}))
    watched.run(20, WAITS, WAITS, WAITS)
    watched.run(10, WAITS, WAITS, WORKS)
    assert said() == [SLOW]
    watched.slow.close()


def test_a_rank_that_waits_for_its_data_is_told_once_in_a_while(said):
    starved = {"data": 0.15, "student": 0.8}
    for hosts, ranks in (("a", [starved]), ("ab", [WORKS, starved])):
        watched = Watched(hosts)
        watched.run(WINDOW_SECONDS, *ranks)
        told = f"rank {len(hosts) - 1} ({hosts[-1]}) waited 1.5 of the last 10 s for its data: "
        assert [line.startswith(told) for line in said()] == [True]
        watched.run(AGAIN_SECONDS - 20, *ranks)
        assert len(said()) == 1
        said.clear()


def test_a_rank_that_hardly_waits_for_its_data_is_not_told(said):
    Watched("a").run(100, {"data": 0.05, "student": 0.9})
    assert not said()
