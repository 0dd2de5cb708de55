"""How far a run came, whatever ended it: what a restart says it has lost, and when a job must stop to save.

`LastStep` keeps one small file in the run folder, written over after each step and never flushed: a killed
process leaves it as it was, a machine that lost its power an older one. `Deadline` asks the run to stop while
another step and a save still fit into the time that its job has left.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tide_megatron.base.clock import Clock
from tide_megatron.base.stop import StopFlag

LAST_STEP = "last_step"
SPARE_SECONDS = 30.0
"""For what comes after a save: ranks that end, and a clock that is not SLURM's."""
UNKNOWN_SAVE_SECONDS = 60.0
"""What a save may take that nobody has seen yet."""
_WIDTH = 12


class LastStep:
    """The file of a run that trains; only its first rank keeps one."""

    def __init__(self, folder: Path, clock: Clock, *, is_kept: bool = True) -> None:
        """Begin where the run begins; a disk that refuses is nobody's fault here."""
        self._file: int | None = None
        if is_kept:
            with contextlib.suppress(OSError):
                self._file = os.open(folder / LAST_STEP, os.O_WRONLY | os.O_CREAT, 0o664)
        self.note(clock)

    def note(self, clock: Clock) -> None:
        """Write down how many updates have been applied."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, f"{clock.step:0{_WIDTH}d}\n".encode(), 0)

    def __enter__(self) -> LastStep:
        """Keep it open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def lost_steps(folder: Path, clock: Clock) -> int | None:
    """Return how many updates were applied after the one that a run goes on from; None: nobody knows.

    Args:
        folder: the run folder.
        clock: of the checkpoint.
    """
    try:
        return max(0, int((folder / LAST_STEP).read_text(encoding="ascii")) - clock.step)
    except (OSError, ValueError):
        return None


class Deadline:
    """Raises the stop flag before the time of the job is over. Only the first rank decides, for all."""

    def __init__(
        self,
        stop: StopFlag,
        save_seconds: Callable[[], Sequence[float]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch.

        Args:
            stop: knows when the job ends, and is raised.
            save_seconds: what each save so far took.
            now: the monotonic clock.
        """
        self._stop, self._save_seconds, self._now = stop, save_seconds, now
        self._before = now()
        self._steps: list[float] = []

    def after_step(self) -> None:
        """Stop the run if what it may do next would not fit. Not a collective."""
        now = self._now()
        self._steps.append(now - self._before)
        self._before = now
        left, needed = (self._stop.ends_at or math.inf) - now, self._needed()
        if left < needed and not self._stop.requested:
            self._stop.request(
                f"its job's limit ({left:.0f} s are left, a step and a save need {needed:.0f})"
            )

    def _needed(self) -> float:
        """Return what the longest step so far, with all between two, a save and the rest take.

        A save is counted twice: another one may be under way.
        """
        steps = self._steps[1:] or self._steps  # the first one compiles
        saves = self._save_seconds()
        return max(steps) + (2 * max(saves) if saves else UNKNOWN_SAVE_SECONDS) + SPARE_SECONDS
