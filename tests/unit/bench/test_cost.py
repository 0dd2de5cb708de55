"""Seconds and bytes of known works."""

from __future__ import annotations

import time

import pytest
import torch

from bench.cost import apart, machine, median_costs, peak_bytes, spent

MIB = 2**20


def spin(seconds):
    started = time.process_time()
    while time.process_time() - started < seconds:
        pass


def fill(mib):
    return torch.full((mib * MIB,), 1, dtype=torch.uint8)


def peak_of_passing(mib):
    """Raise the mark, free it, then measure a smaller call whose value is small."""
    fill(4 * mib)
    return peak_bytes(lambda: len(fill(mib)))


def test_sleep_costs_wall_and_spinning_costs_cpu():
    slept, spun = spent(lambda: time.sleep(0.1)), spent(lambda: spin(0.1))
    assert slept.wall >= 0.1
    assert slept.cpu < 0.05
    assert spun.cpu >= 0.1
    assert spun.wall >= spun.cpu * 0.99


def test_medians_leave_out_the_warm_up_and_an_outlier():
    pending = [0.3, 0.01, 0.2, 0.01]
    costs = median_costs({"uneven": lambda: spin(pending.pop(0)), "none": lambda: None}, rounds=3)
    assert 0.01 <= costs["uneven"].cpu < 0.1
    assert costs["none"].cpu < 0.01
    assert not pending


def test_works_take_turns():
    order = []
    median_costs({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("mib", [16, 64])
def test_the_peak_is_what_a_call_holds_at_once(mib):
    """In a fresh process, whatever it held before: the mark is put back."""
    peak, value = apart(peak_of_passing, mib)
    assert value == mib * MIB
    assert peak == pytest.approx(mib * MIB, abs=4 * MIB)  # the kernel counts pages in batches


def test_the_machine_has_a_name():
    found = machine()
    assert found["cpu"]
    assert found["torch"] == torch.__version__
