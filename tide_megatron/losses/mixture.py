"""How far a moving target has gone from the student to the teacher: TIDAL's lambda and its timestep weight.

Early in the run and at high noise lambda is small, so the student is asked for little; late and at low noise
it is asked for what the teacher knows (spec section 2; what the reference calls "decay" of lambda is this
growth). TIDAL mixes logits with it, CALM+TIDAL mixes chunk likelihoods.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.rows import STRICT

Share = Annotated[float, Field(ge=0.0, le=1.0)]

MIDRANGE_CENTRE, MIDRANGE_WIDTH = 0.5, 0.15


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mixture:
    """Options of a target between student and teacher."""

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

    def weight_at(self, time: Tensor) -> Tensor:
        """Return the timestep weight of each noise level, [same shape] fp32."""
        if self.timestep_weight == "uniform":
            return torch.ones_like(time)
        return torch.exp(-((time - MIDRANGE_CENTRE) ** 2) / (2 * MIDRANGE_WIDTH**2))
