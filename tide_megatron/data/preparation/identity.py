"""What decides the bytes of prepared data: who goes on with another start's work must mean the same.

Equal plans write equal bytes. What is compared is what the options say, the digests of the tokenizers, and
the code itself with the libraries that cut text; which sources are meant is told by name here, and by the
digest of what was read when it is read again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tide_megatron
from tide_megatron.base.errors import ConfigError
from tide_megatron.data.manifest import TokenizerMetadata
from tide_megatron.data.preparation.rejects import OnBad
from tide_megatron.data.preparation.sample import Encoder
from tide_megatron.data.sources.opening import ChatSource, FoundSources

BLOCK = 1000
"""Records that stand together in one part."""
_PACKAGES = ("text", "data")
_IN_WORDS = {
    "sides": "list of teachers",
    "normalized": "choice of --normalize",
    "learn": "choice of --learn",
    "sources": "list of files",
    "asked": "choice of columns or filters",
    "code": "release, Python or library",
}
_LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "jinja2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPart:
    """Which records one of several tasks encodes: every so many blocks."""

    number: int
    """From 1."""
    total: int

    @classmethod
    def read(cls, word: str) -> TaskPart:
        """Read K/N.

        Raises:
            ConfigError: not such a word.
        """
        number, _, total = word.partition("/")
        if not (number.isascii() and number.isdecimal() and total.isascii() and total.isdecimal()):
            raise ConfigError(f"part: {word!r} is no part; write K/N, as 1/4 for the first of four, or slurm")
        part = cls(number=int(number), total=int(total))
        if not 1 <= part.number <= part.total:
            raise ConfigError(f"part: {word} does not exist; parts go from 1/{total} to {total}/{total}")
        return part

    def takes(self, record: int) -> bool:
        """Say whether a record, by its number among all, belongs to it."""
        return record // BLOCK % self.total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One preparation."""

    encoder: Encoder
    found: FoundSources
    on_bad: OnBad
    part: TaskPart | None = None
    """None: all records."""

    def sources(self) -> list[ChatSource]:
        """Return the sources, not read yet."""
        return self.found.open()

    def description(self) -> dict[str, Any]:
        """Return what the manifest says that does not depend on the records."""
        encoder = self.encoder
        return {
            "tokenizer": dataclasses.asdict(TokenizerMetadata.of(encoder.tokenizer)),
            "max_length": encoder.window.max_length,
            "on_long": encoder.window.on_long.value,
            "normalized": encoder.reading.normalize,
            "learn": encoder.reading.learn.value,
            "sides": {
                name: {
                    "tokenizer": dataclasses.asdict(TokenizerMetadata.of(side.tokenizer)),
                    "max_length": encoder.side_length(name),
                }
                for name, side in encoder.sides.items()
            },
        }

    def identity(self) -> dict[str, Any]:
        """Return all that decides the bytes, but the records, as plain values."""
        return {
            **self.description(),
            "on_bad": self.on_bad.value,
            "sources": [source.name for source in self.sources()],
            "asked": self.found.said(),
            "part": str(self.part) if self.part else "",
            "block": BLOCK,
            "code": code_digest(),
        }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name in what two identities differ."""
    keys = (key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key))
    return [_IN_WORDS.get(key, key) for key in keys]


def code_files() -> list[Path]:
    """Return the sources and templates that decide what is written."""
    root = Path(tide_megatron.__file__).parent
    found = (file for package in _PACKAGES for file in (root / package).rglob("*"))
    return sorted(file for file in found if file.suffix in (".py", ".jinja"))


@functools.cache
def code_digest() -> str:
    """Name the code that cuts and aligns text, and the libraries that it uses (sha256, hexadecimal)."""
    found = hashlib.sha256(repr(sys.version_info[:3]).encode())
    root = Path(tide_megatron.__file__).parent
    for file in code_files():
        found.update(f"{file.relative_to(root)} {file.stat().st_size} ".encode() + file.read_bytes())
    for library in _LIBRARIES:
        found.update(f"{library} {importlib.metadata.version(library)} ".encode())
    return found.hexdigest()
