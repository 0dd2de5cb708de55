"""Make files survive a power cut: flushed to the disk, and then renamed."""

from __future__ import annotations

from pathlib import Path

from tide_megatron.base.durable import flush
from tide_megatron.checkpoint.names import LATEST, PARTIAL


def flush_tree(folder: Path) -> None:
    """Flush every file of a folder, and the folder itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush(path)
    flush(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one rename."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.rename(path)
    flush(path.parent)


def point_latest(folder: Path, name: str) -> None:
    """Let `latest` name a checkpoint."""
    write_text(folder / LATEST, name + "\n")
