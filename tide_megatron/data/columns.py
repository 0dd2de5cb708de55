"""Columns on disk: one megatron-core IndexedDataset (`.bin` + `.idx`, int32) per column, and a manifest.

A sample is one row of every column, and every column is ragged:

    ids          the tokens of the conversation, unpadded
    replies      half-open ranges of `ids` that may be masked, flat: start, end, start, end, ...
    reply_bytes  one number: UTF-8 bytes of the reply's text
    cut          one number: 1 where `max_length` cut the conversation, so that no end follows; only in data
                 that was prepared with `on_long` = truncate
    source       one number: which of the manifest's `source_names` it is from (only where there are several)

and for every side, a teacher with its own tokenizer or template, under the side's name:

    NAME.ids      its tokens of the same conversation
    NAME.replies  as above, in these
    NAME.cut      as above
    NAME.chunks   aligned runs of the learnt reply, flat: student start, end, teacher start, end, ...

Labels are not stored: they follow from `ids` and `replies`, which also leaves room for several replies in a
conversation. Padding is not stored either; it depends on a run's block size and is the loader's.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import numpy
from numpy.typing import NDArray

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # isort: skip


from tide_megatron.base.errors import DataError
from tide_megatron.base.files import digest_of
from tide_megatron.data.manifest import Manifest, read_manifest
from tide_megatron.data.side import CUT_COLUMN
from tide_megatron.text.tokenizer import Tokenizer

SOURCE = "source"
HASHED_AT_OPEN_BYTES = 64 * 2**20
"""Data sets up to this size are compared with their digests whenever they are opened (a fifth of a
second)."""


class ColumnWriter:
    """Writes columns row by row into an existing folder; `finish` closes them and digests the files."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._builders = {
            name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=numpy.int32) for name in names
        }
        self._values = dict.fromkeys(self._builders, 0)
        self.samples = 0

    def add(self, row: Mapping[str, Sequence[int] | NDArray[numpy.int32]]) -> None:
        """Append one sample: a value for every column."""
        assert row.keys() == self._builders.keys(), f"columns {set(self._builders)}, row {set(row)}"
        for name, values in row.items():
            self._builders[name].add_document(numpy.asarray(values, dtype=numpy.int32), [len(values)])
            self._values[name] += len(values)
        self.samples += 1

    def add_column(self, name: str, values: Sequence[int]) -> None:
        """Write a column of one number a sample that was not known before all samples were."""
        assert len(values) == self.samples, f"{len(values)} values of {self.samples} samples"
        builder = IndexedDatasetBuilder(str(self._folder / f"{name}.bin"), dtype=numpy.int32)
        self._builders[name], self._values[name] = builder, len(values)
        for value in values:
            builder.add_document(numpy.asarray([value], dtype=numpy.int32), [1])

    def finish(self) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
        """Write the indices; return values per column and {bytes, sha256} per file."""
        for name, builder in self._builders.items():
            builder.finalize(str(self._folder / f"{name}.idx"))
        files = [f"{name}.{ending}" for name in self._builders for ending in ("bin", "idx")]
        return dict(self._values), {
            file: {"bytes": (self._folder / file).stat().st_size, "sha256": digest_file(self._folder / file)}
            for file in files
        }

    def close(self) -> None:
        """Close the files without finishing, so that an abandoned folder can be removed."""
        for builder in self._builders.values():
            builder.data_file.close()


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
        is_compared = total_bytes <= HASHED_AT_OPEN_BYTES if compare_digests is None else compare_digests
        for name, recorded in self.manifest.files.items():
            _check_file(self.folder / name, recorded, is_compared=is_compared)
        self._readers = {
            name: _open_column(self.folder, name, self.manifest) for name in self.manifest.columns
        }
        self._check_spans("")
        self._check_sources()
        for name in self.manifest.sides:
            self._check_spans(f"{name}.")
            self._check_chunks(name)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.manifest.samples

    def row(self, sample: int) -> dict[str, NDArray[numpy.int32]]:
        """Return one sample's values in every column (copies: they outlive the memory map)."""
        return {name: numpy.array(reader[sample]) for name, reader in self._readers.items()}

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

    def is_cut(self, row: Mapping[str, NDArray[numpy.int32]], side: str | None = None) -> bool:
        """Say whether `max_length` cut a sample's tokens, so that no end token may follow them.

        Data of earlier releases does not say it sample by sample: where some were cut, those that are as long
        as a cut one count, on their sides too.

        Args:
            row: what `row` returned.
            side: whose tokens; None: the student's.
        """
        name = f"{side}.{CUT_COLUMN}" if side else CUT_COLUMN
        if name in row:
            return bool(row[name][0])
        manifest = self.manifest
        return manifest.statistics.truncated > 0 and len(row["ids"]) >= manifest.max_length

    @functools.cached_property
    def sources(self) -> tuple[tuple[str, ...], NDArray[numpy.int64]]:
        """Names of the sources, and for every sample the number of its own in them.

        Data of earlier releases has no such column: its files are the sources, where the records of each are
        known by their number; else all is of one source, which is named after the files.
        """
        manifest, files = self.manifest, [str(source["name"]) for source in self.manifest.sources]
        if SOURCE in self._readers:
            _, _, values = self._whole_column("ids", SOURCE)
            return tuple(manifest.source_names), values.astype(numpy.int64)
        records = [int(source["records"]) for source in manifest.sources]
        if sum(records) == len(self) and len(files) > 1 and not manifest.rejected:
            return tuple(numbered(files)), numpy.repeat(numpy.arange(len(files)), records)
        return (" + ".join(dict.fromkeys(files)),), numpy.zeros(len(self), dtype=numpy.int64)

    def _check_sources(self) -> None:
        """Refuse numbers that no source has."""
        if SOURCE not in self._readers:
            return
        _, counts, values = self._whole_column("ids", SOURCE)
        names = len(self.manifest.source_names)
        if (counts != 1).any() or values.min(initial=0) < 0 or values.max(initial=-1) >= names:
            raise DataError(
                f"{self.folder}: column {SOURCE} has numbers outside its {names} sources: "
                "prepare the data again"
            )

    def _check_spans(self, side: str) -> None:
        """Refuse columns whose rows cannot belong together: replies outside the tokens."""
        lengths, counts, spans = self._whole_column(f"{side}ids", f"{side}replies")
        ends = spans[numpy.cumsum(counts, dtype=numpy.int64) - 1]
        bad = numpy.flatnonzero((counts < 2) | (counts % 2 != 0) | (ends > lengths) | (ends < 1))
        if bad.size:
            raise DataError(
                f"{self.folder}: columns {side}ids and {side}replies disagree at sample {bad[0]} "
                f"({lengths[bad[0]]} tokens, a reply that ends at {ends[bad[0]]}): prepare the data again"
            )

    def _check_chunks(self, side: str) -> None:
        """Refuse chunks that end outside either side's tokens."""
        lengths, counts, places = self._whole_column(f"{side}.ids", f"{side}.chunks")
        bad = numpy.flatnonzero(counts % 4)
        if not bad.size:
            sample = numpy.repeat(numpy.arange(len(counts)), counts // 4)
            spans = places.reshape(-1, 4)
            outside = (spans[:, 1] > self._readers["ids"].sequence_lengths[sample]) | (
                spans[:, 3] > lengths[sample]
            )
            empty = (spans[:, 0] >= spans[:, 1]) | (spans[:, 2] >= spans[:, 3]) | (spans.min(axis=1) < 0)
            bad = sample[outside | empty]
        if bad.size:
            raise DataError(
                f"{self.folder}: column {side}.chunks of sample {bad[0]} points outside the tokens: "
                "prepare the data again"
            )

    def _whole_column(self, ids: str, ragged: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the token counts of a column of ids, and counts and values of another column."""
        counts = self._readers[ragged].sequence_lengths
        values: NDArray[Any] = numpy.empty(0, dtype=numpy.int32)
        if counts.any():  # an empty file cannot be mapped
            values = numpy.memmap(self.folder / f"{ragged}.bin", dtype=numpy.int32, mode="r")
        return self._readers[ids].sequence_lengths, counts, values


def numbered(names: Sequence[str]) -> list[str]:
    """Return names that differ: the second `a` is `a#2`."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def digest_file(file: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    return digest_of(file)[1]


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
    values = int(reader.sequence_lengths.sum(dtype=numpy.int64))
    if len(reader) != manifest.samples or values != manifest.columns[name]:
        raise DataError(
            f"{folder / name}.idx: {len(reader)} samples with {values} values, the manifest says "
            f"{manifest.samples} with {manifest.columns[name]}: the columns disagree; prepare the data again"
        )
    return reader
