"""How long a start took, and where the time went: told once, at the end of its first update."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from tide_megatron.base.startup import STARTUP
from tide_megatron.parallel.collectives import gather_objects, is_first
from tide_megatron.train.history import note_startup
from tide_megatron.train.placement import drawn

log = logging.getLogger(__name__)

Parts = Mapping[str, float]
"""Of one rank: part -> seconds, and "" -> all together (`base.startup`)."""


class FirstUpdate:
    """Waits for the end of the first update, and tells of the start then."""

    def __init__(self, folder: Path) -> None:
        """Begin, right before the update."""
        self._folder, self._began, self._is_told = folder, time.monotonic(), False

    def done(self) -> None:
        """Say that an update is done; all ranks call it together. The first time counts."""
        if self._is_told:
            return
        self._is_told = True
        STARTUP.add("first update", time.monotonic() - self._began)
        ranks = gather_objects(STARTUP.seconds())
        if is_first():
            seconds = max(rank[""] for rank in ranks)
            table = drawn(startup_table(ranks))
            log.info("the first update ended %.1f s after the command began:\n%s", seconds, table)
            with contextlib.suppress(OSError):
                note_startup(self._folder, seconds, slowest(ranks))


def slowest(ranks: Sequence[Parts]) -> dict[str, tuple[float, int]]:
    """Return the longest seconds of each part over all ranks, and the lowest rank that took them."""
    found = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank if name):
        seconds = [rank.get(name, 0.0) for rank in ranks]
        found[name] = (max(seconds), seconds.index(max(seconds)))
    return found


def startup_table(ranks: Sequence[Parts]) -> Table:
    """Draw the parts: seconds of the rank that took longest, which one, and of the middle one."""
    table = Table("part", "longest", "rank", "median", box=None)
    for name, (longest, rank) in slowest(ranks).items():
        median = statistics.median(each.get(name, 0.0) for each in ranks)
        table.add_row(name, f"{longest:.2f} s", str(rank), f"{median:.2f} s")
    rest = min(rank[""] - sum(rank[name] for name in rank if name) for rank in ranks)
    table.add_row("in none, at least", f"{rest:.2f} s", "", "")
    return table
