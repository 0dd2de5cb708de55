"""From signals to the `StopFlag` that running code answers.

One Ctrl-C (SIGINT), `kill` (SIGTERM), SLURM warning (SIGUSR1) or lost terminal (SIGHUP) asks for a clean end,
and the log says so within a second; a second one ends the process at once.

Python calls a signal's handler in the main thread, between two of its own instructions, so a process that
stands in a library's call (a store or a collective that waits for a rank) would be deaf. A thread therefore
hears every signal by the interpreter's wake-up descriptor: it raises the flag, speaks, and ends the process
where the main thread cannot. The handler in the main thread only unwinds what may be unwound.

In a job of SLURM's only a second Ctrl-C ends anything at once: SLURM warns, terminates and preempts with
several signals, and ends what it means to end with SIGKILL.

Wrappers deliver one request twice (`timeout` signals its child and then the group; torchrun's agent passes on
what its ranks got already), so signals shortly after the first belong to it. That agent dies of a second
signal, and of SIGUSR1, and leaves its ranks behind: they take its end for a request.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from tide_megatron.base.stop import StopFlag, Stopped

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What asks a run to save and finish."""
LEAVE_SIGNAL = signal.SIGUSR2
"""What our launcher sends a rank before it kills it: give up what keeps others out, and end."""
STOPPED_CODE, LOST_CODE = 75, 70
"""Exit code of a run that was asked to stop and did so in order (EX_TEMPFAIL: the same command goes on)."""

ECHO_SECONDS = 0.25
"""Signals this soon after the first belong to the same request."""
AGENT_ECHO_SECONDS = 1.0
"""The same for ranks of torchrun, whose agent passes signals on."""
DEAF_SECONDS = 2.0
"""So long may the main thread take to unwind where it is to."""
SAY_SECONDS = 0.5
"""So long may the last words take."""
_AGENT, _AGENT_LOOKS_SECONDS = "TORCHELASTIC_RUN_ID", 0.5

_watches: list[_Watch] = []
"""The one of this process, while there is one."""


def stopped_code() -> int:
    """Return the exit code of a run that stopped in order: 0 under torchrun, which fails on any other."""
    return 0 if _AGENT in os.environ else STOPPED_CODE


