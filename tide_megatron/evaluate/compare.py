"""Is one run better than another? Paired differences with a confidence interval.

Evaluation hides the same tokens of the same samples for every run, so two runs are compared sample by sample:
what makes a sample hard drops out of the difference. The interval is Student's over the pairs (samples of one
run pair, or seeds). It says how sure the difference is for other samples (or seeds) like these, and nothing
about other base models or data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy

from tide_megatron.base.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean paired difference and its 95 % interval."""

    mean: float
    ci95: tuple[float, float]
    """(low, high); both NaN for a single pair."""
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.ci95
        return low > 0 or high < 0


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the mean of `one - other` over pairs, with its 95 % t interval.

    Args:
        one: a value per pair, for example NLL per byte of each sample under the distilled student.
        other: the value of the same pairs under the reference.

    Raises:
        DataError: no pairs, or sequences of different lengths.
    """
    if len(one) != len(other) or not len(one):
        raise DataError(
            f"paired values: {len(one)} against {len(other)}; score both runs on the same held-out samples"
        )
    values = numpy.asarray(one, dtype=numpy.float64) - numpy.asarray(other, dtype=numpy.float64)
    mean, pairs = float(values.mean()), len(values)
    half = math.nan
    if pairs > 1:
        half = t_quantile(pairs - 1) * float(values.std(ddof=1)) / math.sqrt(pairs)
    return Difference(mean=mean, ci95=(mean - half, mean + half), pairs=pairs)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """Return q with P(|T| < q) = `share` for Student's T, good to 5 digits.

    With T = sqrt(freedom) * tan(angle) the density of the angle is proportional to cos(angle)^(freedom - 1),
    which is integrated on a grid; the base package has no statistics library.
    """
    # Beyond 12 standard deviations of the angle nothing is left to integrate.
    angles = numpy.linspace(0.0, min(math.pi / 2, 12 / math.sqrt(freedom)), 20_001)
    density = numpy.cos(angles) ** (freedom - 1)
    mass = numpy.concatenate([[0.0], numpy.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(numpy.interp(share * mass[-1], mass, angles)))
