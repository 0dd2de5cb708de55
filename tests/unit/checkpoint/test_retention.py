"""Which checkpoint a run goes on from; one process, no tensors."""

import logging
import shutil

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import write_digests
from tide_megatron.checkpoint.retention import (
    Checkpoints,
    Mark,
    add_score,
    expired,
    find_checkpoint,
    listed,
    name_of,
    point_latest,
    remove_expired,
)

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


SCORES = {1: (3.0, 0.1), 2: (2.0, 0.4), 3: (2.5, 0.5), 4: (2.0, 0.2), 5: (2.2, 0.3)}
"""Step -> nats a byte and accuracy."""


@pytest.mark.parametrize(
    ("by", "keep", "steps", "left"),
    [
        ("off", 1, (1, 2, 3, 4, 5), [5]),
        ("nll_per_byte", 1, (1, 2, 3, 4, 5), [4, 5]),  # the later of equals
        ("masked_accuracy", 1, (1, 2, 3, 4, 5), [3, 5]),
        ("nll_per_byte", 2, (1, 2, 3), [2, 3]),
        ("nll_per_byte", 1, (1,), [1]),
        ("masked_accuracy", 1, (1, 2, 4, 5), [2, 5]),  # 3 was scored and never saved
    ],
)
def test_the_best_checkpoint_stays(tmp_path, by, keep, steps, left):
    options = Checkpoints(keep=keep, keep_best=by)
    best = 0
    for step, (nll, accuracy) in SCORES.items():
        clock = Clock(step=step, consumed=8 * step)
        values = {"nll_per_byte": nll, "masked_accuracy": accuracy}
        if by != "off" and step <= max(steps):
            sign = -1 if by == "nll_per_byte" else 1
            best = max(best or -99, sign * values[by])
            assert add_score(tmp_path, clock, values, by) == (sign * values[by] == best)
        if step in steps:
            (tmp_path / name_of(clock)).mkdir()
            remove_expired(tmp_path, options)
    assert [Mark.of(path).step for path in listed(tmp_path)] == left
    if by != "off":
        kept = (tmp_path / "best").read_text().strip()
        assert kept in [path.name for path in listed(tmp_path)]
        assert Mark.of(tmp_path / kept).step == left[0]


def test_the_old_best_stays_until_the_new_one_is_whole(tmp_path):
    clocks = [Clock(step=step, consumed=8 * step) for step in (1, 2, 3)]
    add_score(tmp_path, clocks[0], {"nll_per_byte": 3.0}, "nll_per_byte")
    for clock in clocks[:2]:
        (tmp_path / name_of(clock)).mkdir()
    add_score(tmp_path, clocks[2], {"nll_per_byte": 2.0}, "nll_per_byte")  # its save has only begun
    remove_expired(tmp_path, Checkpoints(keep=1, keep_best="nll_per_byte"))
    assert [Mark.of(path).step for path in listed(tmp_path)] == [1, 2]


@pytest.mark.parametrize("text", ["{", "[]", '{"step-00000001-000000000008": 3}'])
def test_scores_that_cannot_be_read_count_for_nothing(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    assert add_score(tmp_path, Clock(step=1, consumed=8), {"nll_per_byte": 3.0}, "nll_per_byte")


def test_steps_that_are_done_again_are_scored_again(tmp_path):
    for step, nll in ((1, 3.0), (2, 1.0), (1, 2.5), (2, 2.0)):
        assert add_score(tmp_path, Clock(step=step, consumed=8 * step), {"nll_per_byte": nll}, "nll_per_byte")
