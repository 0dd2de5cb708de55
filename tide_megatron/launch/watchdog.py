"""Ranks that stand still: noticed by their launcher, with what each of them was doing.

Every rank shows which phase of a step it is in since when (`base.heartbeat`). When one has shown nothing new
for too long, all ranks write their Python stacks, which works in a rank whose interpreter waits in a
collective, and the one that the others seem to wait for is named. A rank that was stopped by a
signal, or waits for a disk, cannot write; its state as the kernel sees it is told instead.

A rank that srun or torchrun started has no launcher: a thread of its own looks (`watching_itself`). It sees
nothing of the others, and is deaf where C code holds the interpreter; then the others notice that they wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tide_megatron.base.deadlines import NO_DEADLINES, Deadlines
from tide_megatron.base.heartbeat import HEARTBEAT, Pulse
from tide_megatron.base.phases import PHASES
from tide_megatron.launch.flight_recorder import ANSWER_SECONDS, pending_collective
from tide_megatron.launch.signals import LOST_CODE

log = logging.getLogger(__name__)

STACKS_SIGNAL = signal.SIGQUIT
"""At it a rank writes the stacks of its threads."""
STACKS_SECONDS = 2.0
"""How long the ranks may take to."""
EVERY_SECONDS = 1.0
DEAF_SECONDS = 3 * ANSWER_SECONDS
"""A rank that ends itself has this long for its last words."""
ASKED_SECONDS = 0.5
"""So often a rank looks whether it is asked what it waits in."""
JUMP_SECONDS = 10.0
"""A time of day that moves by more than this against the monotonic clock is told."""
_LINES, _MOST_TOLD = 12, 8
_COLLECTIVE = "distributed_c10d.py"
"""The file that a rank is in while it waits for others."""
_QUOTE = '"'
_STATES = {
    "T": "stopped by a signal",
    "t": "held by a debugger",
    "D": "waiting for a disk or a device",
    "R": "running",
    "S": "waiting",
}


@dataclasses.dataclass(frozen=True)
class Life:
    """What a rank is given to show that it lives."""

    pulse: Any
    """A shared `Pulse`."""
    stacks: str
    """The file for its stacks; empty: none."""


class Watched(Protocol):
    """A rank as the watchdog needs it."""

    number: int
    life: Life

    @property
    def pid(self) -> int:
        """Its process."""


class Watchdog:
    """Watches the ranks of one launcher; a context manager, for the folder of stacks."""

    def __init__(self, hang_seconds: float | None, deadlines: Deadlines = NO_DEADLINES) -> None:
        """Watch for ranks that do nothing for so long, in some phases for another time; None: do not."""
        self._hang_seconds, self._deadlines = hang_seconds, deadlines
        self._folder: Path | None = None
        self._next = 0.0
        self._is_kept = False
        self._ahead = time.time() - time.monotonic()

    def __enter__(self) -> Watchdog:
        """Make the folder."""
        if self._hang_seconds is not None:
            self._folder = Path(tempfile.mkdtemp(prefix="tide-ranks-"))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder, unless it tells of a hang."""
        if self._folder is not None and not self._is_kept:
            shutil.rmtree(self._folder, ignore_errors=True)

    def life(self, context: Any, number: int) -> Life:
        """Return what a rank is started with."""
        stacks = "" if self._folder is None else str(self._folder / f"rank-{number}.txt")
        return Life(pulse=context.RawValue(Pulse), stacks=stacks)

    def look(self, ranks: Sequence[Watched]) -> tuple[int, str] | None:
        """Return the rank that stands still and what is known of all; None: all is well.

        Args:
            ranks: those that have not ended.
        """
        now = time.monotonic()
        if self._hang_seconds is None or now < self._next:
            return None
        self._next = now + EVERY_SECONDS
        self._look_at_clock(now)
        limits = self._hang_seconds, self._deadlines
        seen = [_Sight.of(rank, now).held_against(*limits) for rank in ranks if rank.life.pulse.at]
        if not any(sight.limit for sight in seen):
            return None
        for rank in ranks:
            rank.life.pulse.is_asked = True
        return self._report(seen)

    def _look_at_clock(self, now: float) -> None:
        """Say when the time of day has jumped; nothing but the times in logs and records depends on it."""
        ahead = time.time() - now
        if abs(ahead - self._ahead) > JUMP_SECONDS:
            log.warning(
                "the clock of this machine jumped by %+.0f s: times in logs and records jump with it; the "
                "run is timed by another clock and goes on",
                ahead - self._ahead,
            )
        self._ahead = ahead

    def _report(self, seen: Sequence[_Sight]) -> tuple[int, str]:
        """Let all ranks write their stacks, and say which stands still, and what the others wait in."""
        self._is_kept = True
        for sight in seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sight.pid, STACKS_SIGNAL)
        time.sleep(STACKS_SECONDS)
        stacks = {sight.number: _stack(sight) for sight in seen}
        seen = [
            dataclasses.replace(sight, collective=_collective(sight, stacks[sight.number])) for sight in seen
        ]
        first = min(seen, key=lambda sight: sight.blame(stacks[sight.number]))
        others = [sight for sight in seen if sight is not first]
        lines = [f"it stands still: {first.told(stacks[first.number])}", *stacks[first.number][:_LINES]]
        lines += [f"rank {one.number}: {one.told(stacks[one.number])}" for one in others[:_MOST_TOLD]]
        if len(others) > _MOST_TOLD:
            lines.append(f"and {len(others) - _MOST_TOLD} more ranks")
        lines.append(f"stacks of all ranks of this node: {self._folder}")
        return first.number, "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sight:
    """A rank at the moment when it was looked at."""

    number: int
    pid: int
    stacks: str
    seconds: float
    """Since its last sign of life."""
    updates: int
    phase: str
    state: str
    """Of its process, the kernel's letter."""
    limit: str = ""
    """That it has passed, in words; empty: none."""
    collective: str = ""
    """That it waits in, as far as is known."""

    @staticmethod
    def of(rank: Watched, now: float) -> _Sight:
        """Look at a rank."""
        return _Sight.at(rank.life.pulse, rank.number, rank.pid, rank.life.stacks, now)

    @staticmethod
    def at(pulse: Any, number: int, pid: int, stacks: str, now: float) -> _Sight:
        """Look at what a rank shows."""
        return _Sight(
            number=number,
            pid=pid,
            stacks=stacks,
            seconds=now - pulse.at,
            updates=pulse.updates,
            phase=pulse.phase.decode(),
            state=_state(pid),
        )

    def held_against(self, hang_seconds: float, deadlines: Deadlines) -> _Sight:
        """Return it with the limit that it has passed, if it has shown nothing new for longer than it may."""
        limit, key = deadlines.limit(self.phase, hang_seconds, is_first_update=not self.updates)
        return dataclasses.replace(self, limit=f" (limit {limit:g} s: {key})" * (self.seconds > limit))

    def blame(self, stack: Sequence[str]) -> tuple[Any, ...]:
        """Return what orders ranks: first the one that the others wait for, as far as can be told.

        One that the kernel holds, or that cannot even write its stack; else one that is in no collective;
        else the one that is furthest behind.
        """
        order = PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)
        return bool(stack) and self.state not in "TtD", _waits(stack), self.updates, order, -self.seconds

    def told(self, stack: Sequence[str]) -> str:
        """Say what it is at."""
        waits = f", waits for {self.collective}" if self.collective else ""
        return (
            f"for {self.seconds:.0f} s nothing new in {self.phase or 'the time between phases'}{self.limit} "
            f"after {self.updates} updates, pid {self.pid} {_STATES.get(self.state, 'ended')}, in "
            f"{_innermost(stack) or 'code that wrote no stack'}{waits}"
        )


