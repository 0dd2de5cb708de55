"""Data sets of one tokenizer, window and set of teachers, one behind the other, copied by bytes.

Counts are added, what was read is listed, and every sample keeps the name of its source: names that records
gave mean the same in all sets, a file's name means that file.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tide_megatron.base.errors import DataError
from tide_megatron.base.unfinished import Unfinished
from tide_megatron.data.columns import SOURCE, ColumnFile, ColumnWriter
from tide_megatron.data.manifest import DataStatistics, Manifest, SideMetadata, read_manifest
from tide_megatron.data.preparation.part import check_files
from tide_megatron.data.preparation.rejects import REJECTS_FILE, OnBad, Rejects

_EQUAL = ("tokenizer", "max_length", "on_long", "normalized", "learn")
"""What the manifests must agree in, beside the sides."""
_SAMPLES = 2**18
"""Samples whose lengths are in memory at a time."""


class DataSet:
    """A data folder that is read from its first sample to its last.

    Args:
        folder: what `prepare` wrote.

    Raises:
        DataError: it is none, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)

    def open(self) -> None:
        """Compare all files with their digests, and open them.

        Raises:
            DataError: one is not what was written.
        """
        check_files(self.folder, self.manifest.files)
        self.columns = {name: ColumnFile(self.folder, name) for name in self.manifest.columns}

    @property
    def source_names(self) -> list[str]:
        """Names of its sources; of data whose records name none, one for all its files."""
        files = [str(source["name"]) for source in self.manifest.sources]
        return self.manifest.source_names or [" + ".join(dict.fromkeys(files))]

    def source_numbers(self, first: int, last: int) -> NDArray[numpy.int32]:
        """Return the numbers of the sources of samples first <= n < last."""
        if SOURCE in self.columns:
            return self.columns[SOURCE].values(first, last)
        return numpy.zeros(last - first, dtype=numpy.int32)


def checked_sets(folders: Sequence[Path]) -> list[DataSet]:
    """Read the manifests of data sets.

    Raises:
        DataError: they cannot be one data set.
    """
    sets = [DataSet(folder) for folder in folders]
    first = sets[0]
    for other in sets[1:]:
        one, two = comparable(first.manifest), comparable(other.manifest)
        if found := [key for key in dict.fromkeys((*one, *two)) if one.get(key) != two.get(key)]:
            key = found[0]
            raise DataError(
                f"{other.folder}: {key} differs from {first.folder} ({two.get(key)}, not {one.get(key)}): "
                "prepare it as that one was, or train with both folders"
            )
    return sets


def comparable(manifest: Manifest) -> dict[str, Any]:
    """Return what data sets must have in common, by a name for messages."""
    found: dict[str, Any] = {key: getattr(manifest, key) for key in _EQUAL}
    found["tokenizer"] = f"{manifest.tokenizer.name}, digest {manifest.tokenizer.digest[:12]}"
    for name, side in manifest.sides.items():
        words = f"{side.tokenizer.name}, digest {side.tokenizer.digest[:12]}, max_length {side.max_length}"
        found[f"teacher {name}"] = words
    return found | {"columns": sorted(manifest.columns.keys() - {SOURCE})}


def merge_sets(sets: Sequence[DataSet], work: Unfinished) -> Manifest:
    """Put data sets together in a folder; return the manifest (not written yet).

    Args:
        sets: in the order of their samples.
        work: the folder, begun.

    Raises:
        DataError: one is damaged.
    """
    names = [name for name in sets[0].manifest.columns if name != SOURCE]
    writer, rejects = ColumnWriter(work.data, names, work.spool), Rejects(work.data, work.spool, OnBad.SKIP)
    table, source_names = _numbers_of(sets)
    try:
        for data in sets:
            data.open()
            for first in range(0, data.manifest.samples, _SAMPLES):
                last = min(first + _SAMPLES, data.manifest.samples)
                for name in names:
                    column = data.columns[name]
                    writer.extend(name, column.lengths[first:last], column.pieces(first, last))
            if (data.folder / REJECTS_FILE).is_file():
                with (data.folder / REJECTS_FILE).open("rb") as lines:
                    for line in lines:
                        rejects.write(line, 0)
        rejects.close()
        if len(source_names) > 1 or any(data.manifest.source_names for data in sets):
            writer.add_column(SOURCE, _source_column(sets, table))
        else:
            source_names = []
        columns, files = writer.finish()
    finally:
        writer.abandon()
        rejects.abandon()
    manifests = [data.manifest for data in sets]
    rejected = _summed(manifest.rejected for manifest in manifests)
    return dataclasses.replace(
        manifests[0],
        samples=writer.samples,
        columns=columns,
        files=files,
        sources=[source for manifest in manifests for source in manifest.sources],
        statistics=_statistics([manifest.statistics for manifest in manifests]),
        sides={name: _side([manifest.sides[name] for manifest in manifests]) for name in manifests[0].sides},
        source_names=source_names,
        rejected=dict(sorted(rejected.items(), key=lambda item: -item[1])),
        unprompted=_sum_if_known(manifest.unprompted for manifest in manifests),
    )


def _sum_if_known(counts: Iterable[int | None]) -> int | None:
    """Add up counts; None where one is not known."""
    found = list(counts)
    return None if None in found else sum(filter(None, found))


def _numbers_of(sets: Sequence[DataSet]) -> tuple[list[NDArray[numpy.int32]], list[str]]:
    """Return for each set the numbers that its sources get, and the names of all."""
    numbers: dict[str, int] = {}
    table = []
    for data in sets:
        own = []
        for name in data.source_names:
            chosen, count = name, 1
            while not data.manifest.source_names and chosen in numbers:
                count += 1
                chosen = f"{name}#{count}"
            own.append(numbers.setdefault(chosen, len(numbers)))
        table.append(numpy.array(own, dtype=numpy.int32))
    return table, list(numbers)


def _source_column(
    sets: Sequence[DataSet], table: Sequence[NDArray[numpy.int32]]
) -> Iterator[NDArray[numpy.int32]]:
    for data, numbers in zip(sets, table, strict=True):
        for first in range(0, data.manifest.samples, _SAMPLES):
            yield numbers[data.source_numbers(first, min(first + _SAMPLES, data.manifest.samples))]


def _summed(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for each in counts:
        found.update(each)
    return dict(found)


def _statistics(found: Sequence[DataStatistics]) -> DataStatistics:
    values = [dataclasses.asdict(each) for each in found]
    sums = {key: sum(each[key] for each in values) for key in values[0] if key not in ("longest", "skipped")}
    longest = max(each.longest for each in found)
    return DataStatistics(**sums, longest=longest, skipped=_summed(each.skipped for each in found))


def _side(found: Sequence[SideMetadata]) -> SideMetadata:
    kept = ("tokenizer", "max_length", "longest", "aligned_bytes")
    values = [dataclasses.asdict(each) for each in found]
    sums = {key: sum(each[key] for each in values) for key in values[0] if key not in kept}
    aligned = [each.aligned_bytes for each in found]
    return dataclasses.replace(
        found[0],
        **sums,
        longest=max(each.longest for each in found),
        aligned_bytes=_sum_if_known(aligned),
    )
