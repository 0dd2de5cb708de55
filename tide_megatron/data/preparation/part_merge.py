"""Parts that several tasks have prepared become what one process would have written, to the last byte.

Every part holds each so many-th block of records, and the number of every record. Rows are copied by bytes,
a block at a time, so memory stays flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from tide_megatron.base.errors import DataError, some_of
from tide_megatron.base.unfinished import Unfinished
from tide_megatron.data.columns import ColumnFile, ColumnWriter
from tide_megatron.data.manifest import Manifest
from tide_megatron.data.preparation.completion import sealed
from tide_megatron.data.preparation.identity import TaskPart, differences
from tide_megatron.data.preparation.origins import ORIGIN, ORIGINS_FILE, Origins
from tide_megatron.data.preparation.part import PART_FILE, check_files, read_part
from tide_megatron.data.preparation.rejects import RECORDS_FILE, REJECTS_FILE, OnBad, Rejects, most_frequent
from tide_megatron.data.preparation.tally import Tally, merge_firsts

_OF_RUN = ("on_bad", "sources", "asked", "part", "block", "code")
"""Keys of an identity that no manifest has."""


class PartReader:
    """A part, read from its first block to its last.

    Args:
        folder: of the part.

    Raises:
        DataError: it is none, or not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.facts = folder, read_part(folder)
        self.place = TaskPart.read(self.facts["identity"]["part"])
        self._samples, self._rejects = 0, 0
        self._lines: BinaryIO | None = None

    def open(self) -> None:
        """Compare all files with their digests, and open them.

        Raises:
            DataError: one is not what was written.
        """
        check_files(self.folder, self.facts["files"])
        self.columns = {name: ColumnFile(self.folder, name) for name in self.facts["columns"]}
        self._origins = _mapped(self.folder / ORIGINS_FILE, ORIGIN)
        has_rejects = REJECTS_FILE in self.facts["files"]
        self._records = _mapped(self.folder / RECORDS_FILE, numpy.dtype("<i8")) if has_rejects else ()
        self._lines = (self.folder / REJECTS_FILE).open("rb") if has_rejects else None

    def copy_block(
        self, last: int, writer: ColumnWriter, origins: Origins, rejects: Rejects, words: dict[int, int]
    ) -> None:
        """Append all samples and rejects whose records stand before a number, and were not taken yet."""
        first = self._samples
        self._samples = first + int(numpy.searchsorted(self._origins["record"][first:], last))
        if self._samples > first:
            for name, column in self.columns.items():
                lengths = column.lengths[first : self._samples]
                writer.extend(name, lengths, column.pieces(first, self._samples))
            origins.extend(self._origins[first : self._samples], words)
        while self._rejects < len(self._records) and self._records[self._rejects] < last:
            assert self._lines is not None, "a list has its numbers"
            rejects.write(self._lines.readline(), int(self._records[self._rejects]))
            self._rejects += 1

    def close(self) -> None:
        """Close the list of rejects."""
        if self._lines is not None:
            self._lines.close()


def is_part(folder: Path) -> bool:
    """Say whether a folder holds a part."""
    return (folder / PART_FILE).is_file()


def checked_parts(folders: Sequence[Path]) -> list[PartReader]:
    """Open parts in their order.

    Raises:
        DataError: they do not belong together, or some are missing.
    """
    parts = sorted((PartReader(folder) for folder in folders), key=lambda part: part.place.number)
    first = parts[0]
    for part in parts[1:]:
        own, other = dict(first.facts["identity"]), dict(part.facts["identity"])
        if part.place.total != first.place.total:
            raise DataError(
                f"{part.folder}: is one of {part.place.total} parts, {first.folder} one of "
                f"{first.place.total}: merge parts of one number only"
            )
        found = differences({**own, "part": ""}, {**other, "part": ""})
        if found:
            raise DataError(
                f"{part.folder}: was prepared with another {', another '.join(found)} than {first.folder}: "
                "prepare it again as the others were"
            )
        if part.facts["sources"] != first.facts["sources"]:
            raise DataError(
                f"{part.folder}: was prepared from other bytes of the sources than {first.folder}: prepare "
                "it again from the same files"
            )
    numbers = [part.place.number for part in parts]
    if double := next((number for number in numbers if numbers.count(number) > 1), None):
        raise DataError(f"{folders[0].parent}: part {double} is named twice: name every part once")
    if missing := [str(n) for n in range(1, first.place.total + 1) if n not in numbers]:
        raise DataError(
            f"{folders[0].parent}: of {first.place.total} parts these are missing: {some_of(missing)}: "
            f"prepare them (tide prepare ... --part {missing[0]}/{first.place.total})"
        )
    return parts


def merge_parts(parts: Sequence[PartReader], work: Unfinished) -> Manifest:
    """Put parts together in a folder; return the manifest (not written yet).

    Args:
        parts: all of them, in their order.
        work: the folder, begun.

    Raises:
        DataError: a part is damaged; no samples, or a side without chunks.
    """
    facts: dict[str, Any] = parts[0].facts
    description = {key: value for key, value in facts["identity"].items() if key not in _OF_RUN}
    writer, origins = ColumnWriter(work.data, facts["columns"], work.spool), Origins(work.spool)
    rejects = Rejects(work.data, work.spool, OnBad.SKIP)
    tally = Tally.of(description["sides"])
    kinds: dict[str, list[int]] = {}
    words = []
    try:
        for part in parts:
            part.open()
            tally.merge(Tally.read(part.facts["tally"]))
            merge_firsts(kinds, part.facts["kinds"])
            words.append({n: origins.number_of(word) for n, word in enumerate(part.facts["words"])})
        block = int(facts["identity"]["block"])
        for number, first in enumerate(range(0, facts["records"], block)):
            turn = number % len(parts)
            parts[turn].copy_block(first + block, writer, origins, rejects, words[turn])
        rejects.close()
        names = [str(source["name"]) for source in facts["sources"]]
        return sealed(
            description,
            writer,
            origins,
            tally,
            rejected=most_frequent(kinds),
            sources=facts["sources"],
            places=names,
        )
    finally:
        for files in (writer, origins, rejects):
            files.abandon()
        for part in parts:
            part.close()


def _mapped(file: Path, kind: numpy.dtype[Any]) -> Any:
    """Map the numbers of a file into memory."""
    return numpy.memmap(file, dtype=kind, mode="r") if file.stat().st_size else numpy.empty(0, dtype=kind)
