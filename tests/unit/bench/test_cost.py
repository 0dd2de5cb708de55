"""Seconds and bytes of known works."""

from __future__ import annotations

import pytest
import torch

from bench import cost
from bench.cost import apart, machine, median_costs, peak_bytes, spent

MIB = 2**20


class Clocks:
    """Stands in for the time module: works move its clocks, no other process does."""

    def __init__(self):
        self.cpu = self.wall = 100.0

    def process_time(self):
        return self.cpu

    def perf_counter(self):
        return self.wall

    def spin(self, seconds):
        self.cpu += seconds
        self.wall += seconds

    def sleep(self, seconds):
        self.wall += seconds


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr(cost, "time", clocks)
    return clocks


def fill(mib):
    return torch.full((mib * MIB,), 1, dtype=torch.uint8)


def peak_of_passing(mib):
    """Raise the mark, free it, then measure a smaller call whose value is small."""
    fill(4 * mib)
    return peak_bytes(lambda: len(fill(mib)))


def test_sleep_costs_wall_and_spinning_costs_both(clocks):
    slept, spun = spent(lambda: clocks.sleep(0.25)), spent(lambda: clocks.spin(0.5))
    assert (slept.cpu, slept.wall) == (0.0, 0.25)
    assert (spun.cpu, spun.wall) == (0.5, 0.5)


def test_medians_leave_out_the_warm_up_and_an_outlier(clocks):
    pending = [64.0, 0.25, 8.0, 0.5]
    costs = median_costs({"uneven": lambda: clocks.spin(pending.pop(0)), "none": lambda: None}, rounds=3)
    assert costs["uneven"].cpu == costs["uneven"].wall == 0.5
    assert costs["none"].cpu == costs["none"].wall == 0.0
    assert not pending


def test_works_take_turns():
    order = []
    median_costs({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3


def test_the_peak_is_what_a_call_holds_at_once():
    """In a fresh process, whatever it held before: the mark is put back."""
    mib = 64
    peak, value = apart(peak_of_passing, mib)
    assert value == mib * MIB
    assert peak == pytest.approx(mib * MIB, abs=4 * MIB)  # the kernel counts pages in batches


def test_the_machine_has_a_name():
    found = machine()
    assert found["cpu"]
    assert found["torch"] == torch.__version__
