"""Where each sample is from: record, file and the record's own word, spooled to disk and resolved at the end.

Whether there are several sources, and how they are called, is known only when all records were read: what the
record's `source` says counts, else its file; more words than `MOST` name no sources (they are addresses), and
the files do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tide_megatron.base.unfinished import GrowingFile
from tide_megatron.data.columns import numbered, pieces_of

logger = logging.getLogger(__name__)
MOST = 1000
ORIGINS_FILE = "origins.bin"
ORIGIN: numpy.dtype[Any] = numpy.dtype([("record", "<i8"), ("file", "<i4"), ("word", "<i4")])
"""Of one sample: the number of its record among all, of its file, and of its word."""


class Origins:
    """The origins of the samples of one preparation.

    Args:
        folder: of the spooled file.
        words: of the records, as far as they are known; their places are their numbers.
        known: facts of the file that a commit saw; None: it begins empty.
    """

    def __init__(
        self, folder: Path, words: Sequence[str | None] = (), known: Sequence[Any] | None = None
    ) -> None:
        self._file = GrowingFile(folder / ORIGINS_FILE, known)
        self._words = {word: number for number, word in enumerate(words)}

    @property
    def words(self) -> list[str | None]:
        """The words so far."""
        return list(self._words)

    def add(self, record: int, file: int, word: str | None) -> None:
        """Append one sample."""
        number = self.number_of(word)
        self._file.write(
            record.to_bytes(8, "little") + file.to_bytes(4, "little") + number.to_bytes(4, "little")
        )

    def number_of(self, word: str | None) -> int:
        """Return the number of a word, which may be a new one."""
        if len(self._words) <= MOST:
            self._words.setdefault(word, len(self._words))
        return self._words.get(word, 0)

    def extend(self, origins: NDArray[Any], words: Mapping[int, int]) -> None:
        """Append samples of another list.

        Args:
            origins: [samples] of ORIGIN.
            words: number there -> number here.
        """
        moved = origins.copy()
        for number in numpy.unique(origins["word"]):
            moved["word"][origins["word"] == number] = words[int(number)]
        self._file.write(moved.tobytes())

    def sync(self) -> dict[str, tuple[int, str]]:
        """Wait until all is on the disk; return the facts of the file by its name."""
        return {ORIGINS_FILE: self._file.sync()}

    def close(self) -> None:
        """Hand what was written to the system."""
        self._file.close()

    def abandon(self) -> None:
        """Write no more."""
        self._file.abandon()

    def resolved(self, files: Sequence[str]) -> tuple[list[str], Iterator[NDArray[numpy.int32]]]:
        """Return the names of the sources, and every sample's number among them, in pieces.

        Args:
            files: names of the source files.

        Returns:
            No names: all samples are of one source that no record names.
        """
        self.close()
        files = numbered(files)
        is_said = len(self._words) <= MOST
        if not is_said:
            logger.warning(
                "more than %d different words in the records' `source`: the files count as the sources", MOST
            )
        words = self.words if is_said else []
        numbers: dict[str, int] = {}
        table: dict[int, int] = {}
        """Of file and word together -> the source's number."""
        for piece in self._pairs():
            found, first = numpy.unique(piece, return_index=True)
            for pair in found[numpy.argsort(first)].tolist():
                if pair not in table:
                    word = words[pair & 0xFFFFFFFF] if words else None
                    name = word or files[pair >> 32]
                    table[pair] = numbers.setdefault(name, len(numbers))
        if len(numbers) < 2 and not any(words):
            return [], iter(())
        return list(numbers), self._column(table)

    def _pairs(self) -> Iterator[NDArray[numpy.int64]]:
        for piece in pieces_of(self._file.path, ORIGIN):
            yield (piece["file"].astype(numpy.int64) << 32) | piece["word"]

    def _column(self, table: Mapping[int, int]) -> Iterator[NDArray[numpy.int32]]:
        for piece in self._pairs():
            found, where = numpy.unique(piece, return_inverse=True)
            yield numpy.array([table[pair] for pair in found.tolist()], dtype=numpy.int32)[where]
