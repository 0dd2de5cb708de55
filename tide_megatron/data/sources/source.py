"""Where chats are read from: a file, a pipe or stdin, plain or compressed; each is read once, front to back.

What is compressed is told by its first bytes, not by its name. Size and digest are taken on the way, because
a pipe cannot be read again. Left out: formats that are no lines of JSON, which are named when they are met.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from tide_megatron.base.errors import DataError, RecordError

STDIN = "-"
Line = tuple[int, bytes | RecordError | str]
"""Number from 1, and what stands there, or what is wrong with it, or why it is left out."""
_LINE_BYTES = 2**28
"""A longer line is no record: such a file has no lines."""
_CHUNK_BYTES = 2**20
_PACKED_BYTES = 2**16
_START_BYTES = 8
"""By which kinds of files are told."""
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_MODULES = ("compression.zstd", "backports.zstd", "zstandard", "pyzstd")
_FOREIGN = {
    b"PAR1": "a Parquet file, which no pipe can bring: name the file",
    b"ARROW1": "an Arrow file, which no pipe can bring: name the file",
    b"\xff\xff\xff\xff": "an Arrow stream, which no pipe can bring: write it to a file",
    b"PARE": "an encrypted Parquet file: decrypt it",
    b"PK\x03\x04": "a zip archive: unpack it and name the files",
    b"SQLite": "a database: write its rows as JSON lines",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


class Source:
    """One input.

    Args:
        path: a file or a pipe; `-` is stdin.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_stdin = str(path) == STDIN
        self.name = "stdin" if self.is_stdin else path.name
        self._read = _Counting()

    @property
    def place(self) -> str:
        """Return what stands before a line's number in messages."""
        return "stdin" if self.is_stdin else str(self.path)

    @property
    def read_bytes(self) -> int:
        """Bytes taken so far, compressed as they are."""
        return self._read.count

    @property
    def total_bytes(self) -> int | None:
        """Bytes there are; None: a pipe does not say."""
        return self.path.stat().st_size if not self.is_stdin and self.path.is_file() else None

    def check(self) -> None:
        """Refuse what is not there or is a folder, before anything is read.

        Raises:
            DataError: says so.
        """
        if self.is_stdin:
            return
        try:
            is_folder, is_there = self.path.is_dir(), self.path.exists()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}): check the path") from None
        if is_folder:
            raise DataError(f"{self.path}: cannot be read (it is a folder): name the JSONL files in it")
        if not is_there:
            raise DataError(f"{self.path}: no such file: name at least one file of chats, or - for stdin")

    @property
    def can_be_read_again(self) -> bool:
        """Whether it gives the same lines a second time; a pipe gives none."""
        return not self.is_stdin and self.path.is_file()

    def at(self, number: int) -> str:
        """Return where a line stands, for messages."""
        return f"{self.place}:{number}"

    def lines(self) -> Iterator[Line]:
        """Yield (number from 1, line) of all lines that are not blank.

        Raises:
            DataError: it cannot be read, is damaged, or of a kind that is no JSONL.
        """
        number = 0
        try:
            with contextlib.ExitStack() as stack:
                self._read = stack.enter_context(_Counting(self._raw(), keeps_open=self.is_stdin))
                stream = stack.enter_context(self._through(self._read))
                while line := stream.readline(_LINE_BYTES):
                    number += 1
                    if len(line) == _LINE_BYTES:
                        raise DataError(f"{self.place}:{number}: a line of 256 MB and more: no JSONL file")
                    if line.strip():
                        yield number, line
                self._read.drain()
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.place}: damaged behind line {number} ({error}): copy the file again"
            ) from None
        except OSError as error:
            is_closed = isinstance(error, PermissionError)
            remedy = "check its permissions" if is_closed else "give the path of a JSONL file"
            raise DataError(f"{self.place}: cannot be read ({error.strerror or error}): {remedy}") from None

    def describe(self, records: int) -> dict[str, object]:
        """Describe what was read; only its name, so that a data folder tells nothing about a machine."""
        return {
            "name": self.name,
            "bytes": self._read.count,
            "sha256": self._read.digest.hexdigest(),
            "records": records,
        }

    def _raw(self) -> BinaryIO:
        return cast(BinaryIO, sys.stdin.buffer if self.is_stdin else self.path.open("rb", buffering=0))

    def _through(self, raw: _Counting) -> BinaryIO:
        """See through its compression."""
        buffered = cast(io.BufferedReader, io.BufferedReader(raw, _CHUNK_BYTES))
        first = buffered.peek(_START_BYTES)
        for start, what in _FOREIGN.items():
            if first.startswith(start):
                raise DataError(f"{self.place}: {what}")
        if first.startswith(b"\x1f\x8b"):
            return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=buffered), _CHUNK_BYTES))
        if first.startswith(b"BZh"):
            return cast(BinaryIO, bz2.BZ2File(buffered))
        if first.startswith(b"\xfd7zXZ\x00"):
            return cast(BinaryIO, lzma.LZMAFile(buffered))
        if first.startswith(_ZSTD):
            return self._through_zstd(buffered)
        return cast(BinaryIO, buffered)

    def _through_zstd(self, stream: io.BufferedReader) -> BinaryIO:
        for name in _ZSTD_MODULES:
            try:
                library: Any = importlib.import_module(name)
            except ImportError:
                continue
            begin = library.ZstdDecompressor
            if name == "zstandard":
                begin = library.ZstdDecompressor().decompressobj
            return cast(BinaryIO, io.BufferedReader(Frames(stream, begin), _CHUNK_BYTES))
        again = f"zstd -dc {self.path.name} | tide prepare ... -"
        raise DataError(
            f"{self.place}: compressed with zstd, which no library here reads: install the package "
            f"zstandard, or pipe it in ({again})"
        )


