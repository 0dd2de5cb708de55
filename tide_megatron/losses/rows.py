"""What a loss may know: the hidden `Rows` of one microbatch, and the protocol every loss follows.

A loss owns one formula. It never sees a model, a layout or a head: the head hands it logits of picked rows
(plain form) or row statistics (fused form, later), and multiplies what it returns by `weight / count`,
where the count was summed over all ranks and microbatches before the forward pass (design section 6).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Noised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The hidden rows of one microbatch, in (sample, position) order."""

    gold: Tensor
    """[rows] int64: the student token each row must predict."""
    sample: Tensor
    """[rows] int64: index of the row's sample in the microbatch."""
    time: Tensor
    """[samples] fp32 noise level."""
    maskable: Tensor
    """[samples] int64: how many tokens of each sample may be hidden."""

    @property
    def row_time(self) -> Tensor:
        """[rows] fp32: the noise level of each row's sample."""
        return self.time[self.sample]


@runtime_checkable
class Loss(Protocol):
    """One term of the objective; every implementation is a frozen keyword-only dataclass = its own options.

    An *item* is what the loss averages over: a row, or for the CALM family a chunk.
    """

    weight: float
    """Factor of this term in the objective."""

    @property
    def needs_teacher(self) -> bool:
        """Whether `values` wants teacher logits."""

    def count(self, noised: Noised) -> Tensor:
        """fp64 scalar: this microbatch's contribution to the divisor; summed over the step, then 1/count enters."""

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """[items] fp32: per-item factors that do not depend on logits (timestep weights), without weight and count."""

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """[items] fp32: the formula itself (T^2 included where the paper has it), differentiable in `student`.

        Args:
            student: [rows, student vocabulary] logits, any float dtype; computed on in fp32.
            teacher: [rows, teacher vocabulary] logits without gradient, or None.
            rows: gold ids, samples and times of the same rows.
            clock: where the run stands (TIDAL's lambda).
        """
