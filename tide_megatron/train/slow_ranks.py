"""Ranks that the others wait for, found in the seconds by phase that all ranks tell with each record.

Who waits is not slow: the time goes into whatever collective comes next, on all ranks but the slow one. So a
rank is held against the median of all, phase by phase, and what it needs beyond twice that is added up. Two
ranks cannot be told apart in this way, and a rank that a layout gives more work than the others is told, too:
the others do wait for it.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence

from tide_megatron.base.phases import PHASES
from tide_megatron.train.sinks import Record

log = logging.getLogger(__name__)

WINDOW_SECONDS = 10.0
"""Records are added up over at least so long."""
SHARE, TIMES = 0.25, 2.0
"""A rank is slow when so much of the time is what it needs beyond so many times the median."""
AGAIN_SECONDS = 600.0
"""So long is a rank that was told not told again."""
LEAST_RANKS = 3


class SlowRanks:
    """Watches a run's training records, on the first rank (a `train.sinks.Sink`)."""

    def __init__(self, hosts: Sequence[str], now: Callable[[], float] = time.monotonic) -> None:
        """Begin.

        Args:
            hosts: of each rank.
            now: the monotonic clock.
        """
        self._hosts, self._now = hosts, now
        self._told: dict[int, float] = {}
        self._begin()

    def _begin(self) -> None:
        self._began = self._now()
        self._seconds = [[0.0] * len(PHASES) for _ in self._hosts]

    def write(self, record: Record) -> None:
        """Add a record up; after some seconds, say who is slow."""
        for total, more in zip(self._seconds, record.rank_seconds, strict=False):
            total[:] = [before + now for before, now in zip(total, more, strict=True)]
        window = self._now() - self._began
        if window < WINDOW_SECONDS or len(self._hosts) < LEAST_RANKS:
            return
        medians = [statistics.median(of_all) for of_all in zip(*self._seconds, strict=True)]
        for rank, spent in enumerate(self._seconds):
            excess = [max(0.0, own - TIMES * usual) for own, usual in zip(spent, medians, strict=True)]
            was_told = self._now() - self._told.get(rank, -AGAIN_SECONDS) < AGAIN_SECONDS
            if sum(excess) > SHARE * window and not was_told:
                self._told[rank] = self._now()
                most = max(range(len(PHASES)), key=excess.__getitem__)
                log.warning(
                    "rank %d (%s) keeps the others waiting: in the last %.0f s it needed %.1f s for %s, "
                    "the median rank %.1f s",
                    rank,
                    self._hosts[rank],
                    window,
                    spent[most],
                    PHASES[most],
                    medians[most],
                )
        self._begin()

    def close(self) -> None:
        """Nothing is left to do."""
