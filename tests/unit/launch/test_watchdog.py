"""What a launcher sees beside its ranks: the time of day that jumps. Ranks: tests/parallel/test_launch.py."""

import json
import logging
import time

import pytest

from tide_megatron.launch import flight_recorder, watchdog
from tide_megatron.launch.flight_recorder import pending_collective
from tide_megatron.launch.watchdog import Watchdog


def test_a_jump_of_the_clock_is_told_and_a_small_step_is_not(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "tide_megatron")
    monkeypatch.setattr(watchdog, "EVERY_SECONDS", 0.0)
    ahead = 0.0
    real = time.time
    monkeypatch.setattr(watchdog.time, "time", lambda: real() + ahead)
    with Watchdog(5.0) as watching:
        assert watching.look([]) is None
        ahead = 3.0
        watching.look([])
        assert not caplog.records
        ahead = 3603.0
        watching.look([])
        watching.look([])
        ahead = -7.0
        watching.look([])
    said = [record.getMessage() for record in caplog.records]
    assert [words.partition(":")[0] for words in said] == [
        "the clock of this machine jumped by +3600 s",
        "the clock of this machine jumped by -3610 s",
    ]


@pytest.mark.parametrize(
    "record", ["", "[]", json.dumps({"entries": [{"retired": False, "name": "of another torch"}]})]
)
def test_a_record_that_is_not_known_keeps_no_rank_from_being_ended(monkeypatch, record):
    (name, *_) = [name for name in flight_recorder._DUMPS if hasattr(flight_recorder.recorder, name)]
    monkeypatch.setattr(flight_recorder.recorder, name, lambda: record)
    assert pending_collective().startswith("what torch's flight recorder has in a form that is not known")
