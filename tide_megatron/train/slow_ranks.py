"""Ranks that the others wait for, found in the seconds by phase that all ranks tell with each record.

Who waits is not slow: the time goes into whatever collective comes next, on all ranks but the slow one. So a
rank is held against the median of all, phase by phase, and what it needs beyond twice that is added up. Two
ranks cannot be told apart in this way, and a rank that a layout gives more work than the others is told, too:
the others do wait for it.

What a step reads is made while the one before computes, so a rank that spends time in `data` has nothing
to do meanwhile: that is told, too, for any number of ranks.
"""

from __future__ import annotations

import logging
import math
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
_DATA = -1
"""What is told of data, beside ranks."""
STARVED = 0.1
"""A rank starves when it waits for its data so much of the time."""


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
        if window < WINDOW_SECONDS:
            return
        self._tell_starving(window)
        if len(self._hosts) >= LEAST_RANKS:
            self._tell_slow(window)
        self._begin()

    def _tell_starving(self, window: float) -> None:
        """Say that a rank waits for its data."""
        waited = [spent[PHASES.index("data")] for spent in self._seconds]
        rank = max(range(len(waited)), key=waited.__getitem__)
        if waited[rank] > STARVED * window and self._is_due(_DATA):
            log.warning(
                "rank %d (%s) waited %.1f of the last %.0f s for its data: the disk under it is slow, or the "
                "host has too few cores to make the next step's input beside this one (docs/blends.md)",
                rank,
                self._hosts[rank],
                waited[rank],
                window,
            )

    def _is_due(self, subject: int) -> bool:
        """Say whether something was not told lately, and remember that it is now."""
        is_due = self._now() - self._told.get(subject, -math.inf) >= AGAIN_SECONDS
        if is_due:
            self._told[subject] = self._now()
        return is_due

    def _tell_slow(self, window: float) -> None:
        """Say who needs more time than the median."""
        medians = [statistics.median(of_all) for of_all in zip(*self._seconds, strict=True)]
        for rank, spent in enumerate(self._seconds):
            excess = [max(0.0, own - TIMES * usual) for own, usual in zip(spent, medians, strict=True)]
            if sum(excess) > SHARE * window and self._is_due(rank):
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

    def close(self) -> None:
        """Nothing is left to do."""
