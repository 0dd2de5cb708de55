"""Where the time goes: exclusive times of the parts of a step, on the host's clock or on a GPU's.

A mark is made wherever a phase begins or ends; what lies between two marks belongs to the phase that was
innermost there. On CUDA a mark is an event in the current stream. The host never waits for one: an event is
asked whether it has passed, and what has not passed is read at a later mark or a later `take`. So a phase has
the time that the GPU spent between its marks, and what the host did meanwhile does not show.

On CUDA each phase also has its peak memory: the most that torch's allocator held while the host was in it.
Memory is given out on the host, so that needs no event. On a CPU there is no such record.

Events are used again as soon as they have been read: as many exist as are under way at once, about those of
one step, because a step ends with a number that the host waits for.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.memory import take_peak_bytes

PHASES = (
    *("data", "teacher", "exchange", "student", "head", "backward", "optimizer"),
    *("evaluate", "checkpoint"),
)
"""What a training run names, in the order of a step."""


class TimingEvent(Protocol):
    """A moment on some clock; `torch.cuda.Event(enable_timing=True)` is one."""

    def record(self) -> None:
        """Be the moment at which whatever was asked for so far is done."""

    def query(self) -> bool:
        """Say, without waiting, whether the moment has passed."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from here to another moment of this clock; both have passed."""


class HostEvent:
    """A moment on the host's clock; it has passed as soon as it is recorded."""

    def __init__(self) -> None:
        self._milliseconds = 0.0

    def record(self) -> None:
        """Be now."""
        self._milliseconds = 1000 * time.perf_counter()

    def query(self) -> bool:
        """Say that it has passed."""
        return True

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Return the milliseconds to another moment of the host."""
        return end_event._milliseconds - self._milliseconds


def _cuda_mark() -> TimingEvent:
    mark: TimingEvent = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return mark


class Phases:
    """Exclusive times of the parts of a step: inside `with phases("head")`, time belongs to `head`.

    A phase opened inside another pauses the outer one, so the sums never exceed the wall clock. One timer is
    shared by all parts of a run on a rank, in one thread and one CUDA stream.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Start with nothing measured; `device` says whose clock counts, None: the host's."""
        on_cuda = device is not None and device.type == "cuda"
        self._make_mark: Callable[[], TimingEvent] = _cuda_mark if on_cuda else HostEvent
        self._open: list[str] = []
        self._marks: deque[tuple[TimingEvent, str | None]] = deque()
        """Each with the phase that begins there, oldest first; what lies before the first has been read."""
        self._unused: list[TimingEvent] = []
        self._milliseconds: dict[str, float] = defaultdict(float)
        self._has_peaks = on_cuda
        self._peaks: dict[str, int] = {}
        self._now: str | None = None
        """The phase of the span that runs."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`. A generator must not yield inside it."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def take(self) -> dict[str, float]:
        """Return the seconds by phase that became known since the last `take`; never waits for a device.

        On CUDA, what the GPU has not finished comes with a later `take`: nothing is lost or counted twice,
        but one answer may tell of a little more or less time than has gone by since the one before.
        """
        self._mark()
        self._read()
        taken = {name: spent / 1000 for name, spent in self._milliseconds.items()}
        self._milliseconds.clear()
        return taken

    def take_peaks(self) -> dict[str, int]:
        """Return the bytes that the device held at most in each phase since the last call; CPU: none."""
        if self._has_peaks:
            self._note_peak()
        taken, self._peaks = self._peaks, {}
        return taken

    def _mark(self) -> None:
        """End the span that runs; the next one belongs to what is open now."""
        if self._has_peaks:
            self._note_peak()
        if not self._unused:
            self._read()
        HEARTBEAT.beat(self._open[-1] if self._open else "")
        mark = self._unused.pop() if self._unused else self._make_mark()
        mark.record()
        self._marks.append((mark, self._open[-1] if self._open else None))

    def _note_peak(self) -> None:
        """Give the span that ends its peak."""
        peak = take_peak_bytes()  # also between phases, so that the next span begins at what is held now
        if self._now is not None:
            self._peaks[self._now] = max(peak, self._peaks.get(self._now, 0))
        self._now = self._open[-1] if self._open else None

    def _read(self) -> None:
        """Add up the spans whose end has passed, oldest first, and free their marks."""
        while len(self._marks) > 1 and self._marks[1][0].query():
            start, name = self._marks.popleft()
            if name is not None:
                self._milliseconds[name] += start.elapsed_time(self._marks[0][0])
            self._unused.append(start)
