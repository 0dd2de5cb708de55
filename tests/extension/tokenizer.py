"""A vocabulary of single bytes: a `*.bytewise` file lists the special tokens, a line each, from id 256 on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Bytewise:
    """Every byte is a token."""

    advice = "fix the record"

    def __init__(self, name: str, special: Sequence[str]) -> None:
        """Hold the special tokens; `read` makes one from a file."""
        self._name, self._special = name, list(special)

    @classmethod
    def read(cls, file: Path, config: Mapping[str, Any]) -> Bytewise:
        """Read a file; see `open_backend`."""
        return cls(file.name, file.read_text(encoding="utf-8").splitlines())

    @property
    def size(self) -> int:
        """The highest id plus one."""
        return 256 + len(self._special)

    @property
    def special(self) -> Mapping[int, str]:
        """Spelling of each special token."""
        return dict(enumerate(self._special, start=256))

    def encode(self, text: str, *, opening: bool = True) -> list[int]:
        """Return ids; see `Backend`."""
        cut = re.split(f"({'|'.join(map(re.escape, self._special))})", text)
        tokens = ([self.find(part)] if part in self._special else part.encode() for part in cut)
        return [token for part in tokens for token in part if token is not None]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids of each text; see `Backend`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, keep_special: bool) -> str:
        """Return text; see `Backend`."""
        kept = [token for token in ids if keep_special or token not in self.special]
        return b"".join(self.piece(token) or b"" for token in kept).decode(errors="replace")

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; see `Backend`."""
        return bytes([token_id]) if token_id < 256 else self.special.get(token_id, "").encode() or None

    def find(self, spelling: str) -> int | None:
        """Return the id of a spelling."""
        return 256 + self._special.index(spelling) if spelling in self._special else None

    def add_special(self, spelling: str) -> int:
        """Add a special token behind the last id."""
        self._special.append(spelling)
        return self.size - 1

    def content(self) -> dict[str, object]:
        """Return what decides ids."""
        return {"kind": "bytewise", "special": self._special}

    def save(self, folder: Path) -> dict[str, object]:
        """Write the special tokens; see `Backend`."""
        (folder / self._name).write_text("\n".join(self._special), encoding="utf-8")
        return {}
