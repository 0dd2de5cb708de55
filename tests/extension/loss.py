"""Squared difference of two distributions, per pair of rows: bounded, and deaf to what both find unlikely.

d/dz_v of the value is 2 T p_s (d_v - sum_u p_s d_u) with d = p_s - p_t: a sum over the whole row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.options import STRICT
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import Distribution


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Squared(ColumnLoss):
    """Sum of (p_s - p_t)^2."""

    row_statistic: ClassVar[Literal["sum"]] = "sum"

    def value(self, student: Distribution, target: Distribution) -> Tensor:
        """Return T^2 sum_v (p_s - p_t)^2 of each pair."""
        return self.temperature**2 * (student.p - target.p).square().sum(-1)

    def slope(self, student: Distribution, target: Distribution, row: Tensor | None) -> Tensor:
        """Return 2 T p_s (d - sum of p_s d)."""
        assert row is not None, "the slope needs the whole row's sum"
        return 2 * self.temperature * student.p * (student.p - target.p - row[:, None])

    def row_sum(self, student: Distribution, target: Distribution) -> Tensor:
        """Return sum_v p_s d."""
        return (student.p * (student.p - target.p)).sum(-1)
