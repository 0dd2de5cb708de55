"""Columns on disk: one megatron-core IndexedDataset (`.bin` + `.idx`, int32) per column, and a manifest.

A sample is one row of every column, and every column is ragged:

    ids          the tokens of the conversation, unpadded
    replies      half-open ranges of `ids` that may be masked, ascending, flat: start, end, start, end, ...
    reply_bytes  one number: UTF-8 bytes of the replies' texts
    cut          one number: 1 where `max_length` cut the conversation, so that no end follows; only in data
                 that was prepared with `on_long` = truncate
    source       one number: which of the manifest's `source_names` it is from (only where there are several)

and for every side, a teacher with its own tokenizer or template, under the side's name:

    NAME.ids      its tokens of the same conversation
    NAME.replies  as above, in these
    NAME.cut      as above
    NAME.chunks   aligned runs of the learnt replies, flat: student start, end, teacher start, end, ...

Labels are not stored: they follow from `ids` and `replies`, which also leaves room for several replies in a
conversation. Padding is not stored either; it depends on a run's block size and is the loader's.

Files are to the last byte those of megatron-core's IndexedDatasetBuilder, which keeps every length of every
column in Python lists until the end, half a kilobyte a sample. Here lengths go to a file beside the column
while it grows, from which its index is made a piece at a time; both can be cut back to where a commit saw
them. NAME.bin holds the values, int32. NAME.idx: magic, version (1), code of int32 (4), number of samples,
number of document bounds; then length (int32) and start in bytes (int64) of every sample, and the bounds
(int64; every sample is a document of its own).
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tide_megatron.base.errors import DataError
from tide_megatron.base.files import digest_of
from tide_megatron.base.unfinished import GrowingFile

SOURCE = "source"
"""The column that says which source a sample is from; `data.columns` lists the others."""
CUT_COLUMN = "cut"
SIDE_COLUMNS = ("ids", "replies", CUT_COLUMN, "chunks")
"""Of every side, behind its name and a dot."""
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION, _INT32 = b"MMIDIDX\x00\x00", 1, 4
_PIECE = 2**18
"""Samples, or bytes, that are in memory at a time."""


class ColumnWriter:
    """Writes columns row by row; `finish` makes their indices and digests all files.

    Args:
        folder: of the columns.
        names: of the columns.
        spool: folder of what is needed while they are written; it does not belong to the data.
        known: facts of every file, by its name, that a commit saw; none: it begins with no samples.

    Raises:
        DamagedWork: a file is not what a commit saw.
        OSError: the disk refuses.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], spool: Path, known: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._spool, known = folder, spool, known or {}
        self._names = list(names)
        self._values = {
            name: GrowingFile(folder / f"{name}.bin", known.get(f"{name}.bin")) for name in self._names
        }
        self._lengths = {
            name: GrowingFile(spool / f"{name}.lengths", known.get(f"{name}.lengths")) for name in self._names
        }

    @property
    def samples(self) -> int:
        """Rows that were written."""
        return self._lengths[self._names[0]].size // 4

    def add(self, row: Mapping[str, Sequence[int] | NDArray[numpy.int32]]) -> None:
        """Append one sample: a value for every column."""
        assert row.keys() == self._values.keys(), f"columns {set(self._values)}, row {set(row)}"
        for name, values in row.items():
            self._values[name].write(numpy.asarray(values, dtype=numpy.int32).tobytes())
            self._lengths[name].write(len(values).to_bytes(4, "little"))

    def extend(self, name: str, lengths: NDArray[numpy.int32], values: Iterable[bytes]) -> None:
        """Append samples to one column.

        Args:
            name: of the column.
            lengths: [samples] values of each.
            values: pieces of their values, as they stand in a file.
        """
        self._lengths[name].write(lengths.astype("<i4").tobytes())
        for piece in values:
            self._values[name].write(piece)

    def sync(self) -> dict[str, tuple[int, str]]:
        """Wait until all rows are on the disk; return the facts of every file by its name."""
        return {file.path.name: file.sync() for file in (*self._values.values(), *self._lengths.values())}

    def add_column(self, name: str, values: Iterable[NDArray[numpy.int32]]) -> None:
        """Write a column of one number a sample that was not known before all samples were.

        Args:
            name: of the column.
            values: the numbers, in pieces.
        """
        samples = self.samples
        self._names.append(name)
        self._values[name] = GrowingFile(self._folder / f"{name}.bin")
        self._lengths[name] = GrowingFile(self._spool / f"{name}.lengths")
        for piece in values:
            self.extend(name, numpy.ones(len(piece), dtype=numpy.int32), [piece.astype("<i4").tobytes()])
        assert self._lengths[name].size == 4 * samples, f"{self._lengths[name].size // 4} of {samples}"

    def finish(self) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
        """Write the indices; return values per column and {bytes, sha256} per file.

        Raises:
            DataError: a file does not hold what was written.
        """
        files = {}
        for name in self._names:
            values, lengths = self._values[name], self._lengths[name]
            for file in (values, lengths):
                file.close()
                if digest_of(file.path) != file.facts():
                    raise DataError(
                        f"{file.path}: does not hold what was written: another process or a failing disk has "
                        "changed it; start again, on another disk if it happens again"
                    )
            index = self._folder / f"{name}.idx"
            write_index(index, lengths.path)
            size, digest = values.facts()
            files[values.path.name] = {"bytes": size, "sha256": digest}
            files[index.name] = facts_of(index)
        return {name: file.size // 4 for name, file in self._values.items()}, files

    def abandon(self) -> None:
        """Close the files without finishing."""
        for file in (*self._values.values(), *self._lengths.values()):
            file.abandon()


class ColumnFile:
    """A column on disk, of which samples are read by ranges.

    Args:
        folder: of the columns.
        name: of the column.

    Raises:
        DataError: its index is none.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.bin"
        index = folder / f"{name}.idx"
        with index.open("rb") as stream:
            header = stream.read(_HEADER.size)
        try:
            magic, version, code, self.samples, bounds = _HEADER.unpack(header)
        except struct.error:
            magic = b""
        if magic != _MAGIC or (version, code, bounds) != (_VERSION, _INT32, self.samples + 1):
            raise DataError(f"{index}: not an index of int32 values: prepare the data again")
        self.lengths: NDArray[numpy.int32] = _mapped(index, numpy.int32, _HEADER.size, self.samples)
        self._starts = _mapped(index, numpy.int64, _HEADER.size + 4 * self.samples, self.samples)

    def values(self, first: int, last: int) -> NDArray[numpy.int32]:
        """Return the values of samples first <= n < last, one after the other."""
        return numpy.frombuffer(b"".join(self.pieces(first, last)), dtype="<i4")

    def pieces(self, first: int, last: int) -> Iterator[bytes]:
        """Yield the bytes of samples first <= n < last, a piece at a time."""
        if first >= last:
            return
        start, end = int(self._starts[first]), int(self._starts[last - 1]) + 4 * int(self.lengths[last - 1])
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while start < end:
                piece = stream.read(min(_PIECE, end - start))
                if not piece:
                    raise DataError(f"{self.path}: cut off: copy it again or prepare the data again")
                start += len(piece)
                yield piece


def write_index(index: Path, lengths: Path) -> None:
    """Write a column's index.

    Args:
        index: the file to write.
        lengths: file of the number of values of every sample, int32.
    """
    samples, start = lengths.stat().st_size // 4, 0
    with index.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC, _VERSION, _INT32, samples, samples + 1))
        for piece in pieces_of(lengths, numpy.dtype("<i4")):
            out.write(piece.tobytes())
        for piece in pieces_of(lengths, numpy.dtype("<i4")):
            ends = start + numpy.cumsum(piece, dtype=numpy.int64) * 4
            out.write((ends - piece.astype(numpy.int64) * 4).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, samples + 1, _PIECE):
            out.write(numpy.arange(first, min(first + _PIECE, samples + 1), dtype="<i8").tobytes())


def pieces_of(file: Path, kind: numpy.dtype[Any]) -> Iterator[NDArray[Any]]:
    """Yield the numbers of a file in pieces.

    Args:
        file: of numbers, one after the other.
        kind: of a number.
    """
    with file.open("rb") as stream:
        while data := stream.read(_PIECE * kind.itemsize):
            yield numpy.frombuffer(data, dtype=kind)


def facts_of(file: Path) -> dict[str, Any]:
    """Return {bytes, sha256} of a file."""
    size, digest = digest_of(file)
    return {"bytes": size, "sha256": digest}


def digest_file(file: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    return digest_of(file)[1]


def numbered(names: Sequence[str]) -> list[str]:
    """Return names that differ: the second `a` is `a#2`."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def _mapped(file: Path, kind: Any, offset: int, number: int) -> NDArray[Any]:
    """Map numbers of a file into memory."""
    if not number:
        return numpy.empty(0, dtype=kind)
    return numpy.memmap(file, dtype=kind, mode="r", offset=offset, shape=(number,))
