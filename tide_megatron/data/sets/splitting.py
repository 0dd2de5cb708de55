"""One data folder becomes two, of samples that are drawn or told by their source; both manifests are true.

Samples keep their order and bytes. Counts are made anew from the columns, so that each folder says what it
holds. Two things cannot be: which bytes of the replies are in chunks (None), and what was left out when the
data was prepared, which stays with the folder that is taken apart. What was read is listed in both.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tide_megatron.base.disk import place_of
from tide_megatron.base.errors import ConfigError, DataError, nearest
from tide_megatron.base.unfinished import Unfinished
from tide_megatron.data.columns import CUT_COLUMN, SOURCE, ColumnWriter
from tide_megatron.data.manifest import DataStatistics, Manifest, SideMetadata
from tide_megatron.data.preparation.target import check_target
from tide_megatron.data.sets.merging import made
from tide_megatron.data.sets.set_merge import DataSet

_VALUES = 2**23
"""Numbers that are in memory at a time."""
Rows = dict[str, tuple[NDArray[numpy.int32], NDArray[numpy.int32]]]
"""Column -> lengths and values of some samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """Which samples the first folder gets; the second one gets the others. One of four is said."""

    share: float | None = None
    """So many of all."""
    samples: int | None = None
    """So many."""
    held_out: int | None = None
    """All but so many."""
    sources: Sequence[str] = ()
    """Those of these sources."""
    seed: int = 0
    """Of the draw."""

    def chosen(self, data: DataSet) -> NDArray[numpy.bool_]:
        """Return for every sample whether the first folder gets it.

        Args:
            data: opened.

        Raises:
            ConfigError: not one choice, or one that leaves a folder empty.
        """
        said = [self.share, self.samples, self.held_out, self.sources or None]
        if sum(value is not None for value in said) != 1:
            raise ConfigError("split: say one of --share, --samples, --held-out and --source")
        total = data.manifest.samples
        if self.sources:
            found = self._of_sources(data)
        else:
            number = self._number(total)
            found = numpy.zeros(total, dtype=numpy.bool_)
            found[numpy.random.default_rng(self.seed).permutation(total)[:number]] = True
        kept = int(found.sum())
        if not 0 < kept < total:
            raise ConfigError(
                f"split: of {total} samples the first folder would get {kept}: leave some to both"
            )
        return found

    def _number(self, total: int) -> int:
        if self.samples is not None:
            return min(max(self.samples, 0), total)
        if self.held_out is not None:
            return min(max(total - self.held_out, 0), total)
        assert self.share is not None, "one is said"
        if not 0 < self.share < 1:
            raise ConfigError(f"--share: {self.share} is no share; say a number between 0 and 1, as 0.9")
        return round(self.share * total)

    def _of_sources(self, data: DataSet) -> NDArray[numpy.bool_]:
        names = data.source_names
        for name in self.sources:
            if name not in names:
                raise ConfigError(f"--source: {data.folder} has no source {name!r}: {nearest(name, names)}")
        wanted = numpy.array([name in self.sources for name in names])
        return wanted[data.source_numbers(0, data.manifest.samples)]


def split(
    folder: Path, first: Path, second: Path, division: Division, *, replace: bool = False
) -> tuple[Manifest, Manifest]:
    """Divide a data folder's samples among two new folders; what is divided stays.

    Args:
        folder: what `prepare` wrote.
        first: the folder that gets what the division says.
        second: the folder that gets the rest.
        division: which samples.
        replace: put them in the place of data folders that are there.

    Raises:
        ConfigError: a division that cannot be.
        DataError: the data is damaged, or a target may not be replaced.
    """
    first, second = place_of(first, DataError), place_of(second, DataError)
    if first == second:
        raise ConfigError(f"split: {first} is named twice: name two folders")
    for target in (first, second):
        check_target(target, replace=replace)
    data = DataSet(folder)
    data.open()
    chosen = division.chosen(data)
    return (
        made(first, lambda work: _write(data, chosen, work), replace=replace),
        made(second, lambda work: _write(data, ~chosen, work), replace=replace),
    )


def _write(data: DataSet, chosen: NDArray[numpy.bool_], work: Unfinished) -> Manifest:
    """Write the chosen samples; return the manifest."""
    manifest, names = data.manifest, [name for name in data.columns if name != SOURCE]
    writer, counts = ColumnWriter(work.data, names, work.spool), _Counts(manifest)
    try:
        for rows in _chosen_rows(data, names, chosen):
            for name, (lengths, values) in rows.items():
                writer.extend(name, lengths, [values.tobytes()])
            counts.add(rows)
        source_names: list[str] = []
        if SOURCE in data.columns:
            numbers = data.source_numbers(0, manifest.samples)[chosen]
            used, places, inverse = numpy.unique(numbers, return_index=True, return_inverse=True)
            order = numpy.argsort(numpy.argsort(places))  # by first appearance
            source_names = [manifest.source_names[number] for number in used[numpy.argsort(places)]]
            writer.add_column(SOURCE, [order[inverse].astype(numpy.int32)])
        columns, files = writer.finish()
    finally:
        writer.abandon()
    return dataclasses.replace(
        manifest,
        samples=writer.samples,
        columns=columns,
        files=files,
        statistics=counts.statistics(),
        sides={name: counts.side(name) for name in manifest.sides},
        source_names=source_names,
        rejected={},
        unprompted=None if manifest.unprompted else manifest.unprompted,
    )


