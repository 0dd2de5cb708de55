"""Which checkpoints stay: the newest few, and every so many updates one for good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tide_megatron.checkpoint.names import Mark, listed, remove


def expired(checkpoints: Sequence[Path], keep: int, keep_every: int) -> list[Path]:
    """Return the checkpoints that may go.

    Args:
        checkpoints: all of them, oldest first.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay for good; 0: none.
    """
    old = checkpoints[: max(0, len(checkpoints) - keep)]
    return [path for path in old if not keep_every or Mark.of(path).step % keep_every]


def keep_newest(folder: Path, keep: int, keep_every: int) -> None:
    """Remove the checkpoints of a folder that may go (rank 0)."""
    for old in expired(listed(folder), keep, keep_every):
        remove(old)
