"""The folder of a conversion under way, which the same command goes on with after it was cut off."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from tide_megatron.base.errors import CheckpointError

_PLAN = "conversion.json"


def unfinished(target: Path) -> Path:
    """Return where the files of a conversion are gathered before they move to the target."""
    return target.with_name(f".{target.name}.converting")


def begin(partial: Path, told: object, source: Path) -> bool:
    """Make the folder, or take it with what is in it if the same conversion left it (one rank only).

    Args:
        partial: the folder.
        told: what will be written; plain values.
        source: what is read; it counts as the same while its files have their sizes and times.

    Returns:
        Whether it was taken.

    Raises:
        CheckpointError: the disk refuses.
    """
    digest = hashlib.sha256(json.dumps(told).encode())
    for path in sorted(source.iterdir()):
        facts = path.stat()  # another model of the same shapes would be told in the same words
        digest.update(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
    try:
        if (partial / _PLAN).is_file() and (partial / _PLAN).read_text() == digest.hexdigest():
            return True
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _PLAN).write_text(digest.hexdigest(), encoding="utf-8")
    except OSError as fault:
        raise CheckpointError(f"{partial}: cannot be written ({fault}); choose another folder") from fault
    return False
