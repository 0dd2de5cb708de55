"""From signals to the `StopFlag` that loops poll.

One Ctrl-C (SIGINT), `kill` (SIGTERM), SLURM warning (SIGUSR1) or lost terminal (SIGHUP) asks for a clean end;
a second one ends the process at once. Launchers often deliver one request twice (a terminal signals the whole
foreground group, then torchrun forwards the signal again), so within two seconds of the first request every
further signal is an echo of it.

Python hears a signal only between two of its own instructions, so a process that stands in a library's call
(a CUDA synchronisation, a store that waits for a rank) would be deaf. A second thread listens too, by the
interpreter's wake-up descriptor, and ends the process at the second request when nothing else has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from tide_megatron.base.stop import StopFlag

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What asks a run to save and finish."""

ECHO_SECONDS = 2.0
"""Signals this soon after the first belong to the same request."""
DEAF_SECONDS = 1.0
"""So long may the main thread take to end at the second request by itself."""


@contextlib.contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Give a `StopFlag` that stop signals raise while the block runs; handlers are put back afterwards.

    Outside the main thread Python cannot hear signals; the flag is then never raised.
    """
    stop = StopFlag()
    first_heard = 0.0

    def hear(number: int) -> None:
        nonlocal first_heard
        if not stop.requested:
            first_heard = time.monotonic()
            stop.request(signal.Signals(number).name)
        elif time.monotonic() - first_heard > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with heard_by(hear) as can_hear, _heard_in_libraries() if can_hear else contextlib.nullcontext():
        yield stop


@contextlib.contextmanager
def _heard_in_libraries() -> Iterator[None]:
    """End this process at the second request while the main thread, which calls this, hears nothing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # and with it the thread ends


def _end_at_the_second(reader: int) -> None:
    """Read the numbers of signals as they come; end the process at the second request."""
    first_heard: float | None = None
    while number := os.read(reader, 1):
        if number[0] not in STOP_SIGNALS:
            continue
        if first_heard is None:
            first_heard = time.monotonic()
        elif time.monotonic() - first_heard > ECHO_SECONDS:
            time.sleep(DEAF_SECONDS)  # the main thread ends by the signal itself, if it hears it
            os._exit(128 + number[0])
    os.close(reader)


@contextlib.contextmanager
def heard_by(hear: Callable[[int], None]) -> Iterator[bool]:
    """Call `hear(signal number)` for every stop signal while the block runs; say whether any can be heard.

    A SIGHUP that is ignored (nohup) stays ignored. Python hears signals in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield False
        return

    def handler(number: int, frame: FrameType | None) -> None:
        hear(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if not (number == signal.SIGHUP and before[number] == signal.SIG_IGN):
            signal.signal(number, handler)
    try:
        yield True
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep stop signals from this thread while the block runs; processes started inside inherit the hold.

    So a Ctrl-C during start-up neither prints a traceback from a half-imported rank nor gets lost. Threads
    that libraries started in this process may still take one; whoever starts ranks passes on what came
    meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """Let pending stop signals through: a started rank calls this once its handlers stand."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
