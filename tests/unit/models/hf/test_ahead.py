"""Reading ahead: which bytes, by whom, how far ahead; what a disk's fault becomes; from tensors to bytes."""

import errno
import os
import threading
import time

import pytest
import torch

from tests.tiny_run import write_folder
from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.hf import ahead
from tide_megatron.models.hf.ahead import ReadAhead, Span
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.hf.safetensors import TensorFile
from tide_megatron.models.shard import Part

PIECE = 64


@pytest.fixture
def reads(monkeypatch):
    """Make pieces small; give the (place, bytes) of all reads but those that ask what is there."""
    monkeypatch.setattr(ahead, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(ahead, "_is_there", lambda handle, place: False)
    stock, found = os.preadv, []

    def preadv(handle, rooms, place, *flags):
        found.append((place, len(rooms[0])))
        return stock(handle, rooms, place, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    return path


def use_all(spans, share=(0, 1), **options):
    with ReadAhead([[span] for span in spans], share, **options) as row:
        for _ in spans:
            row.await_next()
    return row.bytes_read


def test_only_what_is_used_is_read_and_once(reads, file):
    spans = [Span(file, 10, 200), Span(file, 100, 250), Span(file, 700, 701)]
    assert use_all(spans) == 241
    assert sorted(reads) == [(10, 54), (64, 64), (128, 64), (192, 58), (700, 1)]


def test_ranks_begin_at_other_pieces_and_together_read_all(reads, file, monkeypatch):
    monkeypatch.setattr(ahead, "NODE_READS", 1)
    firsts = []
    for rank in range(4):
        reads.clear()
        assert use_all([Span(file, 0, 1000)], (rank, 4)) == 1000
        firsts.append([place // PIECE for place, _ in reads[:4]])
    assert firsts == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def test_what_another_rank_has_brought_is_left_out(reads, file, monkeypatch):
    monkeypatch.setattr(ahead, "_is_there", lambda handle, place: place < 3 * PIECE)
    assert use_all([Span(file, 0, 4 * PIECE)]) == PIECE
    assert reads == [(3 * PIECE, PIECE)]


def test_a_piece_of_which_only_the_beginning_is_there_is_read(reads, file, monkeypatch):
    monkeypatch.setattr(ahead, "_is_there", lambda handle, place: place == 0)
    assert use_all([Span(file, 0, PIECE)]) == PIECE


def test_it_stays_one_window_ahead_of_what_is_used(reads, file):
    uses = [[Span(file, start, start + 100)] for start in range(0, 1000, 100)]
    with ReadAhead(uses, (0, 1), window_bytes=200) as row:
        for number in range(1, 11):
            row.await_next()
            time.sleep(0.02)  # as long as it likes to read on
            window = (number - 1) // 2
            assert max(place for place, _ in reads) < 200 * (window + 2)
    assert sum(size for _, size in reads) == 1000


def test_leaving_early_ends_the_threads(reads, file):
    with ReadAhead(
        [[Span(file, start, start + 100)] for start in range(0, 1000, 100)], (0, 1), window_bytes=1
    ):
        pass
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_nothing_to_read_is_nothing(reads, file):
    with ReadAhead([[], []], (0, 1)) as row:
        row.await_next()
        row.await_next()
    assert reads == []


def test_what_is_in_memory_is_seen_there(file):
    file.read_bytes()
    handle = os.open(file, os.O_RDONLY)
    try:
        try:
            os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as fault:
            pytest.skip(f"this file system does not say what is in memory: {fault}")
        assert ahead._is_there(handle, 999)
        assert not ahead._is_there(handle, 1000)  # behind the end
    finally:
        os.close(handle)


TENSORS = {
    "rows": torch.arange(12.0).view(6, 2),
    "half": torch.arange(5.0, dtype=torch.bfloat16),
    "stack": torch.arange(24.0).view(2, 4, 3),
    "number": torch.tensor(7.0),
}
PARTS = [
    ("rows", None),
    ("rows", Part(ranges=((1, 3), (4, 5)), zero_rows=2)),
    ("rows", Part(ranges=((6, 6),), zero_rows=1)),
    ("rows", Part(axis=1, ranges=((1, 2),))),
    ("half", Part(ranges=((2, 4),))),
    ("stack", Part(ranges=((1, 3),), number=1)),
    ("stack", Part(axis=1, ranges=((0, 1),), number=0)),
    ("number", None),
]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_the_bytes_of_a_part_are_those_that_reading_it_gives(tmp_path, name, part):
    write_folder(tmp_path / "m", {"model_type": "x"}, TENSORS)
    path = tmp_path / "m" / "model.safetensors"
    file = TensorFile(path)
    spans, content = file.spans(name, part), path.read_bytes()
    found = b"".join(content[span.begin : span.end] for span in spans)
    wanted = file.read(name, part)
    if part is not None and part.zero_rows:
        wanted = wanted[: -part.zero_rows]
    if part is not None and part.axis:  # columns lie in all rows
        wanted = TENSORS[name] if part.number is None else TENSORS[name][part.number]
    file.close()
    assert {span.path for span in spans} <= {path}
    assert found == wanted.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_folder_that_reads_ahead_gives_the_same(tmp_path):
    write_folder(tmp_path / "m", {"model_type": "x"}, TENSORS)
    with HfFolder(tmp_path / "m") as plain, HfFolder(tmp_path / "m") as folder:
        folder.read_ahead(PARTS, (1, 2))
        assert all(torch.equal(folder.read(*one), plain.read(*one)) for one in PARTS)
        assert folder.bytes_read == plain.bytes_read


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "m", {"model_type": "x"}, TENSORS)

    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ahead, "_is_there", lambda handle, place: False)
    monkeypatch.setattr(os, "preadv", preadv)
    with HfFolder(tmp_path / "m") as folder:
        folder.read_ahead(PARTS, (0, 1))
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: cannot be used \(Input/output error\)"
        ):
            folder.read(*PARTS[0])
