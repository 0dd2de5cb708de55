"""The stop flag: what a request to end early does to the code that runs when it comes.

`launch/signals.py` raises it from signals. What then happens is the running code's choice:

- as a rule the main thread gets a `Stopped` where it stands, and unwinds; files that were begun are removed;
- inside `ending()` there is nothing to lose, so the process also ends where it hears nothing (it waits for a
  rank that never comes, say);
- inside `interruptible()` Ctrl-C is Python's own KeyboardInterrupt, each time, and no request: a conversation
  ends a reply by it, and goes on;
- inside `finishing()` nothing happens: the code polls `requested`, agrees on it over all ranks (signals
  arrive at different steps on different ranks), saves, and returns.

It is a value that travels through the door, so no layer below `launch` knows about signals.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Literal

from tide_megatron.base.errors import causes

Answer = Literal["unwind", "end", "finish"]


class Stopped(KeyboardInterrupt):
    """Somebody asked for an early end, and what ran had nothing that would have to be saved."""


def is_stop(error: BaseException) -> bool:
    """Whether an exception only says that the process was asked to end."""
    return any(isinstance(link, Stopped) for link in causes(error))


def end_with_parent(end: Callable[[], None]) -> None:
    """Watch, in a thread, for the end of the process that started this one, however it went.

    Args:
        end: ends this one then.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called by what multiprocessing has started"

    def wait() -> None:
        parent.join()
        end()

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()


class StopFlag:
    """Whether somebody asked this process to finish early, who, and what that does."""

    def __init__(self) -> None:
        """Start with no request."""
        self.reason: str | None = None
        self.ends_at: float | None = None
        """When the job ends that this process is a part of, by `time.monotonic`; None: nobody says."""
        self.answer: Answer = "unwind"
        self.promise = "ending here, nothing has to be saved"
        """What the log says will happen."""
        self.is_interruptible = False
        """Whether SIGINT ends only what the main thread is at."""
        self.farewells: list[Callable[[], None]] = []
        """What a process that ends without unwinding still does: it gives up what keeps others out."""

    @property
    def requested(self) -> bool:
        """Whether the loop should save and return after the step it is in."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for an early end; the first reason stays."""
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Have a request end the process, also where it hears nothing; for a block with nothing to lose."""
        before, self.answer = self.answer, "end"
        yield
        self.answer = before  # after an error it stays: what unwinds has nothing to lose either

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Have SIGINT raise a plain KeyboardInterrupt, as often as it comes; other requests stay requests."""
        before, self.is_interruptible = self.is_interruptible, True
        try:
            yield
        finally:
            self.is_interruptible = before

    @contextlib.contextmanager
    def finishing(self, promise: str, *, is_last: bool = False) -> Iterator[None]:
        """Have a request only raise the flag, for a block that polls it.

        Args:
            promise: what the block does about a request, for the log.
            is_last: what follows the block has only to return what it made. The answer stays, then: a rank
                whose peers told it of a request in the block may hear the same one itself behind it.
        """
        before = self.answer, self.promise
        self.answer, self.promise = "finish", promise
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            if not (is_whole and is_last):
                self.answer, self.promise = before
