"""Paired differences: means, intervals against tables, and the pairs that cannot be."""

import math

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.evaluate.compare import paired_difference, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # 97.5 % points of Student's T from printed tables
    [
        (1, 12.7062),
        (2, 4.30265),
        (4, 2.77645),
        (10, 2.22814),
        (30, 2.04227),
        (255, 1.96931),
        (100_000, 1.95999),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, rel=2e-5)


def test_the_interval_is_students():
    # differences 1, 2, 3: mean 2, standard deviation 1
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert difference.mean == 2.0
    assert difference.ci95 == pytest.approx((2 - half, 2 + half), rel=1e-4)
    assert difference.pairs == 3
    assert not difference.is_clear


def test_what_makes_samples_hard_drops_out():
    hard = [1.0, 10.0, 100.0, 1000.0]
    difference = paired_difference([value - 0.5 for value in hard], hard)
    assert difference.mean == -0.5
    assert difference.ci95 == (-0.5, -0.5)
    assert difference.is_clear


def test_one_pair_has_no_interval():
    difference = paired_difference([1.0], [0.0])
    assert difference.mean == 1.0
    assert all(map(math.isnan, difference.ci95))
    assert not difference.is_clear


@pytest.mark.parametrize(("one", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_pairs_must_be_pairs(one, other):
    with pytest.raises(DataError, match=r"paired values: \d against \d; score both runs on the same"):
        paired_difference(one, other)
