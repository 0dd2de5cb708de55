"""The training clock: a plain value that schedules read and checkpoints store."""

from __future__ import annotations

import dataclasses
import time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Where a run stands.

    `step` counts optimizer updates that were applied; it drives the learning rate and TIDAL's lambda.
    `consumed` counts samples that were read; it drives the loader and advances also when a step is
    skipped for not being finite. `skipped` counts those steps.
    """

    step: int = 0
    total_steps: int = 1
    consumed: int = 0
    skipped: int = 0

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: updates before this one over all (spec section 2)."""
        return min(1.0, self.step / max(1, self.total_steps))

    def after_step(self, *, applied: bool, samples: int) -> Clock:
        """Return the clock after one attempted update over `samples` samples (of all ranks together)."""
        return dataclasses.replace(
            self,
            step=self.step + int(applied),
            consumed=self.consumed + samples,
            skipped=self.skipped + int(not applied),
        )


class Pace:
    """How fast a start of a run goes."""

    def __init__(self, clock: Clock) -> None:
        """Begin to measure at a clock."""
        self._began, self._first = time.monotonic(), clock.step

    def seconds_left(self, clock: Clock) -> float | None:
        """Return how long the rest would take at the pace until now; None: no update was applied yet."""
        done = clock.step - self._first
        left = clock.total_steps - clock.step
        return left * (time.monotonic() - self._began) / done if done else None
