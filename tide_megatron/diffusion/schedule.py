"""Noise schedules: how much of a reply is still visible at time t, and what a masked token weighs.

alpha(t) is the probability that a token is visible at time t: 1 at t=0, 0 at t=1. Everything else
follows from alpha and its derivative: the training weight of the evidence bound and the sampler's chance
that a masked token stays masked (spec section 1 item 7). All arithmetic is in the dtype of `t`, which is
fp32 everywhere in training, because the reference rounds there and ties are decided by it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

WEIGHT_EPSILON = 1e-6
"""Added to 1 - alpha in the weight's divisor (spec section 1 item 7)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """One alpha; the argument must be in [0, 1]."""

    @abc.abstractmethod
    def alpha(self, time: Tensor) -> Tensor:
        """Return the share of tokens still visible at `time`, elementwise."""

    @abc.abstractmethod
    def d_alpha(self, time: Tensor) -> Tensor:
        """Return d alpha / d time, elementwise."""

    def weight(self, time: Tensor) -> Tensor:
        """Return -alpha' / (1 - alpha + 1e-6): the weight of a masked token's NLL in the bound."""
        return -self.d_alpha(time) / (1 - self.alpha(time) + WEIGHT_EPSILON)

    def stay_masked(self, earlier: Tensor, time: Tensor) -> Tensor:
        """Return (1 - alpha(earlier)) / (1 - alpha(time)), with `earlier` < `time`.

        That is the chance that a token masked at `time` is still masked at `earlier`.
        """
        return (1 - self.alpha(earlier)) / (1 - self.alpha(time))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """alpha = 1 - t (the paper's choice): the masking probability is t itself."""

    def alpha(self, time: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - time

    def d_alpha(self, time: Tensor) -> Tensor:
        """Return -1 everywhere."""
        return -torch.ones_like(time)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """alpha = 1 - cos(pi/2 (1 - t)): masks slowly at first."""

    def alpha(self, time: Tensor) -> Tensor:
        """Return 1 - cos(pi/2 (1 - t))."""
        return 1 - torch.cos((math.pi / 2) * (1 - time))

    def d_alpha(self, time: Tensor) -> Tensor:
        """Return -(pi/2) sin(pi/2 (1 - t))."""
        return -(math.pi / 2) * torch.sin((math.pi / 2) * (1 - time))


ScheduleName = Literal["linear", "cosine"]

SCHEDULES: dict[ScheduleName, Schedule] = {"linear": Linear(), "cosine": Cosine()}
"""Schedules by the name a recipe uses."""
