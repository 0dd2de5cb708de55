"""Any changed, cut or missing file of a checkpoint is named."""

import hashlib

import pytest

from tide_megatron.base.files import DIGESTS, DigestingFile, damage, digest_of, write_digests

FILES = {".metadata": b"table", "a.distcp": bytes(range(256)) * 5000, "state.json": b"{}"}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_digests(tmp_path, {"a.distcp": digest_of(tmp_path / "a.distcp")})
    return tmp_path


def test_a_whole_checkpoint_has_no_damage(folder):
    assert damage(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_by_exactly_one_of_the_sharing_ranks(folder, name):
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    seen = [damage(folder, (rank, 2)) for rank in range(2)]
    assert sorted(map(len, seen)) == [0, 1]
    assert f"{name} has other bytes" in max(seen)[0]


@pytest.mark.parametrize("name", FILES)
def test_a_cut_and_a_missing_file_are_found(folder, name):
    (folder / name).write_bytes(FILES[name][:-1])
    assert damage(folder) == [f"{name} has {len(FILES[name]) - 1} bytes instead of {len(FILES[name])}"]
    (folder / name).unlink()
    assert damage(folder) == [f"{name} is missing"]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is missing"), ("", "cannot be read"), ("[1]", "cannot be read")]
)
def test_digests_that_are_missing_or_damaged_are_damage(folder, content, said):
    (folder / DIGESTS).unlink()
    if content is not None:
        (folder / DIGESTS).write_text(content)
    [fault] = damage(folder)
    assert fault.startswith(f"{DIGESTS} {said}")


def test_a_file_knows_the_digest_of_what_went_through_it(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as stream:
        file = DigestingFile(stream)
        for part in (b"one", memoryview(b"two"), b""):
            file.write(part)
    assert file.facts() == digest_of(path)
    assert file.tell() == 6


class ShortStream:
    """A stream that takes three bytes at a time, as an unbuffered one may."""

    def __init__(self):
        self.content = b""

    def write(self, data):
        taken = bytes(data[:3])
        self.content += taken
        return len(taken)


def test_a_stream_that_takes_a_part_is_given_the_rest():
    stream = ShortStream()
    file = DigestingFile(stream)
    assert file.write(b"0123456789") == 10
    assert stream.content == b"0123456789"
    assert file.facts() == (10, hashlib.sha256(b"0123456789").hexdigest())
