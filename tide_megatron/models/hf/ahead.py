"""Brings files into the memory of a node before they are used: large reads, shared out over its ranks.

A mapped file comes page by page when it is touched, 128 KiB at a time on most file systems, and each of these
reads is waited for. That is little of what a file server could give. Here threads read what a rank will need
in pieces of some MiB, several at once, a bounded way ahead of whoever uses it, and throw it away: the kernel
keeps it, once for all ranks of the node.

Ranks say nothing to each other. Each begins with the pieces that are its share by their place in the file and
goes on with the others, unless another rank has brought them meanwhile. So ranks that need the same file each
read another part of it, ranks that need different parts read only these, and a slow one is helped. A file may
be larger than memory: only what is used next must fit.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PIECE_BYTES = 2**22
"""Read at once; pieces end at its multiples, so that all ranks cut a file alike."""
WINDOW_BYTES = 2**26
"""About so much is read in any order while the window before it is used."""
NODE_READS = 16
"""Reads under way at once on a node, over all of its ranks."""


class Span(NamedTuple):
    """Bytes [begin, end) of a file."""

    path: Path
    begin: int
    end: int


class ReadAhead:
    """Reads the spans of a row of uses; a context manager, because it has threads and open files."""

    def __init__(
        self, uses: Iterable[Sequence[Span]], share: tuple[int, int], window_bytes: int = WINDOW_BYTES
    ) -> None:
        """Begin to read.

        Args:
            uses: the spans of each use, in the order in which `await_next` is called for them.
            share: (this rank, ranks) of those of this node.
            window_bytes: see `WINDOW_BYTES`.
        """
        self.bytes_read = 0
        """Read here, because no rank of the node had done it yet."""
        self._rank, self._ranks = share
        self._windows, self._window_of = _windows(uses, window_bytes)
        self._are_there = [threading.Event() for _ in self._windows]
        self._used = 0
        self._fault: OSError | None = None
        self._is_ended = False
        self._allowed = threading.Semaphore(2)  # the window that is used, and the next one
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ended = True
        self._allowed.release()
        self._thread.join()

    def await_next(self) -> None:
        """Wait until the spans of the next use are in memory.

        Raises:
            OSError: the disk refuses one of them, or one of those before.
        """
        window = self._window_of[self._used]
        if self._used and window != self._window_of[self._used - 1]:
            self._allowed.release()
        self._used += 1
        self._are_there[window].wait()
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        """Bring window after window."""
        threads = max(1, NODE_READS // self._ranks)
        rooms: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(threads):
            rooms.put(bytearray(PIECE_BYTES))
        try:
            with _opened(self._windows) as handles, ThreadPoolExecutor(threads, "read-ahead") as pool:
                for window, is_there in zip(self._windows, self._are_there, strict=True):
                    self._allowed.acquire()
                    if self._is_ended:
                        return
                    pieces = self._in_turn(window)
                    self.bytes_read += sum(
                        pool.map(lambda piece: self._bring(piece, handles[piece.path], rooms), pieces)
                    )
                    is_there.set()
        except OSError as fault:
            self._fault = fault
        finally:
            for is_there in self._are_there:
                is_there.set()

    def _in_turn(self, window: Sequence[Span]) -> list[Span]:
        """Cut spans into pieces: this rank's share of them first, then the next rank's."""
        pieces = [piece for span in window for piece in _pieces(span)]
        return sorted(pieces, key=lambda piece: (piece.begin // PIECE_BYTES - self._rank) % self._ranks)

    def _bring(self, piece: Span, handle: int, rooms: queue.SimpleQueue[bytearray]) -> int:
        """Read a piece; not if its ends are in memory, for then another rank has brought it."""
        if self._is_ended or (_is_there(handle, piece.begin) and _is_there(handle, piece.end - 1)):
            return 0
        room, place = rooms.get(), piece.begin
        try:
            with memoryview(room) as view:
                while place < piece.end and (got := os.preadv(handle, [view[: piece.end - place]], place)):
                    place += got
        except OSError as fault:
            raise OSError(fault.errno, fault.strerror, str(piece.path)) from None
        finally:
            rooms.put(room)
        return place - piece.begin


def _windows(uses: Iterable[Sequence[Span]], size: int) -> tuple[list[list[Span]], list[int]]:
    """Join uses until they have about so many bytes; return the windows, and the window of each use."""
    windows: list[list[Span]] = [[]]
    window_of, filled = [], 0
    for spans in uses:
        if filled >= size:
            windows.append([])
            filled = 0
        window_of.append(len(windows) - 1)
        windows[-1] += spans
        filled += sum(span.end - span.begin for span in spans)
    return [_joined(window) for window in windows], window_of


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Sort spans, and join those that touch."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and joined[-1].path == span.path and span.begin <= joined[-1].end:
            joined[-1] = span._replace(begin=joined[-1].begin, end=max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined


def _pieces(span: Span) -> Iterator[Span]:
    """Cut a span at the multiples of `PIECE_BYTES`."""
    begin = span.begin
    while begin < span.end:
        end = min(span.end, (begin // PIECE_BYTES + 1) * PIECE_BYTES)
        yield span._replace(begin=begin, end=end)
        begin = end


@contextlib.contextmanager
def _opened(windows: Iterable[Sequence[Span]]) -> Iterator[dict[Path, int]]:
    """Hold the files of all spans open."""
    with contextlib.ExitStack() as stack:
        handles: dict[Path, int] = {}
        for path in sorted({span.path for window in windows for span in window}):
            handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, handles[path])
        yield handles


def _is_there(handle: int, place: int) -> bool:
    """Say whether a byte of a file is in memory; where the file system cannot say, it is read again."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(handle, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except OSError:
        return False
