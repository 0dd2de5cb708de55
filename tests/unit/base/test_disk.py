"""What a disk refuses is one line with path, reason and remedy; a target is the place that its name means."""

import errno
import os
import resource
from pathlib import Path

import pytest

from tide_megatron.base.disk import disk_faults, disk_words, place_of
from tide_megatron.base.errors import CheckpointError, DataError, TideError
from tide_megatron.base.files import commit_folder, remove_folder, replaced_folder
from tide_megatron.base.lease import lease_beside, leased
from tide_megatron.parallel.collectives import fail_together


def make(target, content=b"new"):
    """Put a folder there as every verb does."""
    place = place_of(target, DataError)
    with (
        disk_faults(place, DataError),
        leased(lease_beside(place), str(place), DataError),
        replaced_folder(place, fault_kind=DataError) as partial,
    ):
        (partial / "a").write_bytes(content)


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def in_a_file(base):
    (base / "file").write_text("x")
    return base / "file" / "m"


def far_in_a_file(base):
    return in_a_file(base) / "n" / "o"


def too_long(base):
    return base / ("m" * 300)


def too_long_on_the_way(base):
    return base / ("m" * 300) / "n"


def a_loop(base):
    (base / "loop").symlink_to("loop")
    return base / "loop"


def below_a_loop(base):
    return a_loop(base) / "m"


def the_kernels(base):
    return Path("/proc/tide/m")


def the_kernels_devices(base):
    return Path("/sys/tide")


def no_path(base):
    return base / "m\0n"


def a_root(base):
    return Path("/")


def where_we_are_below(base):
    (base / "here" / "deeper").mkdir(parents=True)
    os.chdir(base / "here" / "deeper")
    return Path("../..") / "here"


def where_nothing_is_any_more(base):
    (base / "gone").mkdir()
    os.chdir(base / "gone")
    (base / "gone").rmdir()
    return Path("m")


REFUSED = {
    in_a_file: "a file stands",
    far_in_a_file: "a file stands",
    too_long: "choose a shorter name",
    too_long_on_the_way: "choose a shorter name",
    a_loop: "link leads to itself",
    below_a_loop: "choose another place",
    the_kernels: "",
    the_kernels_devices: "",
    no_path: "choose another folder",
    a_root: "choose a folder in it",
    where_nothing_is_any_more: "`cd .` or go elsewhere first",
    where_we_are_below: "holds the folder that you are in",
}


