"""The account of a start: parts by name, all of the time, and when a process began."""

import time

import pytest

from tide_megatron.base.startup import Startup, process_began


@pytest.fixture
def clock(monkeypatch):
    """Give a hand that turns the clock."""
    at = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    return at


def test_parts_of_one_name_are_added_and_what_is_between_them_is_in_none(clock):
    startup = Startup()
    startup.begin(90.0)
    startup.until_now("imports")
    for _ in range(2):
        with startup("student"):
            clock[0] += 2.0
        clock[0] += 1.0
    assert startup.seconds() == {"imports": 10.0, "student": 4.0, "": 16.0}
    assert list(startup.seconds()) == ["imports", "student", ""]


def test_a_part_that_fails_counts_and_ends(clock):
    startup = Startup()

    def fail():
        clock[0] += 3.0
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), startup("data"):
        fail()
    with startup("groups"):
        pass
    assert startup.seconds() == {"data": 3.0, "groups": 0.0, "": 3.0}


def test_a_part_inside_a_part_is_a_bug(clock):
    startup = Startup()
    inner = startup("groups")
    with startup("student"), pytest.raises(AssertionError, match="groups began inside student"), inner:
        pass


def test_a_new_start_forgets_the_old_one(clock):
    startup = Startup()
    startup.add("data", 5.0)
    clock[0] = 200.0
    startup.begin(198.0)
    assert startup.seconds() == {"": 2.0}


def test_a_process_began_before_now_and_not_before_the_machine():
    age = time.monotonic() - process_began()
    assert 0.0 < age < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert age > time.process_time() / 64  # it has used this much of at most 64 cores
