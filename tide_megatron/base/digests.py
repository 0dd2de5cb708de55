"""`digests.json`: the sizes and SHA-256 of files of a folder, such as a checkpoint or a model's weights.

SHA-256 because processors have instructions for it (2 GB/s a core), and disks are slower.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path

from tide_megatron.base.errors import CheckpointError

DIGESTS = "digests.json"
Digests = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256 in hexadecimal)."""

_CHUNK_BYTES = 2**22


class DigestingFile:
    """A file that is written front to back and knows the digest of what went through it."""

    def __init__(self, stream: typing.BinaryIO) -> None:
        """Start with an empty file."""
        self._stream = stream
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes, all of them: a stream without buffer may take a part, as on a disk that gets full."""
        left = memoryview(data).cast("B")
        self._hash.update(left)
        self.position += left.nbytes
        size = left.nbytes
        while left.nbytes:
            left = left[self._stream.write(left) :]
        return size

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._stream.flush()

    def facts(self) -> tuple[int, str]:
        """Return (bytes, SHA-256) of what was written."""
        return self.position, self._hash.hexdigest()


def digest_of(path: Path) -> tuple[int, str]:
    """Read a file and return (bytes, SHA-256).

    Raises:
        OSError: it cannot be read.
    """
    found, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK_BYTES):
            found.update(data)
            size += len(data)
    return size, found.hexdigest()


def write_digests(
    folder: Path, known: Mapping[str, tuple[int, str]], suffixes: tuple[str, ...] = ("",)
) -> None:
    """Write digests.json over the files of a folder; those that nobody has digested yet are read.

    Args:
        folder: otherwise complete.
        known: digests that the writers took while they wrote.
        suffixes: how the names of the files end that count; all do unless told.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    counted = [name for name in names if name != DIGESTS and name.endswith(suffixes)]
    files = {name: known.get(name) or digest_of(folder / name) for name in counted}
    lines = {name: {"bytes": size, "sha256": value} for name, (size, value) in files.items()}
    (folder / DIGESTS).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def record_digests(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Write digests.json into a folder that has none.

    Raises:
        CheckpointError: it has one, or the disk refuses.
    """
    if (folder / DIGESTS).exists():
        raise CheckpointError(f"{folder / DIGESTS} is there already; remove it first if you mean new weights")
    try:
        write_digests(folder, {}, suffixes)
    except OSError as fault:
        raise CheckpointError(f"{folder / DIGESTS}: cannot be written ({fault})") from None


def read_digests(folder: Path) -> Digests:
    """Return what digests.json says.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    path = folder / DIGESTS
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): (int(line["bytes"]), str(line["sha256"])) for name, line in lines.items()}
    except FileNotFoundError:
        raise ValueError(f"{DIGESTS} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"{DIGESTS} cannot be read ({fault})") from None


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Say what is wrong with a folder: one line a file, none when it is whole.

    Args:
        folder: with digests.json in it.
        share: (this rank, ranks): read only every so many files, the others leave theirs to the others. Names
            and sizes are looked at by all.
    """
    try:
        wanted = read_digests(folder)
    except ValueError as fault:
        return [str(fault)]
    faults = []
    rank, ranks = share
    by_size = sorted(
        wanted, key=lambda name: (-wanted[name][0], name)
    )  # the large ones are shared out evenly
    for number, name in enumerate(by_size):
        size, value = wanted[name]
        try:
            there = (folder / name).stat().st_size
            if there != size:
                faults.append(f"{name} has {there} bytes instead of {size}")
            elif number % ranks == rank and digest_of(folder / name)[1] != value:
                faults.append(f"{name} has other bytes than were written (SHA-256 differs)")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as fault:
            faults.append(f"{name} cannot be read ({fault})")
    return faults


def refuse_damaged(folder: Path, share: tuple[int, int]) -> None:
    """Compare a folder with its digests, if it has any.

    Args:
        folder: of weights.
        share: see `damage`.

    Raises:
        CheckpointError: files are missing, cut off or have other bytes; this rank's share of them.
    """
    faults = damage(folder, share) if (folder / DIGESTS).is_file() else []
    if faults:
        raise CheckpointError(
            f"{folder}: damaged: {'; '.join(faults)}; copy or download it again, or remove {DIGESTS} if you "
            "changed it yourself"
        )
