"""Ranks of byte-level BPE as tiktoken keeps them: a `*.tiktoken` file of lines `base64 rank`.

Such a file says nothing about how text is split before merging, nor about special tokens: both stand in
`tokenizer_config.json` beside it, under `pattern` (a regular expression or a name in `PATTERNS`) and
`added_tokens_decoder`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from tide_megatron.base.errors import DataError, nearest
from tide_megatron.text.backends.files import CONFIG_FILE, read_added, write_added

PATTERNS = {
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "qwen": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}
"""How text is split before merging, by family; Qwen's is for Qwen2 and Qwen3."""


class Tiktoken:
    """One file of ranks with its pattern and special tokens."""

    advice = "use another tokenizer, or fix the record"

    def __init__(self, file: Path, pattern: str, ranks: dict[bytes, int], added: Mapping[int, str]) -> None:
        """Hold the parts; `read` makes one from a file."""
        self._name, self._pattern, self._ranks = file.name, pattern, ranks
        self._pieces = {rank: piece for piece, rank in ranks.items()}
        self._added = dict(added)
        clash = next((token for token in added if token in self._pieces), None)
        if clash is not None or len(self._pieces) != len(ranks):
            raise DataError(
                f"{file}: two tokens have one id"
                + (f" (special token {added[clash]!r} and a rank: {clash})" if clash is not None else "")
                + f": give every special token of {CONFIG_FILE} an id of its own"
            )
        self._library  # noqa: B018  a broken pattern is found now

    @classmethod
    def read(cls, file: Path, config: Mapping[str, Any]) -> Tiktoken:
        """Read ranks; see `open_backend`."""
        pattern = config.get("pattern")
        if not isinstance(pattern, str):
            raise DataError(
                f"{file}: how to split text before merging is not known: write a regular expression, or one "
                f'of {", ".join(PATTERNS)}, as "pattern" into {CONFIG_FILE} beside it'
            )
        if re.fullmatch(r"[\w-]+", pattern) and pattern not in PATTERNS:
            raise DataError(
                f"{file.parent / CONFIG_FILE}: pattern: {pattern!r} is unknown: {nearest(pattern, PATTERNS)}"
            )
        pattern = PATTERNS.get(pattern, pattern)
        return cls(file, pattern, _read_ranks(file), read_added(config, file))

    @property
    def size(self) -> int:
        """The highest id plus one."""
        return max([*self._pieces, *self._added]) + 1

    @property
    def special(self) -> Mapping[int, str]:
        """Spelling of each special token."""
        return self._added

    def encode(self, text: str, *, opening: bool = True) -> list[int]:
        """Return ids; see `Backend`. There is no prefix, so that all texts are alike."""
        ids: list[int] = self._library.encode(text, allowed_special="all")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids of each text; see `Backend`."""
        return [self._library.encode(text, allowed_special="all") for text in texts]

    def decode(self, ids: Sequence[int], *, keep_special: bool) -> str:
        """Return text; see `Backend`."""
        kept = [token for token in ids if keep_special or token not in self._added]
        return b"".join(self.piece(token) or b"" for token in kept).decode(errors="replace")

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; see `Backend`."""
        spelling = self._added.get(token_id)
        return self._pieces.get(token_id) if spelling is None else spelling.encode()

    def find(self, spelling: str) -> int | None:
        """Return the id of a spelling; special tokens first."""
        for token, known in self._added.items():
            if known == spelling:
                return token
        return self._ranks.get(spelling.encode())

    def add_special(self, spelling: str) -> int:
        """Add a special token behind the last id; see `Backend`."""
        token = self.size
        self._added[token] = spelling
        self.__dict__.pop("_library", None)
        return token

    def content(self) -> dict[str, object]:
        """Return what decides ids; see `Backend`."""
        ranks = hashlib.sha256(_write_ranks(self._ranks)).hexdigest()
        return {
            "kind": "tiktoken",
            "pattern": self._pattern,
            "ranks": ranks,
            "added": sorted(self._added.items()),
        }

    def save(self, folder: Path) -> dict[str, object]:
        """Write the ranks; see `Backend`."""
        (folder / self._name).write_bytes(_write_ranks(self._ranks))
        return {"pattern": self._pattern, **write_added(self._added)}

    @functools.cached_property
    def _library(self) -> tiktoken.Encoding:
        special = {spelling: token for token, spelling in self._added.items()}
        try:
            return tiktoken.Encoding(
                self._name, pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=special
            )
        except Exception as error:  # the library raises what its Rust half makes of a broken pattern
            raise DataError(
                f"{self._name}: tiktoken refuses these ranks and this pattern ({error}); fix {CONFIG_FILE}"
            ) from None


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Read lines `base64 rank`."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); copy the tokenizer again") from None
    ranks = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                piece, rank = line.split()
                ranks[base64.b64decode(piece, validate=True)] = int(rank)
            except ValueError:
                raise DataError(
                    f"{file}:{number}: not a line `base64 rank`; copy the tokenizer again"
                ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{file}: has no token for byte {missing[0]}; copy the tokenizer again")
    return ranks


def _write_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """Return the file's content, by rank."""
    ordered = sorted((rank, piece) for piece, rank in ranks.items())
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in ordered)