@pytest.fixture(autouse=True)
def cwd(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("place", REFUSED, ids=lambda place: place.__name__)
def test_a_place_where_nothing_can_be_is_one_line(tmp_path, place):
    target = place(tmp_path)
    before = left(tmp_path)
    with pytest.raises(DataError) as caught:
        make(target)
    said = str(caught.value)
    assert "\n" not in said
    assert REFUSED[place] in said
    assert said.count(";") >= 1 or "choose" in said
    assert left(tmp_path) == before


def limited(work):
    """Do work in a process whose files may have 1,000 bytes; return what is said."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            work()
            os.write(writer, b"done")
        except TideError as fault:
            os.write(writer, str(fault).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as stream:
        return stream.read()


def test_a_disk_that_gets_full_leaves_what_was_there(tmp_path):
    make(tmp_path / "m", b"old")
    said = limited(lambda: make(tmp_path / "m", b"x" * 4000))
    assert "\n" not in said
    assert said.startswith(f"{tmp_path}/")
    assert "ulimit -f" in said
    assert (tmp_path / "m" / "a").read_bytes() == b"old"
    assert left(tmp_path) == ["m", "m/a"]


def to_a_folder(base):
    (base / "far").mkdir()
    (base / "m").symlink_to("far")
    return base / "m", base / "far"


def to_a_link(base):
    (base / "far").mkdir()
    (base / "far" / "old").write_text("x")
    (base / "between").symlink_to(base / "far")
    (base / "m").symlink_to("between")
    return base / "m", base / "far"


def to_nothing(base):
    (base / "m").symlink_to(base / "far")
    return base / "m", base / "far"


def here(base):
    (base / "far").mkdir()
    os.chdir(base / "far")
    return Path("."), base / "far"


def here_by_another_name(base):
    here(base)
    return Path("../far/."), base / "far"


def beside(base):
    here(base)
    return Path("../m"), base / "m"


def with_a_slash(base):
    return Path(f"{base}/m/"), base / "m"


def a_file(base):
    (base / "m").write_text("x")
    return base / "m", base / "m"


TARGETS = [to_a_folder, to_a_link, to_nothing, here, here_by_another_name, beside, with_a_slash, a_file]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_a_target_is_replaced_as_often_as_one_likes_and_nothing_stays(tmp_path, target):
    name, place = target(tmp_path)
    links = {path: os.readlink(path) for path in tmp_path.iterdir() if path.is_symlink()}
    for content in (b"1", b"2", b"3"):
        make(name, content)
        assert (place / "a").read_bytes() == content
        assert (Path(name) / "a").read_bytes() == content, "also by its name, from where we are"
        assert [path.name for path in place.iterdir()] == ["a"]
    assert {path: os.readlink(path) for path in links} == links
    others = {"far"} if target is beside else set()
    assert {path.name for path in tmp_path.iterdir()} == {place.name} | {path.name for path in links} | others


@pytest.mark.parametrize("kind", ["link to a folder", "link to nothing", "file", "folder"])
def test_what_an_older_release_left_beside_a_target_is_in_nobodys_way(tmp_path, kind):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept").write_text("x")
    for name in (".m.old", ".m.partial"):
        if kind == "folder":
            (tmp_path / name / "a").mkdir(parents=True)
        elif kind == "file":
            (tmp_path / name).write_text("x")
        else:
            (tmp_path / name).symlink_to("far" if "folder" in kind else "nowhere")
    (tmp_path / "m").mkdir()
    make(tmp_path / "m")
    make(tmp_path / "m")
    assert left(tmp_path) == ["far", "far/kept", "m", "m/a"], "what a link leads to is nobody's to remove"


def test_links_under_the_names_of_folders_are_unlinked(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept").write_text("x")
    (tmp_path / "step").symlink_to("far")
    remove_folder(tmp_path / "step")
    (tmp_path / "step").symlink_to("far")
    (tmp_path / "step.partial").mkdir()
    commit_folder(tmp_path / "step.partial", tmp_path / "step")
    assert left(tmp_path) == ["far", "far/kept", "step"]


def test_a_fault_names_the_file_that_it_is_about(tmp_path):
    said = r"^chats\.jsonl: cannot be used \(.*\); check the path$"
    with pytest.raises(DataError, match=said), disk_faults(tmp_path / "out", DataError):
        Path("chats.jsonl").read_bytes()
    for name in ("out", ".out.partial/a", "out/b", ".out.old"):
        words = disk_words(
            OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/{name}"), tmp_path / "out"
        )
        assert words.startswith(f"{tmp_path}/out: cannot be written (No space left on device); make room")
    assert (
        disk_words(OSError(99, "odd"), Path("p")) == "p: cannot be written (odd); check space and permissions"
    )


@pytest.mark.parametrize(
    "fault", [ConnectionResetError("peer"), OSError("can't load tokenizer"), KeyError("a"), TimeoutError()]
)
def test_what_is_no_disks_fault_stays_what_it_is(fault):
    for around in (disk_faults(Path("p")), disk_faults(), fail_together()):
        with pytest.raises(type(fault)), around:
            raise fault


def test_ranks_are_told_of_a_disk_as_of_a_users_fault(tmp_path):
    with (
        pytest.raises(TideError, match=rf"^{tmp_path}/a: cannot be used \(.*\); check the path$"),
        fail_together(),
    ):
        (tmp_path / "a").read_bytes()
    full = Path("/dev/full")
    said = r"^/dev/full: cannot be written \(No space left on device\); make room"
    with (
        pytest.raises(CheckpointError, match=said),
        disk_faults(full),
        full.open("wb", buffering=0) as stream,
    ):
        stream.write(b"x")
