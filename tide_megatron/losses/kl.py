"""KL divergence to the teacher in both directions, per pair of rows (spec section 2).

The factor T^2 keeps the gradient's size independent of the temperature: d/dz of the value is T (p_s -
p_t) for `Kl`. All of it is fp32, also for a bf16 teacher (the reference rounded that one's log-softmax
to bf16).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.options import STRICT
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import Distribution


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Kl(ColumnLoss):
    """Forward KL(teacher || student): the student must cover whatever the teacher finds likely."""

    def value(self, student: Distribution, target: Distribution) -> Tensor:
        """Return T^2 sum_v p_t (log p_t - log p_s) of each pair."""
        return self.temperature**2 * (target.log - student.log).mul_(target.p).sum(-1)

    def slope(self, student: Distribution, target: Distribution, row: Tensor | None) -> Tensor:
        """Return T (p_s - p_t)."""
        return student.p.sub_(target.p).mul_(self.temperature)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseKl(ColumnLoss):
    """Reverse KL(student || teacher): the student must not say what the teacher finds unlikely."""

    row_statistic: ClassVar[Literal["kl"]] = "kl"

    def value(self, student: Distribution, target: Distribution) -> Tensor:
        """Return T^2 sum_v p_s (log p_s - log p_t) of each pair; both p_s carry gradient."""
        return self.temperature**2 * (student.p * (student.log - target.log)).sum(-1)

    def slope(self, student: Distribution, target: Distribution, row: Tensor | None) -> Tensor:
        """Return T p_s (log p_s - log p_t - KL of the row)."""
        assert row is not None, "reverse KL's slope needs the whole row's divergence"
        return (student.log - target.log).sub_(row[..., None]).mul_(student.p).mul_(self.temperature)
