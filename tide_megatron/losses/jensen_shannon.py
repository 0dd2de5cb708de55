"""Jensen-Shannon divergence: both models against the mean of the two, per pair of rows.

Symmetric and bounded by T^2 log 2, so a teacher that is sure and wrong pulls no harder than that. Not in the
paper; it is here as the proof that a divergence whose gradient needs a sum over the whole vocabulary is one
file: d/dz_v = T/2 p_s (log(p_s / m) - KL(p_s || m)), and no rank knows KL(p_s || m) before both softmaxes are
normalised, hence the second exchange.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional

from tide_megatron.base.options import STRICT
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import Distribution


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JensenShannon(ColumnLoss):
    """Half of KL(student || m) + KL(teacher || m), m the mean of both."""

    row_statistic: ClassVar[Literal["sum"]] = "sum"

    def value(self, student: Distribution, target: Distribution) -> Tensor:
        """Return T^2/2 sum_v [p_s log(p_s / m) + p_t log(p_t / m)] of each pair."""
        both = student.p * _over_mean(student, target) + target.p * _over_mean(target, student)
        return self.temperature**2 / 2 * both.sum(-1)

    def slope(self, student: Distribution, target: Distribution, row: Tensor | None) -> Tensor:
        """Return T/2 p_s (log(p_s / m) - KL(p_s || m))."""
        assert row is not None, "the slope needs the whole row's KL(p_s || m)"
        excess = _over_mean(student, target).sub_(row[..., None])
        return excess.mul_(student.p).mul_(self.temperature / 2)

    def row_sum(self, student: Distribution, target: Distribution) -> Tensor:
        """Return sum_v p_s log(p_s / m)."""
        return (student.p * _over_mean(student, target)).sum(-1)


def _over_mean(one: Distribution, other: Distribution) -> Tensor:
    """Return log(p / m) of the first, from the difference alone: small where both are equally unlikely."""
    return math.log(2) - functional.softplus(other.log - one.log)
