"""A sample of `tools/kill_test.py`: three kills of real processes at moments drawn from a seed."""

import pytest

from kill_test import run

pytestmark = pytest.mark.timeout(280)


def test_a_killed_run_loses_one_interval_at_most_and_learns_the_same(tmp_path):
    tally = run(3, 2, 20261127, tmp_path)
    assert tally.kills == 3
    assert tally.is_good, tally
