"""Long curves on few points: what a screen can show of a hundred thousand records.

A curve of more points than are drawn is cut into equally many records a piece, and each piece is drawn as its
mean, in a band from its smallest to its largest value: no spike is lost.
"""

from __future__ import annotations

import dataclasses

import numpy
from numpy.typing import NDArray

from tide_megatron.report.reading import Series

MOST_POINTS = 400
"""Of a curve that is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinned:
    """A curve as it is drawn."""

    steps: NDArray[numpy.float64]
    mean: NDArray[numpy.float64]
    low: NDArray[numpy.float64]
    high: NDArray[numpy.float64]
    records: int
    """A point stands for so many, or one more; 1: for itself."""


def thinned(series: Series, most: int = MOST_POINTS) -> Thinned:
    """Return a curve of at most so many points."""
    number = len(series.steps)
    starts = numpy.arange(min(number, most)) * number // min(number, most)
    sizes = numpy.diff(numpy.append(starts, number))
    return Thinned(
        steps=numpy.add.reduceat(series.steps.astype(numpy.float64), starts) / sizes,
        mean=numpy.add.reduceat(series.values, starts) / sizes,
        low=numpy.minimum.reduceat(series.values, starts),
        high=numpy.maximum.reduceat(series.values, starts),
        records=max(1, number // most),
    )
