"""Who speaks, and how: rank 0 from INFO, the others from WARNING with their rank."""

import io
import logging

import pytest
from rich.console import Console

from tide_megatron.base.log import ROOT, start_log


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
