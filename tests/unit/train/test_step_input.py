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
    with Ahead(made, 8) as ahead:
        assert ahead.take(0, is_last=False) == "input at 0"
        assert ahead.take(8, is_last=True) == "input at 8"
    assert made.positions == [0, 8], "none behind the last"
    assert made.threads[0] == threading.current_thread().name != made.threads[1]


def test_a_run_that_went_elsewhere_gets_what_is_there():
    made = Made()
    with Ahead(made, 8) as ahead:
        ahead.take(0, is_last=False)
        assert ahead.take(4, is_last=False) == "input at 4"
        assert ahead.take(12, is_last=True) == "input at 12"
    assert sorted(made.positions) == [0, 4, 8, 12]


def test_a_fault_comes_out_at_its_own_step():
    with Ahead(Made(), 8) as ahead:
        assert ahead.take(8, is_last=False) == "input at 8"
        with pytest.raises(DataError, match="sample 3"):
            ahead.take(16, is_last=False)
        assert ahead.take(24, is_last=True) == "input at 24"


def test_after_an_error_nobody_waits_for_the_thread():
    entered, free = threading.Event(), threading.Event()

    def make(position):
        if position:
            entered.set()
            free.wait(60)

    def fail(ahead):
        ahead.take(0, is_last=False)
        assert entered.wait(10)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Ahead(make, 8) as ahead:
        fail(ahead)
    free.set()
