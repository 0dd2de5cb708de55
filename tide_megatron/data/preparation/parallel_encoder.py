"""Records encoded in several processes, and handed on in the order in which they stand in their source.

What becomes of a record depends on that record alone, so any number of processes writes the same bytes. The
first records are encoded here: small data needs no process to be started. Later ones go to workers, and to
this process, too, while they start and whenever they have enough to do. All are encoded in pieces, which is
faster than one by one, and few pieces are under way, so that memory does not grow with the input. A
tokenizer's library starts no threads: its processes share the cores already. A worker imports neither torch
nor megatron-core, nor the script that called, which may have no guard or be stdin. It hears no Ctrl-C (the
parent does, and stops it), and ends when its parent is gone.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from tide_megatron.base.errors import DataError, RecordError
from tide_megatron.base.stop import end_with_parent
from tide_megatron.data.preparation.sample import Encoder, Outcome
from tide_megatron.data.sources.record import ChatRecord, parse_record

ALONE = 1000
"""So many records are encoded before workers are started: about a second."""
PIECE = 100
"""So many records travel together at most,"""
PIECE_BYTES = 2**20
"""and no more once they have so many bytes: long ones fill no memory by their number."""
PIECES_AHEAD = 2
"""Pieces that a worker has before it; what comes meanwhile is encoded here."""
PIECES_KEPT = 8
"""Pieces a process, done or not, that wait for one before them: a bound of memory."""

Encoding = tuple[Outcome, str | None]
"""What becomes of a record, and what it calls its source."""
_Piece = tuple[Sequence[int], Future[list[Encoding]]]
"""Numbers of lines, and what comes of them."""

_ENCODER: list[Encoder] = []
"""A worker's."""


def encode_lines(lines: Sequence[bytes], encoder: Encoder) -> list[Encoding]:
    """Encode lines of JSON.

    Raises:
        DataError: no record can be encoded.
    """
    read: list[ChatRecord | RecordError] = []
    for line in lines:
        try:
            read.append(parse_record(line, encoder.reading))
        except RecordError as fault:
            read.append(fault)
    found = iter(encoder.encode_all([one for one in read if not isinstance(one, RecordError)]))
    return [(one, None) if isinstance(one, RecordError) else _named(next(found), one) for one in read]


def _named(outcome: Outcome, record: ChatRecord) -> Encoding:
    return outcome, None if isinstance(outcome, RecordError) else record.source


class EncoderKilled(DataError):
    """A process that encoded was killed; nothing is known against the records."""


class ParallelEncoder:
    """Encodes the lines of one preparation; a context manager, which ends the processes."""

    def __init__(self, encoder: Encoder, *, number: int) -> None:
        """Start with no process.

        Args:
            encoder: what every process does.
            number: processes, this one among them; with 1 all is done here.
        """
        self._encoder, self._number = encoder, number
        self._alone = ALONE
        self._pool: ProcessPoolExecutor | None = None
        self._settings = contextlib.ExitStack()

    def __enter__(self) -> ParallelEncoder:
        from tide_megatron.base.device import no_tokenizer_threads  # torch, which workers do without

        self._settings.enter_context(no_tokenizer_threads())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, after an error behind the pieces that they are at.

        That is waited for: a command that was stopped exits at once, and would leave their semaphores behind.
        """
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._settings.close()

    def encode(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Encoding]]:
        """Yield (number, outcome) for (number, line), in the same order.

        Raises:
            DataError: no record can be encoded.
            EncoderKilled: a process was killed.
        """
        waiting: collections.deque[_Piece] = collections.deque()
        remaining = iter(lines)
        while piece := _next_piece(remaining):
            numbers, texts = zip(*piece, strict=True)
            with _alive(numbers):
                waiting.append((numbers, self._begun(texts, waiting)))
            while waiting and (len(waiting) > PIECES_KEPT * self._number or waiting[0][1].done()):
                yield from _taken(*waiting.popleft())
        while waiting:
            yield from _taken(*waiting.popleft())

    def _begun(self, texts: Sequence[bytes], waiting: Iterable[_Piece]) -> Future[list[Encoding]]:
        """Hand a piece to the workers, or encode it here while they have enough to do or are starting."""
        is_alone = self._number == 1 or self._alone > 0
        self._alone -= len(texts)
        ahead = PIECES_AHEAD * (self._number - 1)
        if is_alone or sum(not future.done() for _, future in waiting) >= ahead:
            here: Future[list[Encoding]] = Future()
            here.set_result(encode_lines(texts, self._encoder))
            return here
        with _starting():
            return self._started().submit(_encode_piece, texts)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._number - 1,
                multiprocessing.get_context("spawn"),  # a fork would copy what libraries hold in threads
                initializer=_begin,
                initargs=(self._encoder,),
            )
        return self._pool


def _next_piece(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Take the lines that travel together next; none: there are no more."""
    piece: list[tuple[int, bytes]] = []
    size = 0
    while len(piece) < PIECE and size < PIECE_BYTES and (line := next(lines, None)) is not None:
        piece.append(line)
        size += len(line[1])
    return piece


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Let processes that are started meanwhile run nothing of the calling script's, and hear no Ctrl-C.

    They would import the script, which may prepare data again; and die of Ctrl-C while they import, loudly.
    """
    main = sys.modules["__main__"]
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _taken(numbers: Sequence[int], future: Future[list[Encoding]]) -> Iterator[tuple[int, Encoding]]:
    with _alive(numbers):
        outcomes = future.result()
    return zip(numbers, outcomes, strict=True)


@contextlib.contextmanager
def _alive(numbers: Sequence[int]) -> Iterator[None]:
    """Say which lines are lost where a worker is no longer there."""
    try:
        yield
    except BrokenProcessPool:
        raise EncoderKilled(
            f"lines {numbers[0]} and later: a process that encoded them was killed (out of memory?): start "
            "again, with fewer processes (--workers)"
        ) from None


def _begin(encoder: Encoder) -> None:
    """Make this process a worker."""
    _ENCODER.append(encoder)
    end_with_parent(lambda: os._exit(1))


def _encode_piece(lines: Sequence[bytes]) -> list[Encoding]:
    [encoder] = _ENCODER
    return encode_lines(lines, encoder)
