"""TIDAL: the target moves from the student towards the teacher, with the run and with the noise level.

The target r is the softmax of a mixture of both logits, (1 - lambda) z_s + lambda z_t, detached (spec
section 2; lambda: `mixture`). Since r carries no gradient, the value's gradient is T w(t) (p_s - r) and a
fused form needs three row statistics only.

Left out: the reference's entropy weights, which its trainer never passes.
"""

from __future__ import annotations

import math

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.columns import Columns
from tide_megatron.losses.mixture import Mixture
from tide_megatron.losses.rows import STRICT, Rows
from tide_megatron.losses.shared_vocabulary import SharedVocabulary

SMALLEST_TARGET = 1e-8
"""Targets below this count as this much inside the logarithm."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tidal(Mixture, SharedVocabulary):
    """Divergence from a target between student and teacher."""

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return the timestep weight of each pair."""
        return self.weight_at(self.pair_time(rows))

    def softened(self, student: Columns, teacher: Columns, rows: Rows, clock: Clock) -> tuple[Tensor, Tensor]:
        """Return the student's logits over T and the mixture's, ([pairs, columns], [pairs, columns]) fp32."""
        softened_student, softened_teacher = super().softened(student, teacher, rows, clock)
        with torch.no_grad():
            share = self.teacher_share(self.pair_time(rows), clock)[:, None]  # [pairs, 1]
            mixed = (1 - share) * softened_student + share * softened_teacher  # [pairs, columns]
        return softened_student, mixed

    def divergence(self, student: Tensor, target: Tensor) -> Tensor:
        """Return T^2 sum_v r (log max(r, 1e-8) - log p_s) of each pair, r = exp(target)."""
        clamped = target.clamp_min(math.log(SMALLEST_TARGET))
        return self.temperature**2 * (target.exp() * (clamped - student)).sum(-1)

    def value_and_slope(self, student: Tensor, target: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `divergence` and T (p_s - r); the timestep weight is in the coefficients."""
        likely, clamped = target.exp(), target.clamp_min(math.log(SMALLEST_TARGET))
        value = self.temperature**2 * clamped.sub_(student).mul_(likely).sum(-1)
        return value, student.exp().sub_(likely).mul_(self.temperature)
