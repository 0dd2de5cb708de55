"""Where the time of a start goes: seconds by part, from the command to the end of the first update.

Parts follow one another on the host's clock and do not nest; what lies between them (waiting for other ranks,
mostly) belongs to none. `train.startup` collects them from all ranks and writes them down.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Startup:
    """The parts of this process's start."""

    def __init__(self) -> None:
        """Begin now."""
        self.command_began: float | None = None
        """When the command began that this process is; None: it is none, so nobody waits for its imports."""
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._part: str | None = None

    def begin(self, at: float) -> None:
        """Forget what was, and count from a moment of `time.monotonic`, of this machine's any process."""
        self._began, self._seconds, self._part = at, {}, None

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's time as `part`; of blocks of one name the times are added."""
        assert self._part is None, f"{part} began inside {self._part}"
        self._part, began = part, time.monotonic()
        try:
            yield
        finally:
            self._part = None
            self.add(part, time.monotonic() - began)

    def until_now(self, part: str) -> None:
        """Count all the time so far as `part`."""
        self.add(part, time.monotonic() - self._began)

    def add(self, part: str, seconds: float) -> None:
        """Count so many seconds as `part`."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Return the seconds by part, in their order, and under "" all from the start until now."""
        return {**self._seconds, "": time.monotonic() - self._began}


STARTUP = Startup()
"""The one of this process."""


def process_began() -> float:
    """Return when this process began, on the clock of `time.monotonic`; now, where the system cannot say."""
    try:
        fields = (
            Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()
