"""`metrics.profile`: what rank 0 does in some updates, as a trace that Perfetto or chrome://tracing shows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tide_megatron.base.clock import Clock
from tide_megatron.base.files import PARTIAL
from tide_megatron.parallel.collectives import is_first

log = logging.getLogger(__name__)

TRACE = "profile-steps-{}-{}.json.gz"


class Profiler:
    """Watches some updates of a run; a context manager, so that an early end writes, too."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device) -> None:
        """Be ready.

        Args:
            steps: first and last update to watch, counted from 1; None: none.
            folder: where the trace goes.
            device: what the run computes on.
        """
        self._steps = steps if is_first() else None
        self._folder = folder
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._watching: Any = None
        self._seen: list[int] = []

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def before(self, clock: Clock) -> None:
        """Begin to watch if the update that follows a clock is among those."""
        step = clock.step + 1
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return
        if self._watching is None:
            self._watching = profile(activities=self._activities)
            self._watching.start()
        self._seen.append(step)

    def after(self, clock: Clock) -> None:
        """Write the trace if the update that led to a clock was the last of them."""
        if self._steps is not None and clock.step >= self._steps[1]:
            self._finish()

    def _finish(self) -> None:
        """Stop watching and write what was seen; a disk that refuses is told and ends nothing."""
        watching, self._watching = self._watching, None
        if watching is None:
            return
        watching.stop()
        file = self._folder / TRACE.format(self._seen[0], self._seen[-1])
        partial = file.with_name(f".{PARTIAL}-{file.name}")  # torch packs what ends in .gz
        try:
            watching.export_chrome_trace(str(partial))
            partial.replace(file)
        except (OSError, RuntimeError) as fault:
            log.warning("metrics.profile: %s cannot be written (%s)", file, fault)
        else:
            log.info("profile of steps %d to %d: %s", self._seen[0], self._seen[-1], file)
