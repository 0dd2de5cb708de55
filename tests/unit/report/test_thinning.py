"""Thinned curves: few points, the means of their records, and no spike lost."""

import itertools

import numpy
import pytest

from tide_megatron.report.reading import Series
from tide_megatron.report.thinning import thinned


def test_short_curves_stay_as_they_are():
    points = thinned(Series(steps=numpy.arange(7), values=numpy.arange(7.0)), most=7)
    assert points.records == 1
    assert points.mean.tolist() == points.low.tolist() == points.high.tolist() == list(range(7))


@pytest.mark.parametrize("number", [401, 999, 100_000])
def test_long_ones_keep_their_mean_and_their_spikes(number):
    values = numpy.random.default_rng(1).normal(size=number)
    values[number // 3] = 1000.0
    points = thinned(Series(steps=numpy.arange(number), values=values), most=400)
    edges = numpy.arange(401) * number // 400
    means = [values[start:stop].mean() for start, stop in itertools.pairwise(edges)]
    assert points.mean == pytest.approx(means)
    assert points.high.max() == 1000.0
    assert points.low.min() == values.min()
    assert points.records == number // 400
    assert (numpy.diff(points.steps) > 0).all()
