"""Work that takes hours and goes on after a kill: a hidden folder beside its place, and what is certain.

What is being made only grows: files are appended to, and now and then all of them are flushed and one small
file, which is replaced in one piece, says how long each of them is, with its digest, and what that holds. A
kill, a power cut or a full disk at any moment leaves at least that; what stands behind it is cut off when the
work goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.files import PARTIAL, commit_folder, discard, put_back, write_text
from tide_megatron.base.read import json_of

_STATE = "state.json"
_BUFFER_BYTES, _PIECE_BYTES = 2**17, 2**20


class DamagedWork(Exception):
    """What was certain is not there any more; the message says what."""


class GrowingFile:
    """A file that only grows, and knows the digest of all of it.

    Args:
        path: of the file.
        known: (bytes, SHA-256) that stay; None: it begins empty.

    Raises:
        DamagedWork: the bytes that should stay are others.
        OSError: the disk refuses.
    """

    def __init__(self, path: Path, known: Sequence[Any] | None = None) -> None:
        self.path = path
        self._hash, self.size = hashlib.sha256(), 0
        self._stream = path.open("r+b" if known else "wb", buffering=_BUFFER_BYTES)
        size, digest = known or (0, self._hash.hexdigest())
        while self.size < size and (data := self._stream.read(min(_PIECE_BYTES, size - self.size))):
            self._hash.update(data)
            self.size += len(data)
        if self.facts() != (size, digest):
            self.abandon()
            raise DamagedWork(f"{path.name} has other bytes than were written")
        self._stream.seek(size)
        self._stream.truncate()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> tuple[int, str]:
        """Wait until all of it is on the disk; return its facts."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self.facts()

    def facts(self) -> tuple[int, str]:
        """Return (bytes, SHA-256) of what was written."""
        return self.size, self._hash.hexdigest()

    def close(self) -> None:
        """Hand what was written to the system, and write no more."""
        self._stream.close()

    def abandon(self) -> None:
        """Write no more; what cannot be written any more does not count."""
        with contextlib.suppress(OSError):
            self._stream.close()


class Unfinished:
    """The hidden folder of one piece of work."""

    def __init__(self, folder: Path) -> None:
        """Take a folder, which need not be there."""
        self.folder, self.data, self.spool = folder, folder / "data", folder / "spool"
        self.is_kept = False
        """Whether an error leaves it for the next start."""
        self.state: Mapping[str, Any] = {}
        """What is certain."""

    def begin(self) -> None:
        """Start with nothing."""
        self.is_kept = False
        discard(self.folder)
        self.data.mkdir(parents=True)
        self.spool.mkdir()

    def commit(self, state: Mapping[str, Any]) -> None:
        """Say what is certain, once the files that it speaks of are on the disk.

        Args:
            state: plain values. Under `files` (bytes, SHA-256) of every file, by its name.
        """
        write_text(self.folder / _STATE, json.dumps(state) + "\n")
        self.is_kept, self.state = True, state

    def committed(self) -> dict[str, Any] | None:
        """Return what is certain; None: nothing is.

        Raises:
            DamagedWork: nobody can tell any more.
        """
        try:
            state = json_of(self.folder / _STATE)
        except FileNotFoundError:
            return None
        except ValueError as fault:
            raise DamagedWork(f"{_STATE}: {fault}") from None
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise DamagedWork(f"{_STATE} is none of ours")
        return state

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Start with what is certain; files that it does not speak of were begun behind it.

        Raises:
            DamagedWork: one is missing.
        """
        self.is_kept, self.state, files = True, state, state["files"]
        there = {file.name: file for part in (self.data, self.spool) for file in part.glob("*")}
        for name in files:
            if name not in there:
                raise DamagedWork(f"{name} is missing")
        for name in there.keys() - files.keys():
            discard(there[name])


@contextlib.contextmanager
def unfinished_folder(target: Path) -> Iterator[Unfinished]:
    """Give the hidden folder in which a folder is made; its `data` takes the name at the end of the block.

    Args:
        target: where it shall stand (`place_of`); what stands there goes only when the new one is whole. The
            caller holds a lease on it.

    Raises:
        OSError: the disk refuses; the target is as it was.
    """
    work = Unfinished(target.with_name(f".{target.name}{PARTIAL}"))
    try:
        put_back(target)
        yield work
        commit_folder(work.data, target)
        work.is_kept = False
    finally:
        if not work.is_kept:
            with contextlib.suppress(OSError):
                discard(work.folder)
