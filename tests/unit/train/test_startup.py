"""What is told of a start at its first update: the longest of all ranks, once, in log, history and page."""

import logging

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.base.startup import STARTUP
from tide_megatron.launch.status import lines_of, look
from tide_megatron.train import startup as module
from tide_megatron.train.history import note_end, note_start, read_history
from tide_megatron.train.startup import FirstUpdate, slowest, startup_table
from tide_megatron.train.status import write_status

RANKS = [
    {"imports": 9.0, "data": 1.0, "teachers.moe": 4.0, "": 16.0},
    {"imports": 7.0, "data": 1.0, "teachers.moe": 20.0, "": 30.0},
    {"imports": 8.0, "data": 1.0, "teachers.moe": 5.0, "": 31.0},
]


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Give a run folder whose start has come to its first update, on three ranks."""
    (tmp_path / "recipe.yaml").write_text("steps: 1\n")
    note_start(tmp_path, Clock(total_steps=9), None, 3)
    monkeypatch.setattr(module, "gather_objects", lambda own: [*RANKS[:2], RANKS[2] | own | RANKS[2]])
    STARTUP.begin(0.0)
    first = FirstUpdate(tmp_path)
    first.done()
    first.done()
    return tmp_path


def test_the_longest_of_all_ranks_and_the_rank_are_kept():
    assert slowest(RANKS) == {"imports": (9.0, 0), "data": (1.0, 0), "teachers.moe": (20.0, 1)}


def test_the_table_has_the_time_that_even_the_busiest_rank_waits():
    cells = [list(column.cells) for column in startup_table(RANKS).columns]
    assert cells[0][-1] == "in none, at least"
    assert cells[1] == ["9.00 s", "1.00 s", "20.00 s", "2.00 s"]  # rank 0 waits 2 s, rank 2 for rank 1
    assert cells[3][2] == "5.00 s"


def test_a_start_is_told_once_and_keeps_its_end(told):
    assert len((told / "starts.jsonl").read_text().splitlines()) == 2
    note_end(told, "stopped", "SIGTERM", 3)
    (start,) = read_history(told)
    assert (start.startup_seconds, start.end) == (31.0, "stopped")
    assert start.startup["teachers.moe"] == [20.0, 1]
    assert "first update" in start.startup


def test_status_and_page_show_it(told):
    lines = lines_of(look(told))
    assert (
        "its first update ended 31 s after the command began: teachers.moe 20.0 s, imports 9.0 s" in lines[-1]
    )
    write_status(told)
    page = (told / "status.html").read_text()
    assert "<td>20.00</td><td>1</td>" in page
    assert '<td class="text">31 s</td>' in page


def test_a_start_without_a_first_update_shows_none(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 1\n")
    note_start(tmp_path, Clock(total_steps=9), None, 3)
    assert not any("first update" in line for line in lines_of(look(tmp_path)))
    write_status(tmp_path)
    assert "before the first update" not in (tmp_path / "status.html").read_text()


def test_the_log_has_the_table(told, caplog):
    with caplog.at_level(logging.INFO):
        FirstUpdate(told).done()
    assert "the first update ended 31.0 s after the command began:" in caplog.text
    assert "teachers.moe" in caplog.text
