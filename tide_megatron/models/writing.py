"""A folder written whole or not at all: beside its place, made durable, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tide_megatron.base.digests import write_digests
from tide_megatron.base.durable import flush
from tide_megatron.base.errors import CheckpointError

WEIGHTS = (".safetensors", ".distcp")
"""Files whose digests are recorded; the others are text, which people may edit."""


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which takes the place of `folder` when the block ends without an error.

    Beside weights their digests are written (`base.digests`). What stood at `folder` goes as a whole, and
    only then; after an error nothing has changed.

    Args:
        folder: where it shall stand.

    Yields:
        An empty folder beside it.

    Raises:
        CheckpointError: the disk refuses.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    try:
        if old.exists() and not folder.exists():  # an earlier write was killed between two renames
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for inner in {path.parent for path in partial.rglob("*") if path.name.endswith(WEIGHTS)}:
            write_digests(inner, {}, WEIGHTS)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
    except BaseException as fault:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        if isinstance(fault, OSError):
            raise CheckpointError(
                f"{folder}: cannot be written ({fault}); check space and permissions"
            ) from fault
        raise
    shutil.rmtree(old, ignore_errors=True)
