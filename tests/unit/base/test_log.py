"""Who speaks, and how: rank 0 from INFO, the others from WARNING with their rank."""

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from tide_megatron.base.log import ROOT, SHOWN, Journal, start_log


@pytest.fixture(autouse=True)
def _restored_logger():
    logger = logging.getLogger(ROOT)
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


def spoken(rank, **options):
    text = io.StringIO()
    start_log(rank, console=Console(file=text, width=200), **options)
    child = logging.getLogger(f"{ROOT}.train.loop")
    child.debug("small %d", 1)
    child.info("step %d [bold]", 2)
    child.warning("slow %s", "disk")
    return [line.rstrip().split(maxsplit=2)[1:] for line in text.getvalue().splitlines()]


def test_rank_0_tells_the_story():
    assert spoken(0) == [["INFO", "step 2 [bold]"], ["WARNING", "slow disk"]]
    assert spoken(0, verbose=True)[0] == ["DEBUG", "small 1"]


def test_other_ranks_only_warn_and_say_who_they_are():
    assert spoken(3) == [["WARNING", "[rank 3] slow disk"]]
    assert spoken(3, verbose=True) == [["WARNING", "[rank 3] slow disk"]]


def test_a_second_start_replaces_the_first():
    spoken(0)
    spoken(1)
    assert len(logging.getLogger(ROOT).handlers) == 1


def test_a_terminal_gets_lines_that_wrap_and_everything_else_one_line_a_message():
    for is_terminal, lines in ((True, 4), (False, 1)):
        text = io.StringIO()
        start_log(console=Console(file=text, width=40, force_terminal=is_terminal, color_system=None))
        logging.getLogger(f"{ROOT}.x").info("word " * 25 + "[bold] :smile:")
        found = text.getvalue().splitlines()
        assert len(found) >= lines
        assert is_terminal or (len(found) == 1 and found[0].endswith("word [bold] :smile:"))


def test_a_journal_has_everything_also_what_was_said_before_it_was_open(tmp_path):
    start_log(console=Console(file=io.StringIO()))
    log, shown = logging.getLogger(f"{ROOT}.x"), logging.getLogger(SHOWN)
    shown.info("nobody listens")
    journal = Journal()
    log.info("before")
    journal.open(tmp_path / "run.log")
    log.warning("after %d", 1)
    shown.info("step 1")
    journal.close()
    log.warning("nobody listens")
    lines = [line.split(maxsplit=2)[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == ["INFO     before", "WARNING  after 1", "INFO     step 1"]
    again = Journal()
    again.open(tmp_path / "run.log")
    log.info("second")
    again.close()
    assert (tmp_path / "run.log").read_text().count("\n") == 4


def test_a_journal_that_cannot_be_written_is_told_and_ends_nothing(tmp_path):
    text = io.StringIO()
    start_log(console=Console(file=text))
    journal = Journal()
    journal.open(tmp_path / "gone/run.log")
    journal.close()
    assert "run.log: not written" in text.getvalue()
    assert len(logging.getLogger(ROOT).handlers) == 1


def test_a_journal_whose_disk_is_full_is_told_once(capsys):
    text = io.StringIO()
    start_log(console=Console(file=text))
    journal = Journal()
    journal.open(Path("/dev/full"))
    for _ in range(3):
        logging.getLogger(f"{ROOT}.x").info("word")
    journal.close()
    assert text.getvalue().count("/dev/full: not written any more") == 1
    assert text.getvalue().count("No space left on device") == 1
    assert capsys.readouterr().err == ""
