"""What a launcher sees beside its ranks: the time of day that jumps. Ranks: tests/parallel/test_launch.py."""

import json
import logging
import threading
import time
from types import SimpleNamespace

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


def with_recorders(monkeypatch, other, nccl=None):
    """Stand in for torch's recorders: for its one of gloo, and where there is NCCL for that one's."""
    dumps = {"_dump_fr_trace_json": other, **({"_dump_nccl_trace_json": nccl} if nccl else {})}
    monkeypatch.setattr(flight_recorder, "recorder", SimpleNamespace(**dumps))


def record_of(name, number):
    call = {"retired": False, "record_id": number, "profiling_name": name, "input_sizes": [[4]]}
    call |= {"is_p2p": False, "collective_seq_id": number, "process_group": ["0", "world"]}
    return json.dumps({"entries": [call | {"record_id": number + 1}, call, call | {"retired": True}]})


def test_nccl_has_a_recorder_of_its_own(monkeypatch):
    with_recorders(monkeypatch, lambda: json.dumps({"entries": []}), lambda: record_of("nccl:all_reduce", 7))
    assert pending_collective() == "nccl:all_reduce of [4], call 7 of group 0"
    with_recorders(monkeypatch, lambda: record_of("gloo:barrier", 3), lambda: record_of("nccl:all_reduce", 7))
    both = "nccl:all_reduce of [4], call 7 of group 0, and gloo:barrier of [4], call 3 of group 0"
    assert pending_collective() == both


def test_a_recorder_that_does_not_answer_keeps_nobody(monkeypatch):
    """NCCL's asks the GPU, and that may hang."""
    monkeypatch.setattr(flight_recorder, "ANSWER_SECONDS", 0.2)
    is_over = threading.Event()
    with_recorders(monkeypatch, lambda: record_of("gloo:barrier", 3), is_over.wait)
    started = time.monotonic()
    said = pending_collective()
    assert time.monotonic() - started < 3
    is_over.set()
    mute = "what torch's flight recorder did not tell within 0.2 s"
    assert said == f"{mute}, and gloo:barrier of [4], call 3 of group 0"


@pytest.mark.parametrize(
    "record", ["", "[]", json.dumps({"entries": [{"retired": False, "name": "of another torch"}]})]
)
def test_a_record_that_is_not_known_keeps_no_rank_from_being_ended(monkeypatch, record):
    with_recorders(monkeypatch, lambda: record)
    assert pending_collective().startswith("what torch's flight recorder has in a form that is not known")
