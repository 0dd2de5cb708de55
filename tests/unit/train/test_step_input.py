"""What a step reads is made ahead: for the position that comes, once, and with its own fault."""

import threading

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.train.step_input import Ahead


class Made:
    """Makes a word of a position, and notes where and in which thread."""

    def __init__(self):
        self.positions, self.threads = [], []

    def __call__(self, position):
        self.positions.append(position)
        self.threads.append(threading.current_thread().name)
        if position == 16:
            raise DataError("sample 3 has a token id that nobody knows")
        return f"input at {position}"


def test_the_next_one_is_made_in_a_thread_while_this_one_is_used():
    made = Made()
    with Ahead(made) as ahead:
        assert ahead.take(0, 8) == "input at 0"
        assert ahead.take(8, None) == "input at 8"
    assert made.positions == [0, 8], "none behind the last"
    assert made.threads[0] == threading.current_thread().name != made.threads[1]


def test_a_run_that_went_elsewhere_gets_what_is_there():
    made = Made()
    with Ahead(made) as ahead:
        ahead.take(0, 8)
        assert ahead.take(4, 12) == "input at 4"
        assert ahead.take(12, None) == "input at 12"
    assert sorted(made.positions) == [0, 4, 8, 12]


def test_a_fault_comes_out_at_its_own_step():
    with Ahead(Made()) as ahead:
        assert ahead.take(8, 16) == "input at 8"
        with pytest.raises(DataError, match="sample 3"):
            ahead.take(16, 24)
        assert ahead.take(24, None) == "input at 24"


def test_after_an_error_nobody_waits_for_the_thread():
    entered, free = threading.Event(), threading.Event()

    def make(position):
        if position:
            entered.set()
            free.wait(60)

    with pytest.raises(ZeroDivisionError), Ahead(make) as ahead:
        ahead.take(0, 8)
        assert entered.wait(10)
        raise ZeroDivisionError
    free.set()
