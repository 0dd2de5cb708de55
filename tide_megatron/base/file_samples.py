"""Digests of large files from samples of their bytes: enough to tell two files apart, not to find damage.

Reading 256 blocks takes moments where the whole takes minutes; `base.files.damage` reads every byte.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCKS, BLOCK_BYTES = 256, 4096
WHOLE_BYTES = 2**22
"""Files up to this size are read whole."""


def take_in(path: Path, found: hashlib._Hash) -> None:
    """Add a file to a digest: its name, its size, its bytes; of a large one 256 blocks at equal distances.

    Args:
        path: of the file.
        found: the digest; changed.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    found.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as stream:
        if size <= WHOLE_BYTES:
            found.update(stream.read())
            return
        for block in range(BLOCKS):
            stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
            found.update(stream.read(BLOCK_BYTES))
