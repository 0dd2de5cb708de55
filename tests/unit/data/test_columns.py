"""Files of columns: megatron-core's reader and writer judge; memory is flat, foreign bytes are seen."""

import itertools
import tracemalloc

import tide_megatron.platform

import numpy
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # isort: skip

from tide_megatron.base.errors import DataError
from tide_megatron.base.unfinished import DamagedWork
from tide_megatron.data import columns
from tide_megatron.data.columns import ColumnFile, ColumnWriter, pieces_of

ROWS = [[5, 6, 7], [], [2**31 - 1, -(2**31)], list(range(40)), [9]]


def written(folder, rows, name="ids"):
    folder.mkdir()
    (folder / "spool").mkdir()
    writer = ColumnWriter(folder, [name], folder / "spool")
    for row in rows:
        writer.add({name: row})
    return writer


@pytest.mark.parametrize("piece", [1, 2, 2**20])
def test_both_files_are_those_of_megatrons_builder(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(columns, "_PIECE", piece)
    writer = written(tmp_path / "ours", ROWS)
    values, facts = writer.finish()
    (tmp_path / "theirs").mkdir()
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs/ids.bin"), dtype=numpy.int32)
    for row in ROWS:
        builder.add_document(numpy.asarray(row, dtype=numpy.int32), [len(row)])
    builder.finalize(str(tmp_path / "theirs/ids.idx"))
    for name in ("ids.bin", "ids.idx"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
        assert facts[name]["bytes"] == (tmp_path / "ours" / name).stat().st_size
    assert values == {"ids": sum(map(len, ROWS))}
    reader = IndexedDataset(str(tmp_path / "ours/ids"), mmap=True)
    assert [reader[n].tolist() for n in range(len(reader))] == ROWS


def test_no_samples_are_an_index_too(tmp_path):
    written(tmp_path / "ours", []).finish()
    column = ColumnFile(tmp_path / "ours", "ids")
    assert (column.samples, column.values(0, 0).tolist()) == (0, [])


@pytest.mark.parametrize("piece", [1, 4, 2**20])
def test_ranges_of_samples_are_read(tmp_path, monkeypatch, piece):
    written(tmp_path / "ours", ROWS).finish()
    monkeypatch.setattr(columns, "_PIECE", piece)
    column = ColumnFile(tmp_path / "ours", "ids")
    for first in range(len(ROWS)):
        for last in range(first, len(ROWS) + 1):
            assert column.values(first, last).tolist() == [*itertools.chain(*ROWS[first:last])]
    assert column.lengths.tolist() == [len(row) for row in ROWS]


def test_a_file_that_is_no_index_is_refused(tmp_path):
    written(tmp_path / "ours", ROWS).finish()
    for content in (b"", b"x" * 200, (tmp_path / "ours/ids.idx").read_bytes().replace(b"\4", b"\5", 1)):
        (tmp_path / "ours/ids.idx").write_bytes(content)
        with pytest.raises(DataError, match=r"ids\.idx: not an index of int32 values"):
            ColumnFile(tmp_path / "ours", "ids")


def test_a_column_that_is_known_late_has_a_number_a_sample(tmp_path):
    writer = written(tmp_path / "ours", ROWS)
    writer.add_column("source", iter([numpy.array([3, 1], dtype=numpy.int32), numpy.array([0, 0, 2])]))
    writer.finish()
    reader = IndexedDataset(str(tmp_path / "ours/source"), mmap=True)
    assert [int(reader[n][0]) for n in range(len(reader))] == [3, 1, 0, 0, 2]


def test_it_goes_on_behind_what_was_synced(tmp_path):
    whole = written(tmp_path / "whole", ROWS)
    whole.finish()
    first = written(tmp_path / "cut", ROWS[:3])
    known = first.sync()
    first.add({"ids": [1, 2, 3, 4]})  # nobody knows of it
    first.abandon()
    second = ColumnWriter(tmp_path / "cut", ["ids"], tmp_path / "cut/spool", known)
    assert second.samples == 3
    for row in ROWS[3:]:
        second.add({"ids": row})
    second.finish()
    for name in ("ids.bin", "ids.idx"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("damage", [b"", b"xxxx"])
def test_it_does_not_go_on_behind_other_bytes(tmp_path, damage):
    writer = written(tmp_path / "ours", ROWS)
    known = writer.sync()
    writer.abandon()
    file = tmp_path / "ours/ids.bin"
    file.write_bytes(file.read_bytes()[:-4] + damage)
    with pytest.raises(DamagedWork, match=r"ids\.bin has other bytes"):
        ColumnWriter(tmp_path / "ours", ["ids"], tmp_path / "ours/spool", known)


def test_bytes_of_another_process_are_seen_at_the_end(tmp_path):
    writer = written(tmp_path / "ours", ROWS)
    writer.sync()
    with (tmp_path / "ours/ids.bin").open("r+b") as stream:
        stream.write(b"\1")
    with pytest.raises(DataError, match=r"ids\.bin: does not hold what was written"):
        writer.finish()


def test_memory_does_not_grow_with_the_samples(tmp_path):
    rows = [[1, 2, 3]] * 50
    writer = written(tmp_path / "ours", rows)
    tracemalloc.start()
    for _ in range(20_000):
        writer.add({"ids": rows[0]})
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 10_000, "megatron-core's builder keeps 16 bytes a sample and column"
    writer.finish()
    assert sum(len(piece) for piece in pieces_of(tmp_path / "ours/ids.bin", numpy.dtype("<i4"))) == 60_150
