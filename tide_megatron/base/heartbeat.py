"""A rank's signs of life: what it is at and since when, in memory that whoever started it can read.

A step writes one whenever a phase begins or ends (`base.phases`). Nothing is sent and nobody waits: the
launcher looks when it likes, also when the rank's interpreter stands still. Without a launcher nothing
happens.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

_PHASE_BYTES = 24


class Pulse(ctypes.Structure):
    """What is shared; `multiprocessing`'s RawValue gives it a place in shared memory."""

    _fields_ = (
        ("at", ctypes.c_double),
        ("updates", ctypes.c_longlong),
        ("phase", ctypes.c_char * _PHASE_BYTES),
        ("is_asked", ctypes.c_bool),
    )


class Heartbeat:
    """What this process shows of itself."""

    def __init__(self) -> None:
        """Begin with nobody who reads it."""
        self._pulse: Any = None
        self.has_saved = False
        """Whether a checkpoint has become whole in this process's life."""

    def show(self, pulse: Any) -> None:
        """Write into a `Pulse` from now on; None: nowhere."""
        self._pulse = pulse

    def beat(self, phase: str) -> None:
        """Say that a phase begins now; empty: the time between two."""
        if self._pulse is not None:
            self._pulse.phase = phase.encode()[: _PHASE_BYTES - 1]
            self._pulse.at = time.monotonic()

    def update(self) -> None:
        """Say that an update is done."""
        if self._pulse is not None:
            self._pulse.updates += 1

    def rest(self) -> None:
        """Say that what follows may take any time."""
        if self._pulse is not None:
            self._pulse.at = 0.0


HEARTBEAT = Heartbeat()
"""The one of this process."""
