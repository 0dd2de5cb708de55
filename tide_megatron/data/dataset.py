"""Prepared data, opened: what `data.columns` wrote, read row by row through memory maps.

All ranks of a node map the same files, so their pages are in memory once. Opening looks at the manifest, at
sizes, and at the ends of the indices, which takes as long for ten million samples as for ten; what small data
sets hold is checked as a whole besides (`HASHED_AT_OPEN_BYTES`). Of larger ones, each row is checked when it
is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import numpy
from numpy.typing import NDArray

from megatron.core.datasets.indexed_dataset import IndexedDataset  # isort: skip


from tide_megatron.base.errors import DataError
from tide_megatron.data.columns import CUT_COLUMN, SOURCE, digest_file, numbered
from tide_megatron.data.manifest import Manifest, SideMetadata, TokenizerMetadata, read_manifest
from tide_megatron.data.order import samples_at
from tide_megatron.text.tokenizer import Tokenizer

HASHED_AT_OPEN_BYTES = 64 * 2**20
"""Data sets up to this size are compared with their digests, and their rows with each other, whenever they
are opened (a fifth of a second)."""
Row = Mapping[str, NDArray[numpy.int32]]
"""One sample's values in every column."""


class PreparedData:
    """A prepared data folder, opened and checked; rows are read when asked for.

    Args:
        folder: what `prepare` wrote.
        tokenizer: of the model that will read the ids; None: not compared.
        compare_digests: read every file and compare its sha256; None: only small data sets
            (HASHED_AT_OPEN_BYTES). Sizes are always compared.

    Raises:
        DataError: a file is missing, cut, changed or disagrees with the others, or the data was prepared
            with another tokenizer. Names the file and the remedy.
    """

    def __init__(
        self, folder: Path, *, tokenizer: Tokenizer | None = None, compare_digests: bool | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        prepared_with = self.manifest.tokenizer
        if tokenizer is not None and (differences := prepared_with.differences(tokenizer)):
            raise DataError(
                f"{self.folder}: prepared with another tokenizer or chat template "
                f"({prepared_with.name}, digest {prepared_with.digest[:12]}, not {tokenizer.digest[:12]}; "
                f"{'; '.join(differences)}): prepare the data again with this model's tokenizer"
            )
        total_bytes = sum(recorded["bytes"] for recorded in self.manifest.files.values())
        self._is_checked = total_bytes <= HASHED_AT_OPEN_BYTES
        is_compared = self._is_checked if compare_digests is None else compare_digests
        for name, recorded in self.manifest.files.items():
            _check_file(self.folder / name, recorded, is_compared=is_compared)
        self._readers = {
            name: _open_column(self.folder, name, self.manifest) for name in self.manifest.columns
        }
        if self._is_checked:
            names = [name for name in self._readers if not name.endswith("ids")]
            self._check(
                {name: self._counts(name) for name in self._readers},
                {name: self._values(name) for name in names},
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.manifest.samples

    def row(self, sample: int) -> Row:
        """Return one sample's values in every column (copies: they outlive the memory map).

        Data of earlier releases does not say sample by sample which ones `max_length` cut: where some were,
        those that are as long as a cut one count, on their sides too.

        Raises:
            DataError: they do not belong together.
        """
        row = {name: numpy.array(reader[sample]) for name, reader in self._readers.items()}
        if not self._is_checked:
            counts = {name: numpy.array([len(values)]) for name, values in row.items()}
            self._check(counts, row, first=sample)
        manifest = self.manifest
        is_cut = manifest.statistics.truncated > 0 and len(row["ids"]) >= manifest.max_length
        for prefix in ("", *(f"{side}." for side in self.sides)):
            row.setdefault(f"{prefix}{CUT_COLUMN}", numpy.array([is_cut], dtype=numpy.int32))
        return row

    def lengths(self, samples: Sequence[int], sides: Sequence[str | None]) -> NDArray[numpy.int64]:
        """Return how many tokens samples have, [samples, sides], without reading them.

        Args:
            samples: their numbers.
            sides: whose tokens; None: the student's.
        """
        columns = [self._readers[f"{side}.ids" if side else "ids"] for side in sides]
        return numpy.stack([column.sequence_lengths[list(samples)] for column in columns], axis=1).astype(
            numpy.int64
        )

    def spread(self, most: int, side: str | None = None) -> NDArray[numpy.int64]:
        """Return about `most` samples, evenly from the whole; all, where there are no more.

        Args:
            most: so many.
            side: that they have; all have all.
        """
        return numpy.arange(0, len(self), -(-len(self) // most))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of its sources."""
        return self.sources_of(numpy.zeros(0, dtype=numpy.int64))[0]

    def sources_of(self, samples: NDArray[numpy.int64]) -> tuple[tuple[str, ...], NDArray[numpy.int64]]:
        """Return names of the sources, and the number of each sample's own in them.

        Data of earlier releases has no such column: its files are the sources, where the records of each are
        known by their number; else all is of one source, which is named after the files.
        """
        manifest, files = self.manifest, [str(source["name"]) for source in self.manifest.sources]
        if SOURCE in self._readers:
            return tuple(manifest.source_names), self._values(SOURCE)[samples].astype(numpy.int64)
        records = [int(source["records"]) for source in manifest.sources]
        if sum(records) == len(self) and len(files) > 1 and not manifest.rejected:
            ends = numpy.cumsum(records)
            return tuple(numbered(files)), numpy.searchsorted(ends, samples, side="right")
        return (" + ".join(dict.fromkeys(files)),), numpy.zeros(len(samples), dtype=numpy.int64)

    def epochs(self, positions: int) -> dict[str, float]:
        """Return how often it was read where a run stands, under its folder's name."""
        return {self.folder.name: positions / len(self)}

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.folder)

    def where(self, sample: int) -> str:
        """Say where a sample is."""
        return f"{self.folder}: sample {sample}"

    @property
    def digest(self) -> str:
        """Name of what is in it, by content."""
        return self.manifest.digest

    def longest(self, side: str | None) -> int:
        """Return the most tokens of a sample, of a side or (None) the student's."""
        return self.manifest.sides[side].longest if side else self.manifest.statistics.longest

    def tokenizer_of(self, side: str | None) -> TokenizerMetadata:
        """Describe the tokenizer of a side, or (None) the student's."""
        return self.manifest.sides[side].tokenizer if side else self.manifest.tokenizer

    @property
    def sides(self) -> Mapping[str, SideMetadata]:
        """Name -> a teacher's tokenizer that the samples were also prepared for."""
        return self.manifest.sides

    def side_of(self, tokenizer_digest: str) -> str | None:
        """Return the side that was prepared with this tokenizer and template, if there is one."""
        return self.manifest.side_of(tokenizer_digest)

    def samples_at(self, seed: int, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Return (sample, epoch) at positions of a run that reads all samples over and over, shuffled."""
        return samples_at(seed, positions, len(self))

    def _check(
        self, counts: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]], first: int = 0
    ) -> None:
        """Refuse rows whose columns cannot belong together.

        Args:
            counts: column -> how many values each of these rows has in it.
            values: column -> the values, rows one behind the other; those of ids are not looked at.
            first: number of the first row.
        """
        ours = counts["ids"]
        for side in ("", *(f"{name}." for name in self.sides)):
            lengths, held = counts[f"{side}ids"], counts[f"{side}replies"]
            spans, behind = values[f"{side}replies"], numpy.cumsum(held, dtype=numpy.int64)
            ends = spans[behind - 1] if len(spans) else numpy.zeros_like(held)
            falls = numpy.flatnonzero(spans[1:] < spans[:-1]) + 1  # values below the one before
            descends = numpy.zeros(len(held), dtype=bool)
            descends[behind.searchsorted(falls[~numpy.isin(falls, behind)], "right")] = True
            bad = numpy.flatnonzero((held < 2) | (held % 2 != 0) | (ends > lengths) | (ends < 1) | descends)
            if bad.size:
                raise DataError(
                    f"{self.folder}: columns {side}ids and {side}replies disagree at sample "
                    f"{first + bad[0]} ({lengths[bad[0]]} tokens, a reply that ends at {ends[bad[0]]}): "
                    "prepare the data again"
                )
            if not side:
                continue
            bad = _bad_chunks(ours, lengths, counts[f"{side}chunks"], values[f"{side}chunks"])
            if bad.size:
                raise DataError(
                    f"{self.folder}: column {side}chunks of sample {first + bad[0]} points outside the "
                    "tokens: prepare the data again"
                )
        if SOURCE in counts:
            self._check_sources(counts[SOURCE], values[SOURCE])

    def _check_sources(self, counts: NDArray[Any], values: NDArray[Any]) -> None:
        """Refuse numbers that no source has."""
        names = len(self.manifest.source_names)
        if (counts != 1).any() or values.min(initial=0) < 0 or values.max(initial=-1) >= names:
            raise DataError(
                f"{self.folder}: column {SOURCE} has numbers outside its {names} sources: "
                "prepare the data again"
            )

    def _counts(self, column: str) -> NDArray[Any]:
        """Return how many values each sample has in a column."""
        counts: NDArray[Any] = self._readers[column].sequence_lengths
        return counts

    def _values(self, column: str) -> NDArray[Any]:
        """Return all values of a column, mapped."""
        if not self._counts(column).any():  # an empty file cannot be mapped
            return numpy.empty(0, dtype=numpy.int32)
        return numpy.memmap(self.folder / f"{column}.bin", dtype=numpy.int32, mode="r")


def _bad_chunks(
    students: NDArray[Any], teachers: NDArray[Any], counts: NDArray[Any], places: NDArray[Any]
) -> NDArray[Any]:
    """Return the rows whose chunks are none, or end outside either side's tokens.

    Args:
        students: [rows] tokens of the student's.
        teachers: [rows] tokens of the side's.
        counts: [rows] numbers in `places`, four a chunk.
        places: the chunks of all rows.
    """
    bad = numpy.flatnonzero(counts % 4)
    if bad.size:
        return bad
    row = numpy.repeat(numpy.arange(len(counts)), counts // 4)
    spans = places.reshape(-1, 4)
    outside = (spans[:, 1] > students[row]) | (spans[:, 3] > teachers[row])
    empty = (spans[:, 0] >= spans[:, 1]) | (spans[:, 2] >= spans[:, 3])
    return row[outside | empty | (spans < 0).any(axis=1)]


def _check_file(file: Path, recorded: Mapping[str, Any], *, is_compared: bool) -> None:
    """Compare one file with the manifest."""
    if not file.is_file():
        raise DataError(f"{file}: missing: prepare the data again or copy the whole folder")
    size = file.stat().st_size
    if size != recorded["bytes"]:
        change = "cut" if size < recorded["bytes"] else "changed"
        raise DataError(
            f"{file}: {size} bytes, the manifest says {recorded['bytes']}: it was {change} after "
            "preparation; copy it again or prepare the data again"
        )
    if is_compared and digest_file(file) != recorded["sha256"]:
        raise DataError(
            f"{file}: its content changed after preparation (sha256 differs): prepare the data again"
        )


def _open_column(folder: Path, name: str, manifest: Manifest) -> Any:
    """Open one column and compare its counts with the manifest."""
    try:
        reader = IndexedDataset(str(folder / name), mmap=True)
    except Exception as error:  # megatron-core asserts, struct and numpy complain, each in its own way
        raise DataError(f"{folder / name}.idx: not an index ({error}): prepare the data again") from None
    lengths, starts = reader.index.sequence_lengths, reader.index.sequence_pointers
    values = int(starts[-1]) // lengths.itemsize + int(lengths[-1]) if len(lengths) else 0
    if len(reader) != manifest.samples or values != manifest.columns[name]:
        raise DataError(
            f"{folder / name}.idx: {len(reader)} samples with {values} values, the manifest says "
            f"{manifest.samples} with {manifest.columns[name]}: the columns disagree; prepare the data again"
        )
    return reader