def _chosen_rows(data: DataSet, names: Sequence[str], chosen: NDArray[numpy.bool_]) -> Iterator[Rows]:
    """Yield the chosen samples, some at a time."""
    first, total = 0, len(chosen)
    while first < total:
        ahead = slice(first, min(first + 2**16, total))
        sizes = sum(data.columns[name].lengths[ahead].astype(numpy.int64) for name in names)
        count = int(numpy.searchsorted(numpy.cumsum(sizes), _VALUES, side="right"))
        last = min(first + max(1, count), ahead.stop)
        mask = chosen[first:last]
        rows: Rows = {}
        for name in names:
            lengths = numpy.asarray(data.columns[name].lengths[first:last])
            values = data.columns[name].values(first, last)
            rows[name] = lengths[mask], values[numpy.repeat(mask, lengths)]
        yield rows
        first = last


class _Counts:
    """Counts samples by their columns."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._counts: collections.Counter[str] = collections.Counter()
        self._sides = {name: collections.Counter[str]() for name in manifest.sides}
        self._longest: dict[str, int] = {}

    def add(self, rows: Rows) -> None:
        """Count some samples."""
        lengths, ids = rows["ids"]
        spans = rows["replies"][1].reshape(-1, 2).astype(numpy.int64)
        learnt = int((spans[:, 1] - spans[:, 0]).sum())
        tokens = int(lengths.sum(dtype=numpy.int64))
        is_cut = self._manifest.statistics.truncated > 0
        cut = rows[CUT_COLUMN][1] if CUT_COLUMN in rows else is_cut * (lengths >= self._manifest.max_length)
        self._counts.update(
            tokens=tokens,
            prompt_tokens=tokens - learnt,
            reply_tokens=learnt,
            reply_bytes=int(rows["reply_bytes"][1].sum(dtype=numpy.int64)),
            truncated=int(cut.sum()),
        )
        self._note_longest("", lengths)
        for name, found in self._sides.items():
            own_lengths, own_ids = rows[f"{name}.ids"]
            counts, places = rows[f"{name}.chunks"]
            found.update(
                tokens=int(own_lengths.sum(dtype=numpy.int64)),
                chunks=len(places) // 4,
                pairs=_pairs(counts // 4, places.reshape(-1, 4), (lengths, ids), (own_lengths, own_ids)),
                cut=int(rows[f"{name}.{CUT_COLUMN}"][1].sum()),
                without_chunks=int((counts == 0).sum()),
            )
            self._note_longest(name, own_lengths)

    def statistics(self) -> DataStatistics:
        """Return the student's counts."""
        counts: dict[str, Any] = dict(self._counts)
        return DataStatistics(**counts, longest=self._longest.get("", 0))

    def side(self, name: str) -> SideMetadata:
        """Return a side's counts."""
        counts: Mapping[str, Any] = {**self._sides[name], "longest": self._longest.get(name, 0)}
        return dataclasses.replace(self._manifest.sides[name], **counts, aligned_bytes=None)

    def _note_longest(self, side: str, lengths: NDArray[numpy.int32]) -> None:
        self._longest[side] = max(self._longest.get(side, 0), int(lengths.max(initial=0)))


def _pairs(
    chunks: NDArray[numpy.int32],
    places: NDArray[numpy.int32],
    student: tuple[NDArray[numpy.int32], NDArray[numpy.int32]],
    teacher: tuple[NDArray[numpy.int32], NDArray[numpy.int32]],
) -> int:
    """Count chunks of one token on each side, of the same id.

    Args:
        chunks: [samples] how many each has.
        places: [chunks, 4] start and end on both sides.
        student: lengths and ids of its tokens.
        teacher: likewise.
    """
    single = (places[:, 1] - places[:, 0] == 1) & (places[:, 3] - places[:, 2] == 1)
    sample = numpy.repeat(numpy.arange(len(chunks)), chunks)[single]
    ids = []
    for (lengths, tokens), column in ((student, 0), (teacher, 2)):
        starts = numpy.cumsum(lengths, dtype=numpy.int64) - lengths
        ids.append(tokens[starts[sample] + places[single, column]])
    return int((ids[0] == ids[1]).sum())
