"""Cross-entropy on masked tokens, with the weights and divisors of the diffusion bound (spec section 1).

This is the term every run has. Without a teacher it also makes the *hard twin*, the control that gets a
distilled run's extra weight on the same rows but the gold token instead of the teacher's distribution:
`CrossEntropy(timestep_weight="uniform", normalization="hidden", weight=...)`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.options import STRICT
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.schedule import SCHEDULES, ScheduleName
from tide_megatron.losses.base import LikelihoodLoss
from tide_megatron.losses.rows import Rows


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossEntropy(LikelihoodLoss):
    """NLL of the gold token, weighted by noise level."""

    timestep_weight: Literal["scheduler", "uniform"] = "scheduler"
    """`scheduler`: -alpha'/(1 - alpha + 1e-6), the bound's weight; `uniform`: 1."""
    normalization: Literal["token", "sequence", "batch", "hidden"] = "token"
    """Divisor: maskable tokens; each sample's own, then samples; samples; masked tokens."""
    schedule: ScheduleName = "linear"
    """The noise schedule whose weight `scheduler` takes; must be the one that masks."""

    teacher: ClassVar[None] = None

    def check(self, schedule: str, student: int, teacher: int | None) -> None:
        """Refuse the weight of another schedule than the one that masks; see `Loss.check`."""
        if self.schedule != schedule:
            raise ConfigError(
                f"schedule: {self.schedule!r} weighs another schedule than noise.schedule {schedule!r} masks "
                "by; set both alike"
            )

    def count(self, noised: Noised) -> Tensor:
        """Return what `normalization` divides by, summed over this microbatch (spec section 1 item 9)."""
        if self.normalization == "hidden":
            return torch.tensor(len(noised.row_index[0]), dtype=torch.float64)
        if self.normalization == "token":
            return torch.tensor(noised.batch.num_maskable, dtype=torch.float64)
        return torch.tensor(len(noised.time), dtype=torch.float64)

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return the timestep weight of each row, over its sample's maskable tokens for `sequence`."""
        factor = torch.ones_like(self.item_time(rows))
        if self.timestep_weight == "scheduler":
            factor = SCHEDULES[self.schedule].weight(rows.time)[rows.sample]
        if self.normalization == "sequence":
            factor = factor / rows.maskable.clamp_min(1)[rows.sample]
        return factor

    def item_sample(self, rows: Rows) -> Tensor:
        """Return each row's sample."""
        return rows.sample

    def from_likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return -log p(gold) of each row."""
        return -student
