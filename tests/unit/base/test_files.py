"""What is replaced is the old or the new whatever happens, and any changed, cut or missing file is named."""

import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.files import (
    DIGESTS,
    DigestingFile,
    damage,
    digest_of,
    local_path,
    remove_folder,
    replaced_folder,
    write_digests,
    write_text,
)

TOUCHING = ((Path, "write_text"), (os, "fsync"), (os, "rename"), (os, "replace"))
"""Calls that change the disk; removals only ever follow them."""


def replace_file(place, text):
    write_text(place, text)


def replace_folder(place, text):
    with replaced_folder(place, (".bin",)) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a.bin").write_text(text)
        (partial / "b").write_text(text)


def content(place):
    """Return what stands at a place: nothing, one text, or a mixture that must never be."""
    if not place.exists():
        return None
    if place.is_file():
        return place.read_text()
    assert damage(place / "inner") == []
    found = {(place / name).read_text() for name in ("inner/a.bin", "b")}
    return found.pop() if len(found) == 1 else found


def struck(number, ending, work):
    """Do work whose call of that number to the disk ends in something else; say whether there was one."""
    left = number

    def guarded(real):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left == -1:
                ending()
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in TOUCHING:
            patch.setattr(place, name, guarded(getattr(place, name)))
        work()
    return left < 0


def killed(number, work):
    """Do the same in a process of its own that ends there as by a kill: nothing is cleaned up."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 9 if struck(number, lambda: os._exit(9), work) else 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_full_disk_at_any_moment_leaves_the_old_or_the_new_and_nothing_else(tmp_path, replace, old):
    def fail():
        raise OSError(28, "No space left on device")

    seen, is_struck = [], True
    while is_struck:
        room = tmp_path / str(len(seen))
        room.mkdir()
        if old:
            replace(room / "m", old)
        with contextlib.suppress(OSError, CheckpointError):
            is_struck = struck(len(seen), fail, lambda room=room: replace(room / "m", "new"))
        seen.append(content(room / "m"))
        assert [path.name for path in room.iterdir()] == (["m"] if seen[-1] else [])
    assert seen == [old] * (len(seen) - 2) + ["new", "new"], "only the last call follows the name"
    assert len(seen) > 4


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_the_next_write_cleans_up(tmp_path, replace, old):
    number, is_killed = 0, True
    while is_killed:
        room = tmp_path / str(number)
        room.mkdir()
        place = room / "m"
        if old:
            replace(place, old)
        is_killed = killed(number, lambda place=place: replace(place, "new"))
        found = content(place)
        if found is None and old:  # between the two renames of a folder
            found = content(room / ".m.old")
        assert found in ((old, "new") if is_killed else ("new",)), f"call {number}"
        replace(place, "next")
        assert content(place) == "next"
        assert [path.name for path in room.iterdir()] == ["m"]
        number += 1
    assert number > 3


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_all_is_on_the_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch, replace):
    seen = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def call(*args, name=name, real=real):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[0]
            seen.append((name == "fsync", Path(path).name, Path(path).is_dir()))
            return real(*args)

        monkeypatch.setattr(os, name, call)
    replace(tmp_path / "m", "new")
    named = max(number for number, (is_flush, *_) in enumerate(seen) if not is_flush)
    flushed = {name for is_flush, name, _ in seen[:named] if is_flush}
    wanted = {"m.partial"} if replace is replace_file else {".m.partial", "inner", "a.bin", "b", DIGESTS}
    assert flushed >= wanted
    assert seen[named + 1 :] == [(True, tmp_path.name, True)]


def test_an_interrupt_or_an_error_in_the_block_changes_nothing(tmp_path):
    replace_folder(tmp_path / "m", "old")

    def fill(fault):
        with replaced_folder(tmp_path / "m") as partial:
            (partial / "b").write_text("new")
            raise fault

    for fault in (KeyboardInterrupt(), ValueError("ours")):
        with pytest.raises(type(fault)):
            fill(fault)
        assert content(tmp_path / "m") == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_lost_between_two_renames_is_put_back_before_it_is_replaced(tmp_path):
    replace_folder(tmp_path / "m", "old")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    with replaced_folder(tmp_path / "m"):
        assert content(tmp_path / "m") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_is_removed_is_whole_under_its_name_or_gone(tmp_path):
    replace_folder(tmp_path / "m", "old")
    assert killed(0, lambda: remove_folder(tmp_path / "m"))
    assert content(tmp_path / "m") == "old"
    remove_folder(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_the_fault_is_of_the_wanted_kind(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(
            ConfigError, match=r"m: cannot be written \(.*\); a file stands .*; choose another place$"
        ),
        replaced_folder(tmp_path / "file" / "m", fault_kind=ConfigError),
    ):
        pass


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


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("~", "{home}"),
        ("~/runs/x", "{home}/runs/x"),
        (Path("~/runs/x"), "{home}/runs/x"),
        ("runs/x", "runs/x"),
        ("/runs/x", "/runs/x"),
        ("./~x", "~x"),
        ("a/~/b", "a/~/b"),
        ("a~", "a~"),
        ("price$", "price$"),
        ("a$b/c", "a$b/c"),
        ("t=0.5:x/y", "t=0.5:x/y"),
    ],
)
def test_a_path_is_what_its_user_means(tmp_path, monkeypatch, word, meant):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path(word) == Path(meant.format(home=tmp_path))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("~nobody-here/x", "'~nobody-here' is nobody's home here; write the path out, or ./~nobody-here/x"),
        ("~~/x", "is nobody's home"),
        ("$HOME/x", r"variables of the shell are not expanded here; .* \$\{oc.env:HOME\} in a recipe"),
        ("runs/${USER}/x", r"not expanded here; .*\{oc.env:USER\}"),
        ("runs/$USER", "not expanded here"),
        ("s3://bucket/x", "is a URL; download"),
        ("file:///runs/x", "is a URL"),
        (Path("hf://org/model"), "is a URL"),
        ("a\0b", "zero byte"),
    ],
)
def test_a_path_that_would_mean_something_else_is_refused(word, said):
    with pytest.raises(ConfigError, match=said):
        local_path(word)
