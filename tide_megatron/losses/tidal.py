"""TIDAL: the target moves from the student towards the teacher, with the run and with the noise level.

The target r is the softmax of a mixture of both logits, (1 - lambda) z_s + lambda z_t, detached. Early
in the run and at high noise lambda is small, so the student is asked for little; late and at low noise
it is asked for what the teacher knows (spec section 2; what the reference calls "decay" of lambda
is this growth). Since r carries no gradient, the value's gradient is T w(t) (p_s - r) and a fused form
needs three row statistics only.

Left out: the reference's entropy weights, which its trainer never passes.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.rows import STRICT, Rows, one_per_row
from tide_megatron.losses.shared_vocabulary import SharedVocabulary

Share = Annotated[float, Field(ge=0.0, le=1.0)]

SMALLEST_TARGET = 1e-8
"""Targets below this count as this much inside the logarithm."""
MIDRANGE_CENTRE, MIDRANGE_WIDTH = 0.5, 0.15


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tidal(SharedVocabulary):
    """Divergence from a target between student and teacher."""

    axes: Literal["both", "training_only", "timestep_only"] = "both"
    """What lambda follows: lambda_train (1 - t), lambda_train, or maximum (1 - t)."""
    growth: Literal["cosine", "linear"] = "cosine"
    """How lambda_train grows from `initial` to `maximum` over the run."""
    initial: Share = 0.1
    maximum: Share = 0.9
    timestep_weight: Literal["uniform", "midrange"] = "uniform"
    """`uniform`: 1; `midrange`: exp(-(t - 0.5)^2 / (2 * 0.15^2))."""

    def teacher_share(self, time: Tensor, clock: Clock) -> Tensor:
        """Return lambda for each noise level, [same shape] fp32."""
        grown = clock.progress
        if self.growth == "cosine":
            grown = (1 - math.cos(math.pi * grown)) / 2
        trained = self.initial + (self.maximum - self.initial) * grown
        if self.axes == "training_only":
            return torch.full_like(time, trained)
        return (trained if self.axes == "both" else self.maximum) * (1 - time)

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return the timestep weight of each row."""
        if self.timestep_weight == "uniform":
            return one_per_row(rows)
        return torch.exp(-((rows.row_time - MIDRANGE_CENTRE) ** 2) / (2 * MIDRANGE_WIDTH**2))

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return T^2 sum_v r (log max(r, 1e-8) - log p_s) of each row, r = softmax of the mixed logits."""
        softened_student, softened_teacher = self.softened(student, teacher)
        with torch.no_grad():
            share = self.teacher_share(rows.row_time, clock)[:, None]  # [rows, 1]
            mixed = (1 - share) * softened_student + share * softened_teacher  # [rows, columns]
            target = mixed.softmax(-1)
            log_target = target.clamp_min(SMALLEST_TARGET).log()
        log_student = softened_student.log_softmax(-1)
        return self.temperature**2 * (target * (log_target - log_student)).sum(-1)