class _Counting(io.RawIOBase):
    """Bytes of a stream, counted and digested on their way."""

    def __init__(self, stream: BinaryIO | None = None, *, keeps_open: bool = False) -> None:
        super().__init__()
        self._stream, self._keeps_open = stream, keeps_open
        self.count, self.digest = 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 is the end."""
        assert self._stream is not None, "opened before it is read"
        taken = self._stream.read(len(buffer)) or b""
        while not self.count and len(taken) < _START_BYTES:  # a pipe gives what is there
            more = self._stream.read(_START_BYTES - len(taken))
            if not more:
                break
            taken += more
        buffer[: len(taken)] = taken
        self.count += len(taken)
        self.digest.update(taken)
        return len(taken)

    def drain(self) -> None:
        """Read what a decompressor left behind its end."""
        while not self.closed and self.read(_CHUNK_BYTES):
            pass

    def close(self) -> None:
        """Close the stream beneath, unless it is stdin."""
        if self._stream is not None and not self._keeps_open:
            self._stream.close()
        super().close()


class Frames(io.RawIOBase):
    """What is behind one compressed frame after the other; the readers of some libraries end silently in one.

    Args:
        stream: compressed bytes.
        begin: makes a decompressor of one frame, with `decompress`, `eof` and `unused_data`.
    """

    def __init__(self, stream: BinaryIO, begin: Callable[[], Any]) -> None:
        super().__init__()
        self._stream, self._begin = stream, begin
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 is the end.

        Raises:
            EOFError: it ends within a frame.
            zlib.error: a damaged frame.
        """
        while not self._ready:
            packed = self._stream.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends before its end")
                return 0
            self._ready = memoryview(self._unpacked(packed))
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _unpacked(self, packed: bytes) -> bytes:
        found = b""
        while packed:
            self._frame = self._frame or self._begin()
            try:
                found += self._frame.decompress(packed)
            except Exception as error:  # every library has its own
                raise zlib.error(str(error)) from None
            packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        return found
