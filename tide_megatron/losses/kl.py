"""KL divergence to the teacher in both directions, per pair of rows (spec section 2).

The factor T^2 keeps the gradient's size independent of the temperature: d/dz of the value is T (p_s -
p_t) for `Kl`. All of it is fp32, also for a bf16 teacher (the reference rounded that one's log-softmax
to bf16).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.losses.rows import STRICT
from tide_megatron.losses.shared_vocabulary import SharedVocabulary


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Kl(SharedVocabulary):
    """Forward KL(teacher || student): the student must cover whatever the teacher finds likely."""

    def divergence(self, student: Tensor, target: Tensor) -> Tensor:
        """Return T^2 sum_v p_t (log p_t - log p_s) of each pair."""
        return self.temperature**2 * (target.exp() * (target - student)).sum(-1)

    def value_and_slope(self, student: Tensor, target: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `divergence` and T (p_s - p_t)."""
        likely = target.exp()
        value = self.temperature**2 * (target - student).mul_(likely).sum(-1)
        return value, student.exp().sub_(likely).mul_(self.temperature)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseKl(SharedVocabulary):
    """Reverse KL(student || teacher): the student must not say what the teacher finds unlikely."""

    needs_gap: ClassVar[bool] = True

    def divergence(self, student: Tensor, target: Tensor) -> Tensor:
        """Return T^2 sum_v p_s (log p_s - log p_t) of each pair; both p_s carry gradient."""
        return self.temperature**2 * (student.exp() * (student - target)).sum(-1)

    def value_and_slope(self, student: Tensor, target: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `divergence` and T p_s (log p_s - log p_t - gap); gap: the row's divergence over T^2."""
        assert gap is not None, "reverse KL's slope needs the whole row's divergence"
        likely, difference = student.exp(), student - target
        value = self.temperature**2 * (likely * difference).sum(-1)
        return value, difference.sub_(gap[:, None]).mul_(likely).mul_(self.temperature)
