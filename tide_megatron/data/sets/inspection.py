"""What is in a prepared data folder: counts, lengths, coverage, and single samples, in flat memory.

Only the manifest and the files of columns are read; nothing is opened for training, so torch is not needed.
The folder holds no tokenizer: who wants to see text names it, and it must be the one that made the ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tide_megatron.base.errors import DataError
from tide_megatron.data.columns import SOURCE, ColumnFile, pieces_of
from tide_megatron.data.manifest import Manifest, TokenizerMetadata, read_manifest
from tide_megatron.text.tokenizer import Tokenizer

BARS = 32
"""Of a histogram."""
_INT32 = numpy.dtype("<i4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How many tokens samples have, on one side."""

    edges: list[int]
    """[bars + 1]: a bar counts lengths from its edge on, below the next."""
    counts: list[int]
    """[bars] samples."""
    median: int
    nine_of_ten: int
    longest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How well a side's tokens align with the student's."""

    chunks: int
    single: int
    """Of one token on each side."""
    equal: int
    """Of these, of the same id."""
    share_of_bytes: float | None
    """Of the replies' bytes, those in chunks; None: nobody has counted them."""
    without_chunks: int
    """Samples."""
    cut: int
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of the whole folder."""

    manifest: Manifest
    lengths: dict[str, Lengths]
    """By side; the student's under the empty name."""
    coverage: dict[str, Coverage]
    sources: dict[str, int]
    """Name -> samples; empty: all are of one source that no record names."""

    def values(self) -> dict[str, Any]:
        """Return it as plain values, for programs."""
        manifest = self.manifest
        return {
            "samples": manifest.samples,
            "digest": manifest.digest,
            "statistics": dataclasses.asdict(manifest.statistics),
            "rejected": manifest.rejected,
            "max_length": manifest.max_length,
            "on_long": manifest.on_long,
            "tokenizer": dataclasses.asdict(manifest.tokenizer),
            "files": manifest.sources,
            "sources": self.sources,
            "lengths": {side: dataclasses.asdict(found) for side, found in self.lengths.items()},
            "teachers": {side: dataclasses.asdict(found) for side, found in self.coverage.items()},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a sample, as it is shown."""

    text: str
    """What it spells, or its id."""
    id: int
    chunk: int | None
    """Number of the chunk that it is in; None: of none."""
    is_learnt: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownSample:
    """A sample as the student and the sides see it."""

    number: int
    source: str
    student: list[Token]
    """Its chunks are those of the first side."""
    sides: dict[str, tuple[list[Token], list[Token]]]
    """Name -> the student's tokens and the side's, both with the numbers of this side's chunks."""


class Inspection:
    """A data folder to be looked at.

    Args:
        folder: what `prepare` wrote.

    Raises:
        DataError: it is none, or its files are not those of its manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._columns = {name: self._opened(name) for name in self.manifest.columns}

    def _opened(self, name: str) -> ColumnFile:
        for file in (f"{name}.bin", f"{name}.idx"):
            path, wanted = self.folder / file, self.manifest.files[file]["bytes"]
            if not path.is_file() or path.stat().st_size != wanted:
                raise DataError(
                    f"{path}: is missing or has not the {wanted} bytes of its manifest: copy it again"
                )
        column = ColumnFile(self.folder, name)
        if column.samples != self.manifest.samples:
            raise DataError(
                f"{self.folder / name}.idx: {column.samples} samples, the manifest says "
                f"{self.manifest.samples}: prepare the data again"
            )
        return column

    def facts(self) -> DataFacts:
        """Read what is known of the whole folder."""
        manifest = self.manifest
        return DataFacts(
            manifest=manifest,
            lengths={side: self._lengths(side) for side in ("", *manifest.sides)},
            coverage={side: self._coverage(side) for side in manifest.sides},
            sources=self._sources(),
        )

    def sample(self, number: int, tokenizers: Mapping[str, Tokenizer]) -> ShownSample:
        """Return a sample as it is shown.

        Args:
            number: of the sample, from 0.
            tokenizers: by side; the student's under the empty name. A side without one is shown as ids.

        Raises:
            DataError: there is no such sample, or a tokenizer is another one than made the ids.
        """
        if not 0 <= number < self.manifest.samples:
            raise DataError(f"{self.folder}: no sample {number}; it has 0 to {self.manifest.samples - 1}")
        self._check_tokenizers(tokenizers)
        sides = {}
        for name in self.manifest.sides:
            chunks = self._row(f"{name}.chunks", number).reshape(-1, 4)
            sides[name] = (
                self._tokens("", number, chunks[:, :2], tokenizers.get("")),
                self._tokens(name, number, chunks[:, 2:], tokenizers.get(name)),
            )
        none: NDArray[Any] = numpy.empty((0, 2), dtype=numpy.int32)
        student = next((pair[0] for pair in sides.values()), None)
        names = self.manifest.source_names
        return ShownSample(
            number=number,
            source=names[int(self._row(SOURCE, number)[0])] if names else "",
            student=student or self._tokens("", number, none, tokenizers.get("")),
            sides=sides,
        )

    def _check_tokenizers(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        made_with: dict[str, TokenizerMetadata] = {"": self.manifest.tokenizer}
        made_with |= {name: side.tokenizer for name, side in self.manifest.sides.items()}
        for name, tokenizer in tokenizers.items():
            if name not in made_with:
                known = ", ".join(self.manifest.sides) or "none"
                raise DataError(f"{self.folder}: has no teacher {name!r}; its teachers: {known}")
            if found := made_with[name].differences(tokenizer):
                who = f"teacher {name}" if name else "the student"
                raise DataError(
                    f"{tokenizer.name}: is not the tokenizer and template that {who} of {self.folder} was "
                    f"prepared with ({'; '.join(found)}): name that one, or none to see ids"
                )

    def _row(self, column: str, number: int) -> NDArray[numpy.int32]:
        return self._columns[column].values(number, number + 1)

    def _tokens(
        self, side: str, number: int, spans: NDArray[Any], tokenizer: Tokenizer | None
    ) -> list[Token]:
        """Return a side's tokens, with the numbers of the chunks that they are in."""
        prefix = f"{side}." if side else ""
        ids = self._row(f"{prefix}ids", number).tolist()
        replies = self._row(f"{prefix}replies", number).reshape(-1, 2)
        chunk = _inside(spans, len(ids))
        learnt = _inside(replies, len(ids))
        return [
            Token(
                text=str(id_) if tokenizer is None else spelling(tokenizer, id_),
                id=id_,
                chunk=int(chunk[place]) if chunk[place] >= 0 else None,
                is_learnt=bool(learnt[place] >= 0),
            )
            for place, id_ in enumerate(ids)
        ]

    def _lengths(self, side: str) -> Lengths:
        column, counts = self._columns[f"{side}.ids" if side else "ids"], numpy.zeros(1, dtype=numpy.int64)
        for first in range(0, column.samples, 2**20):
            more = numpy.bincount(column.lengths[first : first + 2**20], minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        longest = len(counts) - 1
        width = -(-(longest + 1) // BARS)
        edges = list(range(0, longest + width + 1, width))
        sums = numpy.add.reduceat(counts, edges[:-1])
        up_to = numpy.cumsum(counts)
        return Lengths(
            edges=edges,
            counts=sums.tolist(),
            median=_quantile(up_to, 0.5),
            nine_of_ten=_quantile(up_to, 0.9),
            longest=longest,
        )

    def _coverage(self, name: str) -> Coverage:
        side, single = self.manifest.sides[name], 0
        for piece in pieces_of(self._columns[f"{name}.chunks"].path, _INT32):
            starts, ends = piece[::2], piece[1::2]
            single += int(((ends - starts).reshape(-1, 2) == 1).all(axis=1).sum())
        return Coverage(
            chunks=side.chunks,
            single=single,
            equal=side.pairs,
            share_of_bytes=side.share_of(self.manifest.statistics.reply_bytes),
            without_chunks=side.without_chunks,
            cut=side.cut,
            tokens=side.tokens,
        )

    def _sources(self) -> dict[str, int]:
        names = self.manifest.source_names
        if not names:
            return {}
        counts = numpy.zeros(len(names), dtype=numpy.int64)
        for piece in pieces_of(self._columns[SOURCE].path, _INT32):
            counts += numpy.bincount(piece, minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """Return what a token adds to a text; bytes that are no whole characters as <E4 BD>."""
    if not tokenizer.has(token):
        return f"<{token}?>"
    if tokenizer.is_special(token):
        return tokenizer.decode([token], keep_special=True)
    try:
        data = tokenizer.token_bytes(token)
    except DataError:  # a token without bytes
        return f"<{token}>"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"<{data.hex(' ').upper()}>"


def _inside(spans: NDArray[Any], length: int) -> NDArray[numpy.int64]:
    """Return for every place the number of the span that it is in; -1: of none."""
    found = numpy.full(length, -1, dtype=numpy.int64)
    for number, (start, end) in enumerate(spans.tolist()):
        found[start:end] = number
    return found


def _quantile(up_to: NDArray[Any], share: float) -> int:
    """Return the smallest length that so many samples do not exceed."""
    return int(numpy.searchsorted(up_to, share * up_to[-1])) if up_to[-1] else 0


def shares(facts: DataFacts) -> Sequence[tuple[str, int]]:
    """Return what became of all records: kept, cut, and left out by reason."""
    manifest = facts.manifest
    left_out = [*manifest.statistics.skipped.items(), *manifest.rejected.items()]
    return [("kept", manifest.samples), ("kept, cut", manifest.statistics.truncated), *left_out]
