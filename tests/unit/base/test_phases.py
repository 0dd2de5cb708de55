"""Phase times: exclusive, and on CUDA read when the device has passed, never waited for.

There is no GPU here: `Stream` and its events stand in for a CUDA stream whose work is done whenever the test
says so. An event that is waited for, or read too early, is a failure.
"""

import time

import pytest
import torch

from tide_megatron.base import memory
from tide_megatron.base.phases import Phases


class Allocator:
    """torch's, as far as its record goes: what is held, and the most that was since the record began."""

    def __init__(self):
        self.held = self.peak = 0

    def take(self, number):
        self.held += number
        self.peak = max(self.peak, self.held)

    def stats(self):
        return {"allocated_bytes": {"all": {"peak": self.peak, "current": self.held}}}

    def reset(self):
        self.peak = self.held


class Stream:
    """A queue of work: `asked` milliseconds were put into it, the first `done` of them are done."""

    def __init__(self):
        self.asked = self.done = 0.0
        self.events = 0
        self.allocator = Allocator()

    def launch(self, milliseconds):
        self.asked += milliseconds

    def finish(self):
        self.done = self.asked


@pytest.fixture
def stream(monkeypatch):
    """Put a stand-in for CUDA's events into torch; the phases under test make them as on a GPU."""
    made = Stream()

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing
            made.events += 1
            self.at = None

        def record(self):
            self.at = made.asked

        def query(self):
            return self.at is not None and self.at <= made.done

        def elapsed_time(self, end_event):
            assert all(event.query() for event in (self, end_event)), "CUDA refuses to read it yet"
            return end_event.at - self.at

        def synchronize(self):
            raise AssertionError("the host waits for the device")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    allocator = made.allocator
    monkeypatch.setattr(torch.cuda.memory, "memory_stats_as_nested_dict", allocator.stats)
    monkeypatch.setattr(torch.cuda.memory, "reset_peak_memory_stats", allocator.reset)
    return made


def on_cuda():
    return Phases(torch.device("cuda"))


def step(phases, stream):
    """Launch what a step launches: 7 ms of a teacher, 2 ms of an exchange inside it, 5 ms of a head."""
    with phases("teacher"):
        stream.launch(3)
        with phases("exchange"):
            stream.launch(2)
        stream.launch(4)
    with phases("head"):
        stream.launch(5)


def test_phases_are_exclusive_and_fill_the_wall_clock():
    phases = Phases()
    start = time.perf_counter()
    with phases("evaluate"):
        time.sleep(0.02)
        with phases("student"):
            time.sleep(0.04)
        with phases("head"):
            pass
    with pytest.raises(ZeroDivisionError), phases("backward"):
        raise ZeroDivisionError
    wall = time.perf_counter() - start
    taken = phases.take()
    assert list(taken) == ["evaluate", "student", "head", "backward"]
    assert taken["student"] >= 0.04
    assert 0.02 <= taken["evaluate"] < wall - 0.04 + 0.001
    assert sum(taken.values()) == pytest.approx(wall, abs=0.005)
    assert phases.take() == {}


def test_what_is_under_way_is_told_later_and_nothing_waits(stream):
    phases = on_cuda()
    step(phases, stream)
    stream.done = 6.0  # the teacher's first part and the exchange are over, the rest is not
    assert phases.take() == {"teacher": 0.003, "exchange": 0.002}
    assert phases.take() == {}
    stream.finish()
    step(phases, stream)
    assert phases.take() == {"teacher": 0.004, "head": 0.005}
    stream.finish()
    assert phases.take() == {"teacher": 0.007, "exchange": 0.002, "head": 0.005}
    assert phases.take() == {}


def test_time_outside_phases_belongs_to_none(stream):
    phases = on_cuda()
    stream.launch(11)
    step(phases, stream)
    stream.launch(13)
    phases.take()
    stream.finish()
    assert phases.take() == {"teacher": 0.007, "exchange": 0.002, "head": 0.005}


def test_a_phase_that_is_still_open_is_told_up_to_now(stream):
    phases = on_cuda()
    with phases("evaluate"):
        stream.launch(8)
        stream.finish()
        assert phases.take() == {"evaluate": 0.008}
        stream.launch(1)
    stream.finish()
    assert phases.take() == {"evaluate": 0.001}


def test_events_are_used_again(stream):
    phases = on_cuda()
    taken = []
    for number in range(500):
        step(phases, stream)  # the device is always one step behind
        stream.done = stream.asked - 5
        if number % 10 == 9:
            taken.append(phases.take())
    stream.finish()
    taken.append(phases.take())
    assert stream.events <= 20
    for name, milliseconds in (("teacher", 7), ("exchange", 2), ("head", 5)):
        assert sum(part.get(name, 0.0) for part in taken) == pytest.approx(0.5 * milliseconds)


def test_a_timer_that_nobody_reads_does_not_grow(stream):
    for phases in (on_cuda(), Phases()):
        for _ in range(200):
            step(phases, stream)
            stream.finish()
        assert len(phases._marks) < 20


def test_each_phase_has_its_own_peak_whatever_the_device_has_done(stream):
    phases, allocator = on_cuda(), stream.allocator
    allocator.take(10)
    with phases("student"):
        allocator.take(5)
        with phases("head"):
            allocator.take(100)
            allocator.take(-100)
        allocator.take(1)
    allocator.take(1000)
    allocator.take(-1000)
    with phases("update"):
        allocator.take(-16)
    assert phases.take_peaks() == {"student": 16, "head": 115, "update": 16}
    with phases("head"):
        allocator.take(3)
    assert phases.take_peaks() == {"head": 3}
    assert phases.take_peaks() == {}


def test_the_largest_memory_outlives_the_phases(stream, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: stream.allocator.peak)
    monkeypatch.setattr(memory, "_RECORD", memory._Record())
    phases = on_cuda()
    with phases("head"):
        stream.allocator.take(70)
        stream.allocator.take(-70)
    assert stream.allocator.peak == 0
    assert memory.peak_memory_bytes() == 70
    stream.allocator.take(90)
    assert memory.peak_memory_bytes() == 90


def test_on_a_cpu_no_peaks_are_made_up():
    phases = Phases()
    with phases("head"):
        pass
    assert phases.take_peaks() == {}
