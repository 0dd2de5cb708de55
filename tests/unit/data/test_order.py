"""The order of an epoch: a permutation from (seed, epoch) alone, sorted or computed place by place."""

import numpy
import pytest

from tide_megatron.data import order
from tide_megatron.data.order import order_of_epoch, samples_at


def test_the_order_depends_on_seed_and_epoch_only():
    orders = [order_of_epoch(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    numpy.random.seed(5)
    order_of_epoch.cache_clear()
    assert order_of_epoch(1, 1, 50).tolist() == orders[3]


def test_the_order_is_pinned():
    # A change here reorders the data of every run: resumed runs would read samples twice and others never.
    assert order_of_epoch(42, 0, 10).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]


def test_orders_are_uniform():
    orders = numpy.stack([order_of_epoch(7, epoch, 4) for epoch in range(2400)])
    counts = numpy.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert numpy.abs(counts - 100).max() < 45  # four and a half standard deviations


LARGE = order.SORTED + 1000


def test_many_samples_are_permuted_without_a_table(monkeypatch):
    monkeypatch.setattr(order, "order_of_epoch", lambda *key: pytest.fail("sorted"))
    orders = [samples_at(seed, range(LARGE), LARGE) for seed in (0, 1)]
    orders.append([(sample, 0) for sample, epoch in samples_at(0, range(LARGE, 2 * LARGE), LARGE)])
    for found in orders:
        assert sorted(found) == [(sample, 0) for sample in range(LARGE)]
    numbers = numpy.array([[sample for sample, _ in found] for found in orders])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (numbers[one] == numbers[other]).sum() < 12  # one is expected
    assert abs(numpy.corrcoef(numbers[0], numpy.arange(LARGE))[0, 1]) < 0.005
    assert abs(numpy.corrcoef(numbers[0, 1:], numbers[0, :-1])[0, 1]) < 0.005


def test_a_place_is_computed_by_itself():
    places = [0, 5, LARGE - 1, LARGE, 7 * LARGE + 3]
    assert samples_at(9, places, LARGE) == [samples_at(9, [place], LARGE)[0] for place in places]
    assert [epoch for _, epoch in samples_at(9, places, LARGE)] == [0, 0, 0, 1, 7]


def test_the_computed_order_is_pinned():
    assert [sample for sample, _ in samples_at(42, range(4), LARGE)] == [96439, 889885, 159490, 491067]


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 16, 17, 100, 1000])
def test_any_number_of_samples_is_permuted(samples, monkeypatch):
    monkeypatch.setattr(order, "SORTED", 0)
    assert sorted(samples_at(3, range(samples), samples)) == [(sample, 0) for sample in range(samples)]


def test_computed_orders_are_uniform(monkeypatch):
    monkeypatch.setattr(order, "SORTED", 0)
    orders = numpy.array([[sample for sample, _ in samples_at(seed, range(4), 4)] for seed in range(2400)])
    counts = numpy.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert numpy.abs(counts - 100).max() < 45  # four and a half standard deviations
