"""Which checkpoint a run goes on from; one process, no tensors."""

import logging
import shutil

import pytest

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import write_digests
from tide_megatron.checkpoint.retention import Mark, expired, find_checkpoint, listed, point_latest

NAMES = [f"step-{step:08d}-{8 * step:012d}" for step in (2, 4, 6)]


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints, the newest of which `latest` names."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.distcp").write_bytes(name.encode() * 100)
        write_digests(tmp_path / name, {})
    point_latest(tmp_path, NAMES[-1])
    return tmp_path


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="tide_megatron")
    logging.getLogger("tide_megatron").propagate = True
    return lambda: [record.getMessage() for record in caplog.records]


def flip(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)


def test_the_newest_whole_one_is_found_without_a_word(folder, said):
    assert find_checkpoint(folder) == folder / NAMES[2]
    assert said() == []


@pytest.mark.parametrize("there", [True, False])
def test_a_run_without_any_starts_anew(tmp_path, there):
    folder = tmp_path / "checkpoints"
    if there:
        (folder / "step-00000002-000000000016.partial").mkdir(parents=True)
    assert find_checkpoint(folder) is None
    assert not there or not list(folder.iterdir())


def test_a_damaged_one_is_named_set_aside_and_what_is_lost_is_said(folder, said):
    flip(folder / NAMES[2] / "a.distcp")
    (folder / NAMES[1] / "a.distcp").unlink()
    assert find_checkpoint(folder) == folder / NAMES[0]
    assert [path.name for path in listed(folder)] == NAMES[:1]
    assert (folder / f"{NAMES[2]}.damaged").is_dir()
    assert (folder / "latest").read_text().strip() == NAMES[0]
    first, second = said()
    assert first == (
        f"{NAMES[2]} is damaged (a.distcp has other bytes than were written (SHA-256 differs)); "
        f"going on from {NAMES[0]}: 4 steps, 32 samples will be trained again"
    )
    assert second.startswith(f"{NAMES[1]} is damaged (a.distcp is missing); ")


def test_nothing_whole_is_an_error_that_touches_nothing(folder):
    for name in NAMES:
        flip(folder / name / "a.distcp")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole(.|\n)*a\.distcp has other"):
        find_checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("content", [None, "", "step-9\n", f"{NAMES[0]}\n"])
def test_a_latest_that_is_missing_damaged_or_behind_does_not_matter_but_is_mended(folder, said, content):
    (folder / "latest").unlink()
    if content is not None:
        (folder / "latest").write_text(content)
    assert find_checkpoint(folder) == folder / NAMES[2]
    assert (folder / "latest").read_text().strip() == NAMES[2]
    assert len(said()) == 1
    assert "going on from step-00000006" in said()[0]


def test_a_latest_without_any_checkpoint_is_an_error(folder):
    for name in NAMES:
        shutil.rmtree(folder / name)
    with pytest.raises(
        CheckpointError, match=r"none of its checkpoints is whole \(latest names a missing one\)"
    ):
        find_checkpoint(folder)


def test_what_killed_saves_left_goes(folder):
    (folder / "step-00000008-000000000064.partial").mkdir()
    (folder / "latest.partial").write_text("half")
    assert find_checkpoint(folder) == folder / NAMES[2]
    assert not list(folder.glob("*.partial"))


def test_names_say_where_a_checkpoint_stands_and_sort_by_it(folder):
    (folder / "step-00000005-000000000004").mkdir()  # fewer samples: of an older run
    assert [Mark.of(path).consumed for path in listed(folder)] == [4, 16, 32, 48]


@pytest.mark.parametrize(
    ("keep", "every", "gone"),
    [(2, 0, NAMES[:1]), (1, 4, NAMES[:1]), (1, 0, NAMES[:2]), (9, 0, []), (1, 1, [])],
)
def test_the_newest_few_and_every_so_many_stay(folder, keep, every, gone):
    assert [path.name for path in expired(listed(folder), keep, every)] == gone
