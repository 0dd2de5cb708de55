"""What a restart has lost is known to the step, and a run stops while a step and a save still fit."""

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.base.stop import StopFlag
from tide_megatron.train.last_step import Deadline, LastStep, lost_steps


def test_the_last_step_outlives_the_run_and_a_restart_begins_anew(tmp_path):
    with LastStep(tmp_path, Clock(step=0)) as last:
        for step in range(1, 12):
            last.note(Clock(step=step))
        assert lost_steps(tmp_path, Clock(step=8)) == 3, "also while the file is open, as a kill leaves it"
    assert lost_steps(tmp_path, Clock(step=8)) == 3
    assert lost_steps(tmp_path, Clock(step=11)) == 0
    with LastStep(tmp_path, Clock(step=8)) as last:
        assert lost_steps(tmp_path, Clock(step=8)) == 0, "what the first start lost is not lost twice"
        last.note(Clock(step=9))
    assert lost_steps(tmp_path, Clock(step=8)) == 1
    assert lost_steps(tmp_path, Clock(step=10)) == 0


def test_other_ranks_and_disks_that_refuse_keep_nothing(tmp_path):
    LastStep(tmp_path, Clock(step=3), is_kept=False).note(Clock(step=4))
    LastStep(tmp_path / "missing", Clock(step=3)).note(Clock(step=4))
    assert list(tmp_path.iterdir()) == []
    assert lost_steps(tmp_path, Clock(step=1)) is None
    (tmp_path / "last_step").write_text("half")
    assert lost_steps(tmp_path, Clock(step=1)) is None


def steps_until_stop(ends_at, seconds, saves=()):
    """Let steps of some seconds pass; return after how many of them the run was asked to stop."""
    time, stop = [0.0], StopFlag()
    stop.ends_at = ends_at
    deadline = Deadline(stop, lambda: saves, now=lambda: time[0])
    for number, each in enumerate(seconds, start=1):
        time[0] += each
        deadline.after_step()
        if stop.requested:
            return number, stop.reason
    return None


@pytest.mark.parametrize(
    ("ends_at", "seconds", "saves", "stops_after"),
    [
        (None, [1.0] * 200, (), None),
        (1000.0, [1.0] * 200, (), None),
        (200.0, [1.0] * 200, (), 110),  # 91 needed: step 1, save 60, rest 30; 90 are left after step 110
        (200.0, [1.0] * 200, (2.0, 10.0), 150),  # 51 needed
        (200.0, [40.0] + [1.0] * 200, (5.0,), 121),  # 41 needed: the first step does not count
        (200.0, [1.0, 30.0] + [1.0] * 200, (5.0,), 102),  # 70 needed: an evaluation in between does
        (10.0, [1.0] * 5, (), 1),  # each start makes a step, so a run goes on for ever only if it gets on
    ],
)
def test_a_run_stops_while_a_step_and_a_save_still_fit(ends_at, seconds, saves, stops_after):
    found = steps_until_stop(ends_at, seconds, saves)
    assert (found and found[0]) == stops_after


def test_the_reason_says_how_much_was_left():
    assert steps_until_stop(60.0, [2.0], (4.0,)) is None
    assert steps_until_stop(41.0, [2.0], (4.0,)) == (
        1,
        "its job's limit (39 s are left, a step and a save need 40)",
    )


def test_an_earlier_reason_stays():
    stop = StopFlag()
    stop.ends_at = 1.0
    stop.request("SIGTERM")
    Deadline(stop, list, now=lambda: 5.0).after_step()
    assert stop.reason == "SIGTERM"
