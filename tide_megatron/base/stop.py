"""The stop flag: how a signal reaches the training loop without interrupting a step.

`launch/signals.py` raises it from signal handlers; loops poll `requested` between steps, agree on it over all
ranks (signals arrive at different steps on different ranks), save, and return. It is a value that travels
through the door, so no layer below `launch` knows about signals.
"""

from __future__ import annotations


class StopFlag:
    """Whether somebody asked this process to finish early, and who."""

    def __init__(self) -> None:
        """Start with no request."""
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether the loop should save and return after the step it is in."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for an early end; the first reason stays."""
        self.reason = self.reason or reason
