"""TIDAL: the target moves from the student towards the teacher, with the run and with the noise level.

Early in the run and at high noise lambda is small, so the student is asked for little; late and at low noise
it is asked for what the teacher knows (spec section 2; what the reference calls "decay" of lambda is this
growth). `Mixture` is that lambda: TIDAL mixes logits with it, CALM+TIDAL mixes chunk likelihoods (`calm`).

TIDAL's target r is the softmax of (1 - lambda) z_s + lambda z_t, detached. Since r carries no gradient, the
value's gradient is T w(t) (p_s - r) and needs no statistic but the softmaxes.

Left out: the reference's entropy weights, which its trainer never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.options import STRICT, Paper
from tide_megatron.losses.base import ColumnLoss, Loss
from tide_megatron.losses.rows import Distribution, Rows

Share = Annotated[float, Field(ge=0.0, le=1.0)]

MIDRANGE_CENTRE, MIDRANGE_WIDTH = 0.5, 0.15
SMALLEST_TARGET = 1e-8
"""Targets below this count as this much inside the logarithm."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mixture(Loss):
    """Options of a target between student and teacher."""

    axes: Annotated[Literal["both", "training_only", "timestep_only"], Paper("both")] = "both"
    """What lambda follows: lambda_train (1 - t), lambda_train, or maximum (1 - t)."""
    growth: Annotated[Literal["cosine", "linear"], Paper("cosine")] = "cosine"
    """How lambda_train grows from `initial` to `maximum` over the run."""
    initial: Annotated[Share, Paper("0.1")] = 0.1
    """lambda_train before the first update."""
    maximum: Annotated[Share, Paper("0.9")] = 0.9
    """lambda_train at the end of the run."""
    timestep_weight: Annotated[Literal["uniform", "midrange"], Paper("midrange")] = "uniform"
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
        """Return the timestep weight of each item."""
        time = self.item_time(rows)
        if self.timestep_weight == "uniform":
            return torch.ones_like(time)
        return torch.exp(-((time - MIDRANGE_CENTRE) ** 2) / (2 * MIDRANGE_WIDTH**2))

    def metrics(self, clock: Clock) -> Mapping[str, float]:
        """Return lambda at noise level t -> 0, the largest of this moment of the run.

        Where lambda follows the noise level too, a sample at level t has (1 - t) times as much.
        """
        return {"lambda": float(self.teacher_share(torch.zeros(1), clock))}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tidal(Mixture, ColumnLoss):
    """Divergence from a target between student and teacher."""

    def target_share(self, rows: Rows, clock: Clock) -> Tensor:
        """Return lambda of each pair."""
        return self.teacher_share(self.item_time(rows), clock)

    def soften(self, ours: Tensor, theirs: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the student's logits over T and the mixture's, which carries no gradient."""
        assert share is not None, "TIDAL's target is a mixture by lambda"
        softened, theirs = super().soften(ours, theirs, None)
        with torch.no_grad():
            mixed = (1 - share) * softened + share * theirs
        return softened, mixed

    def value(self, student: Distribution, target: Distribution) -> Tensor:
        """Return T^2 sum_v r (log max(r, 1e-8) - log p_s) of each pair."""
        clamped = target.log.clamp_min(math.log(SMALLEST_TARGET))
        return self.temperature**2 * clamped.sub_(student.log).mul_(target.p).sum(-1)

    def slope(self, student: Distribution, target: Distribution, row: Tensor | None) -> Tensor:
        """Return T (p_s - r); the timestep weight is in the coefficients."""
        return student.p.sub_(target.p).mul_(self.temperature)
