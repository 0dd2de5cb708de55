"""Where chats are read from: compression told by content, pipes, and what is no JSONL, each in one line."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import threading
import zlib

import numpy
import pytest

from tests.small_tokenizer import write_chats
from tide_megatron.base.errors import DataError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.sources.source import Frames, Source

PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "jsonl": bytes}
TEXT = b"".join(b'{"line": %d}\n' % number for number in range(3000))


def lines(path):
    return b"".join(line for _, line in Source(path).lines())


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("name", ["right", "chats.jsonl"])
def test_compression_is_told_by_content_and_the_file_digested_once(tmp_path, kind, name):
    file = tmp_path / (f"chats.{kind}" if name == "right" else name)
    file.write_bytes(PACK[kind](TEXT))
    source = Source(file)
    assert b"".join(line for _, line in source.lines()) == TEXT
    assert source.describe(3000)["bytes"] == source.total_bytes == source.read_bytes == file.stat().st_size
    assert source.describe(3000)["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_several_members_follow_each_other(tmp_path):
    for kind in ("gz", "bz2", "xz"):
        (tmp_path / kind).write_bytes(PACK[kind](TEXT[:100]) + PACK[kind](TEXT[100:]))
        assert lines(tmp_path / kind) == TEXT


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_frames_are_read_to_the_end_or_refused(size):
    packed = zlib.compress(TEXT[:5000]) + zlib.compress(b"") + zlib.compress(TEXT[5000:])
    frames = io.BufferedReader(Frames(io.BytesIO(packed), zlib.decompressobj), size)
    assert frames.read() == TEXT
    for damaged, fault in ((packed[:-3], EOFError), (packed[:100] + b"x" * 200, zlib.error)):
        with pytest.raises(fault):
            io.BufferedReader(Frames(io.BytesIO(damaged), zlib.decompressobj), size).read()


def test_blank_lines_count_but_are_passed_over(tmp_path):
    (tmp_path / "a").write_bytes(b"x\n\n  \ny")
    assert [*Source(tmp_path / "a").lines()] == [(1, b"x\n"), (4, b"y")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT)[:-20], "damaged behind line"),
        (gzip.compress(TEXT)[:200] + b"x" * 500, "damaged behind line"),
        (bz2.compress(TEXT)[:-20], "damaged behind line"),
        (lzma.compress(TEXT)[:-20], "damaged behind line"),
        (b"PAR1....", "a Parquet file, which no pipe can bring: name the file"),
        (b"PARE....", "an encrypted Parquet file"),
        (b"PK\x03\x04....", "a zip archive: unpack it"),
        ("{}\n".encode("utf-16"), "UTF-16 text: convert it to UTF-8"),
        (b"\x28\xb5\x2f\xfd....", "zstandard, or pipe it in (zstd -dc a | tide prepare"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_remedy(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("tide_megatron.data.sources.source._ZSTD_MODULES", ("no_such_module",))
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError) as caught:
        lines(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="it is a folder"):
        Source(tmp_path).check()
    with pytest.raises(DataError, match="no such file"):
        Source(tmp_path / "nothing").check()
    with pytest.raises(DataError, match="cannot be read"):
        Source(tmp_path / ("x" * 300)).check()


@pytest.mark.parametrize("kind", ["gz", "jsonl"])
def test_a_pipe_gives_the_data_of_its_file(tokenizer, tmp_path, kind):
    file = write_chats(tmp_path / "chats.jsonl", [("a", f"b{n}") for n in range(30)])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[PACK[kind](file.read_bytes())])
    writer.start()
    piped = prepare([tmp_path / "pipe"], tokenizer, tmp_path / "piped", max_length=64)
    writer.join()
    plain = prepare([file], tokenizer, tmp_path / "plain", max_length=64)
    assert piped.files == plain.files
    assert piped.sources[0]["name"] == "pipe"
    assert piped.sources[0]["records"] == 30


def test_stdin_is_a_source(tokenizer, tmp_path, monkeypatch):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    text = io.TextIOWrapper(io.BytesIO(json.dumps(record).encode() + b"\n{"))
    monkeypatch.setattr("sys.stdin", text)
    with pytest.raises(DataError, match=r"^stdin:2: not JSON"):
        prepare(["-"], tokenizer, tmp_path / "out", max_length=64)
    text.seek(0)
    prepare(["-"], tokenizer, tmp_path / "out", max_length=64, on_bad="skip")
    assert PreparedData(tmp_path / "out").sources_of(numpy.zeros(1, dtype=int))[0] == ("stdin",)
    assert not text.buffer.closed