@contextlib.contextmanager
def watch_signals(*, is_supervised: bool = False) -> Iterator[StopFlag]:
    """Give a `StopFlag` that stop signals raise while the block runs; handlers are put back afterwards.

    Inside another watch it is that one's flag. Outside the main thread Python cannot hear signals; the flag
    is then never raised.

    Args:
        is_supervised: whether a supervisor speaks for this process and ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()
        return
    if _watches:
        yield _watches[0].stop
        return
    watch = _Watch(is_supervised=is_supervised)
    _watches.append(watch)
    try:
        with watch.listening():
            yield watch.stop
    finally:
        _watches.clear()


@contextlib.contextmanager
def relayed_to(first: Callable[[int], None], second: Callable[[], None]) -> Iterator[None]:
    """Call functions for requests while the block runs, from the watching thread; the main thread goes on.

    Args:
        first: gets the signal's number; called again where the request came before the block.
        second: after it the main thread has `DEAF_SECONDS` to end the process.
    """
    if not _watches:
        yield
        return
    watch = _watches[0]
    with watch.stop.finishing("the ranks end, and save first what they have trained"):
        watch.relay = (first, second)
        if watch.first_number is not None:
            first(watch.first_number)
        try:
            yield
        finally:
            watch.relay = None


class _Watch:
    """One process's ear: its handlers, its thread, and what was heard."""

    def __init__(self, *, is_supervised: bool) -> None:
        self.stop = StopFlag()
        self.relay: tuple[Callable[[int], None], Callable[[], None]] | None = None
        self.first_number: int | None = None
        self.first_seconds = 0.0
        self.is_supervised = is_supervised
        self._agent = os.getppid() if _AGENT in os.environ and not is_supervised else None
        self._echo_seconds = ECHO_SECONDS if self._agent is None else AGENT_ECHO_SECONDS
        self._has_said = threading.Event()
        self._is_over = threading.Event()
        self._has_unwound = False
        self._is_job = "SLURM_JOB_ID" in os.environ

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Set handlers, descriptor and thread; put all back. A SIGHUP that is ignored (nohup) stays so."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        thread.start()
        for number in STOP_SIGNALS:
            if not (number == signal.SIGHUP and handlers[number] == signal.SIG_IGN):
                signal.signal(number, self._unwind)
        if self.is_supervised:
            handlers[LEAVE_SIGNAL] = signal.signal(
                LEAVE_SIGNAL, lambda number, frame: None
            )  # the thread hears it
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            self._is_over.set()
            os.close(writer)  # and with it the thread ends

    def _unwind(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: unwind at the first one, where that is the answer."""
        if self._is_interrupt(number):
            raise KeyboardInterrupt
        self.stop.request(signal.Signals(number).name)
        if not self._has_unwound and self.stop.answer != "finish":
            self._has_unwound = True
            raise Stopped(f"stopped by {self.stop.reason}")

    def _listen(self, reader: int) -> None:
        """Read the numbers of signals as they come, until the other end is closed."""
        while True:
            pause = None if self._agent is None else _AGENT_LOOKS_SECONDS
            if not select.select([reader], [], [], pause)[0]:
                self._look_for_agent()
                continue
            numbers = os.read(reader, 64)
            for number in numbers:
                if number == LEAVE_SIGNAL:
                    self._take_leave()
                    os._exit(128 + number)
                if number in STOP_SIGNALS:
                    self._hear(signal.Signals(number))
            if not numbers:
                os.close(reader)
                return

    def _look_for_agent(self) -> None:
        """Take the end of torchrun's agent for a request, the second one if there was a first."""
        if os.getppid() == self._agent:
            return
        self._agent = None
        log.warning("torchrun's agent has ended and left this rank behind")
        if self.first_number is None:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._end(signal.SIGTERM)

    def _is_interrupt(self, number: int) -> bool:
        return number == signal.SIGINT and self.stop.is_interruptible

    def _hear(self, number: signal.Signals) -> None:
        if self._is_interrupt(number):
            return
        if self.first_number is None:
            self.first_number, self.first_seconds = number, time.monotonic()
            self.stop.request(number.name)
            relay, answer = self.relay, self.stop.answer
            ending = "Ctrl-C" if self._is_job else "a second one"
            self._say(f"{number.name} heard: {self.stop.promise}; {ending} ends at once")
            if relay is not None:
                relay[0](number)
            elif answer == "end":
                threading.Thread(target=self._end_if_deaf, name="stop", daemon=True).start()
        elif self._is_job and number != signal.SIGINT:
            return
        elif time.monotonic() - self.first_seconds > self._echo_seconds and not self.is_supervised:
            self._say(f"{number.name} heard again: ending at once")
            self._end(number)

    def _end(self, number: signal.Signals) -> None:
        """End this process, and what it supervises."""
        if self.relay is not None:
            self.relay[1]()
            self._is_over.wait(DEAF_SECONDS)  # the main thread ends in order, if it can
        self.finish_saying()
        if not self._is_over.is_set():
            self._take_leave()
            os._exit(128 + number)

    def _end_if_deaf(self) -> None:
        """End this process in a moment, unless the main thread has unwound or took the request over."""
        if not self._is_over.wait(DEAF_SECONDS) and self.stop.answer == "end":
            self._take_leave()
            os._exit(STOPPED_CODE if self.is_supervised else stopped_code())

    def _take_leave(self) -> None:
        """Say farewell for what will not unwind, for a moment: a disk may be what it waits for."""

        def say_all() -> None:
            for farewell in list(self.stop.farewells):
                with contextlib.suppress(Exception):
                    farewell()

        thread = threading.Thread(target=say_all, name="farewell", daemon=True)
        thread.start()
        thread.join(SAY_SECONDS)

    def _say(self, words: str) -> None:
        """Log from a thread of its own: a terminal that takes nothing must not make this process deaf."""

        def say() -> None:
            log.warning("%s", words)
            self._has_said.set()

        self._has_said.clear()
        if not self.is_supervised:
            threading.Thread(target=say, name="say", daemon=True).start()

    def finish_saying(self) -> None:
        """Give the last words a moment."""
        if self.stop.requested and not self.is_supervised:
            self._has_said.wait(SAY_SECONDS)


def _forget() -> None:
    """Leave a forked child without the ear of its parent: its signals are not requests of the run's.

    Ctrl-C of a terminal reaches it too, and would end what a run still needs to save.
    """
    if not _watches:
        return
    _watches.clear()
    with contextlib.suppress(ValueError):  # forked from another thread
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep stop signals from this thread while the block runs; processes started inside inherit the hold.

    So a Ctrl-C during start-up neither prints a traceback from a half-imported rank nor gets lost. The
    watching thread hears it meanwhile; whoever starts ranks passes on what came.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """Let pending stop signals through: a started rank calls this once its handlers stand."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def leave(code: int) -> None:
    """End this process after its last words, without waiting for threads and ranks that may be stuck."""
    for watch in _watches:
        watch.finish_saying()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