def answer_when_asked(life: Life) -> None:
    """Write down the collective that this rank waits in once its launcher asks; a thread's work.

    It needs the interpreter, which code that waits for other ranks lets go.
    """
    while not life.pulse.is_asked:
        time.sleep(ASKED_SECONDS)
    with contextlib.suppress(OSError):
        _collective_file(life.stacks).write_text(pending_collective(), encoding="utf-8")


@contextlib.contextmanager
def watching_itself(
    number: int, hang_seconds: float | None, deadlines: Deadlines = NO_DEADLINES
) -> Iterator[None]:
    """End this rank, which has no launcher, when it stands still while the block runs; its stacks are told.

    Args:
        number: of the rank.
        hang_seconds: so long may it show nothing new; None: nobody looks.
        deadlines: of phases in which it may do so for another time.
    """
    if hang_seconds is None:
        yield
        return
    pulse, is_over = Pulse(), threading.Event()

    def look() -> None:
        while not is_over.wait(EVERY_SECONDS):
            sight = _Sight.at(pulse, number, os.getpid(), "", time.monotonic())
            sight = sight.held_against(hang_seconds, deadlines)
            if pulse.at and sight.limit:
                _end_itself(sight)

    HEARTBEAT.show(pulse)
    threading.Thread(target=look, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        HEARTBEAT.show(None)


def _end_itself(sight: _Sight) -> None:
    """Tell what this process is at, and end it where it stands."""
    # Should what is asked below hold the interpreter, C code ends this process, with its stacks and code 1.
    faulthandler.dump_traceback_later(DEAF_SECONDS, exit=True)
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = reversed(traceback.extract_stack(frame))
    stack = [f'File "{call.filename}", line {call.lineno} in {call.name}' for call in calls]
    log.error("rank %d stands still or waits for one that does: %s", sight.number, sight.told(stack))
    if collective := pending_collective():
        log.error("rank %d waits for %s", sight.number, collective)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(LOST_CODE if HEARTBEAT.has_saved else 1)


def _state(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _collective_file(stacks: str) -> Path:
    return Path(stacks).with_suffix(".collective")


def _collective(sight: _Sight, stack: Sequence[str]) -> str:
    try:
        return _collective_file(sight.stacks).read_text(encoding="utf-8")
    except OSError:
        return "what its flight recorder did not tell in time" * _waits(stack)


def _stack(sight: _Sight) -> list[str]:
    """Return the calls of a rank's main thread, the innermost first, as faulthandler writes them."""
    try:
        text = Path(sight.stacks).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = [block.splitlines() for block in text.split("\n\n") if block.strip()]
    # faulthandler writes the main thread last.
    return [line for line in blocks[-1][1:] if line.strip()] if blocks else []


def _waits(stack: Sequence[str]) -> bool:
    """Say whether a rank waits for others."""
    return any(_COLLECTIVE in line for line in stack)


def _innermost(stack: Sequence[str]) -> str:
    """Return the innermost call of ours, as file, function and line."""
    for line in stack:
        file, _, name = line.strip().removeprefix("File ").partition(", line ")
        if "tide_megatron" in file:
            number, _, function = name.partition(" in ")
            return f"{Path(file.strip(_QUOTE)).name}, {function} (line {number})"
    return ""
