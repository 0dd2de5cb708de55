"""What a disk refuses, in one line (path, reason, remedy), and which place a target's name means."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tide_megatron.base.errors import CheckpointError, TideError

_MAY_NOT = "choose a place that you may use, or let its owner change the permissions"
_ROOM = "make room on that disk or choose another, then start again"
_REMEDIES = {
    errno.EACCES: _MAY_NOT,
    errno.EPERM: _MAY_NOT,
    errno.EROFS: "the disk can only be read; choose another place",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or choose another disk, then start again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another place",
    errno.EISDIR: "a folder stands where a file is needed; choose another place",
    errno.EEXIST: "a file stands there; choose another place",
    errno.ENOTEMPTY: "remove it first",
    errno.ELOOP: "the link leads to itself; remove it or choose another place",
    errno.ENOENT: "check the path",
    errno.EBUSY: "it is in use, or a disk of its own; choose a folder in it",
    errno.EXDEV: "it is a disk of its own; choose a folder in it",
    errno.ESTALE: "the file server has changed; start again",
    errno.EIO: "the disk or file server fails; choose another, then start again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "this machine has too many files open; start again later",
}


def free_disk_bytes(folder: Path) -> int:
    """Return what the disk of a folder, which need not exist, has room for; quotas are not seen.

    Raises:
        OSError: the disk cannot say.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def disk_words(fault: OSError, path: Path | None = None, remedy: str = "") -> str:
    """Say in one line what a disk refuses, where, and what to do.

    Args:
        fault: what was raised.
        path: what was being made; the fault's own file is named instead where that is no part of it.
        remedy: beside what the kind of the fault suggests.
    """
    named = fault.filename2 or fault.filename
    other = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else None
    is_other = other is not None and (path is None or not _is_part(other, path))
    where, verb = (other, "used") if is_other else (path, "written")
    hint = _REMEDIES.get(fault.errno or 0, "check space and permissions")
    return f"{where}: cannot be {verb} ({fault.strerror or fault}); {hint}{remedy}"


def _is_part(file: Path, path: Path) -> bool:
    """Say whether a file is on the way to a place, in it, or in what stands beside it while it is made."""
    file, path = Path(os.path.abspath(file)), Path(os.path.abspath(path))
    if file in path.parents:
        return True
    beside = file.relative_to(path.parent).parts[0] if file.is_relative_to(path.parent) else ""
    return beside.removeprefix(".").startswith(path.name)


@contextlib.contextmanager
def disk_faults(
    path: Path | None = None, kind: type[TideError] = CheckpointError, remedy: str = ""
) -> Iterator[None]:
    """Make a user's fault of what a disk refuses while the block runs; every other fault stays as it is.

    Args:
        path: what is being made; None: only faults that name their file are a disk's.
        kind: of the error.
        remedy: see `disk_words`.

    Raises:
        TideError: (of that kind) one line: path, reason, remedy.
    """
    try:
        yield
    except OSError as fault:
        is_of_disk = fault.errno in _REMEDIES if path is None else fault.errno is not None
        if not is_of_disk or (path is None and fault.filename is None):
            raise  # of a network, or of a library that calls its own complaints so
        raise kind(disk_words(fault, path, remedy)) from fault


def place_of(target: Path, kind: type[TideError] = CheckpointError) -> Path:
    """Return the place that a target names: links followed, once and for all, `.` and `..` resolved.

    Raises:
        TideError: (of that kind) nothing can be put there.
    """
    try:
        here: Path | None = Path(os.path.realpath("."))
    except OSError:
        here = None
    if here is None and not target.is_absolute():
        raise kind(
            f"{target}: the folder that you are in was removed or replaced; `cd .` or go elsewhere first"
        )
    try:
        place = Path(os.path.realpath(target, strict=False))
        if os.path.lexists(place):
            place.stat()  # refuses a link that leads to itself
    except ValueError as fault:  # a null byte
        raise kind(f"{str(target)!r}: is no path ({fault}); choose another folder") from None
    except OSError as fault:
        raise kind(disk_words(fault, target)) from fault
    if place == Path(place.anchor) or os.path.ismount(place):
        raise kind(f"{target}: is a disk of its own, which cannot be replaced; choose a folder in it")
    if here is not None and place != here and here.is_relative_to(place):
        raise kind(f"{target}: holds the folder that you are in; choose another folder, or go elsewhere")
    return place
