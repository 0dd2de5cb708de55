"""Every start and its end: what is written, what a kill leaves, and what is read of damaged lines."""

import json

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.base.lease import LEASE, leased
from tide_megatron.base.stop import Stopped
from tide_megatron.train.folder import CHECKPOINTS, STARTS
from tide_megatron.train.history import (
    has_saved,
    note_end,
    note_failure,
    note_start,
    noting_faults,
    read_history,
)

CLOCK = Clock(total_steps=9, step=4)


def test_starts_come_back_with_their_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    note_start(tmp_path, CLOCK, 3, 8)
    note_end(tmp_path, "stopped", "SIGTERM", 6)
    note_start(tmp_path, CLOCK, None, 8)
    first, second = read_history(tmp_path)
    assert (first.step, first.lost, first.ranks, first.restarts) == (4, 3, 8, 2)
    assert first.job.startswith("17")
    assert (first.end, first.why, first.last_step) == ("stopped", "SIGTERM", 6)
    assert (second.end, second.ended_at) == (None, "")


@pytest.mark.parametrize(
    ("fault", "end", "why"),
    [
        (
            TideError("losses.kl: no such teacher\nsecond line"),
            "failed",
            "TideError: losses.kl: no such teacher second",
        ),
        (Stopped("stopped by SIGTERM"), "stopped", "Stopped: stopped by SIGTERM"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ValueError("x" * 9000), "failed", "ValueError: xxx"),
    ],
)
def test_the_fault_that_ends_a_run_is_its_end(tmp_path, fault, end, why):
    note_start(tmp_path, CLOCK, None, 1)
    with pytest.raises(type(fault)), noting_faults(tmp_path):
        raise fault
    (start,) = read_history(tmp_path)
    assert start.end == end
    assert start.why.startswith(why)
    assert len(start.why) <= 500
    assert "\n" not in start.why


def test_another_ranks_fault_is_left_to_the_first(tmp_path):
    note_start(tmp_path, CLOCK, None, 2)
    with pytest.raises(ValueError, match="mine"), noting_faults(None):
        raise ValueError("mine")
    assert read_history(tmp_path)[0].end is None


def test_whoever_started_the_ranks_tells_the_end_that_they_could_not(tmp_path):
    note_failure(tmp_path, "nothing ever started here")
    assert not (tmp_path / STARTS).exists()
    note_start(tmp_path, CLOCK, None, 2)
    with leased(tmp_path / LEASE, "folder"):
        note_failure(tmp_path, "folder: in use by another run")  # a second start was refused: the first lives
        assert read_history(tmp_path)[0].end is None
    note_failure(tmp_path, "rank 1 of 2 failed first: it was killed by SIGKILL")
    note_failure(tmp_path, "rank 0 of 2: an echo, from another node")
    (start,) = read_history(tmp_path)
    assert (start.end, start.why) == ("failed", "rank 1 of 2 failed first: it was killed by SIGKILL")


def test_the_first_error_goes_before_the_peers_that_the_first_rank_lost(tmp_path):
    note_start(tmp_path, CLOCK, None, 2)
    note_end(tmp_path, "failed", "RuntimeError: Connection closed by peer")
    note_failure(tmp_path, "rank 1 of 2 failed first: it was killed by SIGKILL")
    note_failure(tmp_path, "another node's words")
    assert read_history(tmp_path)[0].why.startswith("rank 1 of 2 failed first")
    note_start(tmp_path, CLOCK, None, 2)
    note_end(tmp_path, "failed", "TideError: no memory")
    note_failure(tmp_path, "no memory")
    assert read_history(tmp_path)[1].why == "TideError: no memory"
    note_start(tmp_path, CLOCK, None, 2)
    note_end(tmp_path, "finished", "", 9)
    note_failure(tmp_path, "a later start was refused")
    assert read_history(tmp_path)[2].end == "finished"


@pytest.mark.parametrize(
    "lines",
    [
        '{"at": "x", "step": 1}\n{"at": "y", "st',
        '{"at": "x", "step": 1, "of another release": 3}\n[1]\nnull\n',
        '\n{"end": "failed"}\n{"at": "x", "step": 1}\n',
    ],
)
def test_lines_that_a_kill_cut_short_are_left_out(tmp_path, lines):
    (tmp_path / STARTS).write_text(lines)
    assert [(start.at, start.step, start.end) for start in read_history(tmp_path)] == [("x", 1, None)]


def test_words_of_any_alphabet_are_kept(tmp_path):
    note_start(tmp_path, CLOCK, None, 1)
    note_end(tmp_path, "failed", "models/größe \udcff fehlt")
    said = json.loads((tmp_path / STARTS).read_text(encoding="utf-8").splitlines()[1])
    assert said["why"].startswith("models/größe")


def test_a_start_that_saved_nothing_later_than_it_began_at_has_not_saved(tmp_path):
    assert not has_saved(tmp_path)
    note_start(tmp_path, CLOCK, None, 1)
    assert not has_saved(tmp_path)
    (tmp_path / CHECKPOINTS / "step-00000004-000000000032").mkdir(parents=True)
    assert not has_saved(tmp_path)
    (tmp_path / CHECKPOINTS / "step-00000005-000000000040").mkdir()
    assert has_saved(tmp_path)
