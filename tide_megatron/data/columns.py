"""Columns on disk: one megatron-core IndexedDataset (`.bin` + `.idx`, int32) per column, and a manifest.

A sample is one row of every column, and every column is ragged:

    ids          the tokens of the conversation, unpadded
    replies      half-open ranges of `ids` that may be masked, ascending, flat: start, end, start, end, ...
    reply_bytes  one number: UTF-8 bytes of the replies' texts
    cut          one number: 1 where `max_length` cut the conversation, so that no end follows; only in data
                 that was prepared with `on_long` = truncate
    source       one number: which of the manifest's `source_names` it is from (only where there are several)

and for every side, a teacher with its own tokenizer or template, under the side's name:

    NAME.ids      its tokens of the same conversation
    NAME.replies  as above, in these
    NAME.cut      as above
    NAME.chunks   aligned runs of the learnt replies, flat: student start, end, teacher start, end, ...

Labels are not stored: they follow from `ids` and `replies`, which also leaves room for several replies in a
conversation. Padding is not stored either; it depends on a run's block size and is the loader's.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import numpy
from numpy.typing import NDArray

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # isort: skip


from tide_megatron.base.files import digest_of

SOURCE = "source"


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
