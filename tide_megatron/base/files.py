"""Files and folders that are there whole or not at all, and digests that say whether they still are.

The one place that replaces anything: what is new is written beside its place, flushed to the disk, and
renamed. A kill, a power cut or a full disk at any moment leaves the old or the new. Only a folder that takes
another one's place needs two renames: a kill between them leaves the old one beside its place (`.NAME.old`),
where the next replacement puts it back first.

`digests.json` holds sizes and SHA-256 of files of a folder, such as a checkpoint or a model's weights.
SHA-256 because processors have instructions for it (2 GB/s a core), and disks are slower.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from tide_megatron.base.disk import disk_words, place_of
from tide_megatron.base.errors import CheckpointError, ConfigError, TideError
from tide_megatron.base.read import json_of

PARTIAL = ".partial"
"""How the name of what is not whole yet ends."""
DIGESTS = "digests.json"
Digests = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256 in hexadecimal)."""

_CHUNK_BYTES = 2**22
log = logging.getLogger(__name__)
_VARIABLE = re.compile(r"(^|/)\$\{?[A-Za-z_]\w*\}?(?=/|$)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(word: str | Path) -> Path:
    """Return the path that a user means; every path of a recipe, a command line or a call goes through here.

    A shell expands `~` and `$HOME` only where a word begins, so they come through behind `=`, in quotes, in
    YAML and from Python, and would be made as folders of these names. `./~x` is a folder `~x`.

    Args:
        word: as it was written.

    Raises:
        ConfigError: nobody's home, a shell's variable, a URL, or a character that no path has.
    """
    text = str(word)
    if "\0" in text:
        raise ConfigError(f"{text!r} holds a zero byte, which no path has; write it anew")
    if found := _VARIABLE.search(text):
        name = found[0].strip("/${}")
        raise ConfigError(
            f"{text}: variables of the shell are not expanded here; write the path out, or "
            f"${{oc.env:{name}}} in a recipe"
        )
    if _URL.match(text):
        raise ConfigError(f"{text}: is a URL; download what is there and give the local path")
    path = Path(text)
    if not text.startswith("~"):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{text}: {path.parts[0]!r} is nobody's home here; write the path out, or ./{text} for a folder "
            "of that name"
        ) from None


def keep_others_out() -> None:
    """Make nothing that everybody may write, in this process and those it starts; else the umask stays."""
    os.umask(os.umask(0o022) | 0o002)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Give a file new text, all of it or none.

    Args:
        path: the file.
        text: all of it.
        is_durable: wait until it is on the disk; False: a machine that loses its power may lose the file.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        partial.write_text(text, encoding="utf-8")
        if is_durable:
            flush(partial)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if is_durable:
        flush(path.parent)


def commit_folder(partial: Path, final: Path) -> None:
    """Flush a folder that was filled and give it its name; what stood there goes as a whole, and only then.

    Args:
        partial: the folder, beside its place.
        final: its place.

    Raises:
        OSError: the disk refuses; what stood there stays.
    """
    for path in (*partial.rglob("*"), partial):
        flush(path)
    old, is_here = _aside(final), _is_current(final)
    if os.path.lexists(final):
        discard(old)
        final.rename(old)
    try:
        partial.rename(final)
        flush(final.parent)
    finally:
        put_back(final)
        if is_here:
            os.chdir(final)
        with contextlib.suppress(OSError):
            discard(old)
    if is_here:
        log.warning("%s: the folder that you are in was replaced; `cd .` shows the new one", final)


@contextlib.contextmanager
def replaced_folder(
    folder: Path, digested: tuple[str, ...] = (), fault_kind: type[TideError] = CheckpointError
) -> Iterator[Path]:
    """Give a new folder to fill, which takes the place of `folder` when the block ends without an error.

    Args:
        folder: where it shall stand (`place_of`); what stands there goes only when the new one is whole.
        digested: how the names of the files end whose digests are written beside them.
        fault_kind: of the error.

    Yields:
        An empty folder beside it, which does not outlive an error.

    Raises:
        TideError: (of that kind) the disk refuses; nothing has changed.
    """
    folder = place_of(folder, fault_kind)
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        put_back(folder)
        discard(partial)
        partial.mkdir(parents=True)
        yield partial
        for inner in {path.parent for path in partial.rglob("*") if path.name.endswith(digested)}:
            write_digests(inner, {}, digested)
        commit_folder(partial, folder)
    except OSError as fault:
        raise fault_kind(disk_words(fault, folder)) from fault
    finally:
        with contextlib.suppress(OSError):
            discard(partial)


def remove_folder(folder: Path) -> None:
    """Take a folder away so that a kill on the way leaves no half of it under its name.

    Raises:
        OSError: the disk refuses.
    """
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    discard(partial)
    folder.rename(partial)
    with contextlib.suppress(OSError):
        discard(partial)


def discard(path: Path) -> None:
    """Remove a folder with all in it, a file, or a link (and not what it leads to); nothing is nothing.

    Raises:
        OSError: the disk refuses.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_current(folder: Path) -> bool:
    """Say whether this process stands in a folder."""
    try:
        return folder.samefile(".")
    except OSError:
        return False


def _aside(folder: Path) -> Path:
    """Return where a folder waits while another one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def put_back(folder: Path) -> None:
    """Undo the first of two renames that the second did not follow."""
    if os.path.lexists(_aside(folder)) and not os.path.lexists(folder):
        _aside(folder).rename(folder)


class DigestingFile:
    """A file that is written front to back and knows the digest of what went through it."""

    def __init__(self, stream: typing.BinaryIO) -> None:
        """Start with an empty file."""
        self._stream = stream
        self._hash = hashlib.sha256()
        self._position = 0

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._position

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes, all of them: a stream without buffer may take a part, as on a disk that gets full."""
        left = memoryview(data).cast("B")
        self._hash.update(left)
        self._position += left.nbytes
        size = left.nbytes
        while left.nbytes:
            left = left[self._stream.write(left) :]
        return size

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the system's number of the file."""
        return self._stream.fileno()

    def close(self) -> None:
        """Write no more."""
        self._stream.close()

    def facts(self) -> tuple[int, str]:
        """Return (bytes, SHA-256) of what was written."""
        return self._position, self._hash.hexdigest()


def digest_of(path: Path) -> tuple[int, str]:
    """Read a file and return (bytes, SHA-256).

    Raises:
        OSError: it cannot be read, or is no file.
    """
    found, size = hashlib.sha256(), 0
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, "it is no file", str(path))
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
    write_text(folder / DIGESTS, json.dumps(lines, indent=1) + "\n")


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
        lines = json_of(path)
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
