"""The manifest: what a prepared data folder says about itself.

It counts the samples, names the tokenizer by digest, and holds size and sha256 of every file, so that a
file that was cut or replaced is found when the folder is opened and not in the middle of a run. Its own
digest covers all of that: an edited manifest is refused too, and a run can remember one string.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from tide_megatron.base.errors import DataError
from tide_megatron.base.read import json_of
from tide_megatron.text.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"
FORMAT = "tide-columns"
VERSION = 1
_LATER: dict[str, Any] = {
    "sides": {},
    "source_names": [],
    "rejected": {},
    "normalized": False,
    "learn": "last",
    "unprompted": 0,
}
"""Keys that the first release lacked -> the value that says nothing."""
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerMetadata:
    """The tokenizer whose ids the columns hold."""

    name: str
    digest: str
    vocabulary_digest: str
    template_digest: str
    vocabulary_size: int
    mask_id: int
    eos_id: int
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerMetadata:
        """Describe a tokenizer; of its folder only the name, for data tells nothing about a machine."""
        return cls(
            name=Path(tokenizer.name).name,
            digest=tokenizer.digest,
            vocabulary_digest=tokenizer.vocabulary_digest,
            template_digest=tokenizer.chat.digest if tokenizer.chat else "",
            vocabulary_size=tokenizer.vocabulary_size,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    def differences(self, tokenizer: Tokenizer) -> list[str]:
        """Say in what a tokenizer is another one than this, the mask token first; none: it is this one."""
        if tokenizer.digest == self.digest:
            return []
        found = []
        for role in ("mask", "eos", "pad"):
            was, asked = getattr(self, f"{role}_id"), getattr(tokenizer, f"{role}_id")
            if was != asked:
                known = tokenizer.backend.special.get(was, "another vocabulary's")
                spelling = tokenizer.special_tokens[f"{role}_token"]
                found.append(
                    f"its {role} token has id {was} ({known}), this model's has {asked} ({spelling})"
                )
        if tokenizer.vocabulary_size != self.vocabulary_size:
            found.append(f"it has {self.vocabulary_size} ids, this model's {tokenizer.vocabulary_size}")
        return found or ["entries or template differ"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataStatistics:
    """Counts over the samples kept, and what happened to the others."""

    tokens: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    reply_bytes: int = 0
    longest: int = 0
    """Tokens of the longest sample."""
    truncated: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason -> records left out."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SideMetadata:
    """The same samples in a teacher's own tokens, and how well they align with the student's."""

    tokenizer: TokenizerMetadata
    max_length: int
    tokens: int = 0
    longest: int = 0
    """Teacher tokens of the longest sample."""
    chunks: int = 0
    """Runs of tokens of the learnt replies that spell the same bytes on both sides and cannot be cut
    further."""
    pairs: int = 0
    """Chunks of one token on each side."""
    aligned_bytes: int | None = 0
    """Bytes of reply text inside chunks; None: nobody has counted them, the data was taken apart."""
    cut: int = 0
    """Samples whose teacher tokens were cut, because of `max_length` or because the student's were."""
    without_chunks: int = 0
    """Samples of which nothing is aligned; they teach the student nothing about this teacher."""

    def share_of(self, reply_bytes: int) -> float | None:
        """Return which share of the replies' bytes is in chunks; None: nobody has counted them."""
        return None if self.aligned_bytes is None else self.aligned_bytes / max(1, reply_bytes)


def in_share(share: float | None) -> str:
    """Write a share for people."""
    return "an unknown share" if share is None else f"{share:.1%}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """Everything in `manifest.json` but its format line and its digest."""

    samples: int
    columns: dict[str, int]
    """Column -> number of int32 values in it."""
    files: dict[str, dict[str, Any]]
    """File name -> {bytes, sha256}."""
    tokenizer: TokenizerMetadata
    max_length: int
    on_long: str
    sources: list[dict[str, Any]]
    """Per source file: name, bytes, sha256, records."""
    statistics: DataStatistics
    sides: dict[str, SideMetadata] = dataclasses.field(default_factory=dict)
    """TeacherTokens name -> a teacher's tokenizer that the samples were also prepared for."""
    source_names: list[str] = dataclasses.field(default_factory=list)
    """What the numbers in the column `source` mean; empty: all samples are of one source, and there is no
    such column."""
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    """Kind of fault -> bad records that were left out; rejects.jsonl has their lines."""
    normalized: bool = False
    """Whether texts were put into NFC first."""
    learn: str = "last"
    """Which replies of a conversation are learnt."""
    unprompted: int | None = 0
    """Earlier replies that the student's template writes without their generation prompt: they are learnt
    from their content on. None: the data was divided, and nobody knows."""

    @property
    def digest(self) -> str:
        """Name the data set by content (sha256, hexadecimal)."""
        return _digest(self._content)

    @property
    def _content(self) -> dict[str, Any]:
        """Everything as plain values; keys that the first release lacked only where they say something."""
        content = dataclasses.asdict(self)
        return {key: value for key, value in content.items() if key not in _LATER or value != _LATER[key]}

    def side_of(self, tokenizer_digest: str) -> str | None:
        """Return the side that was prepared with this tokenizer and template, if there is one."""
        found = (name for name, side in self.sides.items() if side.tokenizer.digest == tokenizer_digest)
        return next(found, None)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        content = {"format": FORMAT, "version": VERSION, **self._content, "digest": self.digest}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        DataError: it is missing, broken, of another format or version, was edited, or holds what cannot be.
    """
    file = folder / MANIFEST_FILE
    try:
        content = json_of(file)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no prepared data ({MANIFEST_FILE} is missing): run `tide prepare`"
        ) from None
    except ValueError as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}): prepare the data again") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise DataError(f"{file}: not a manifest of prepared data: prepare the data again")
    version = content.pop("version", None)
    if version != VERSION:
        raise DataError(
            f"{file}: format version {version}, this release reads {VERSION}: prepare the data again"
        )
    if content.pop("digest", None) != _digest(content):
        raise DataError(f"{file}: was edited after preparation (its digest differs): prepare the data again")
    try:
        return Manifest(**content)
    except ValidationError as error:
        fault = error.errors()[0]
        key, value = ".".join(map(str, fault["loc"])), f" ({fault['input']!r})" * (fault["type"] != "missing")
        raise DataError(f"{file}: {key}: {fault['msg']}{value}: prepare the data again") from None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
