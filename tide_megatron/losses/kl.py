"""KL divergence to the teacher in both directions, per pair of rows (spec section 2).

The factor T^2 keeps the gradient's size independent of the temperature: d/dz of the value is T (p_s -
p_t) for `Kl`. All of it is fp32, also for a bf16 teacher (the reference rounded that one's log-softmax
to bf16).
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.rows import STRICT, Rows
from tide_megatron.losses.shared_vocabulary import SharedVocabulary


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Kl(SharedVocabulary):
    """Forward KL(teacher || student): the student must cover whatever the teacher finds likely."""

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return T^2 sum_v p_t (log p_t - log p_s) of each pair."""
        softened_student, softened_teacher = self.softened(student, teacher, rows)
        log_student = softened_student.log_softmax(-1)  # [pairs, columns]
        log_teacher = softened_teacher.log_softmax(-1)
        return self.temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseKl(SharedVocabulary):
    """Reverse KL(student || teacher): the student must not say what the teacher finds unlikely."""

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return T^2 sum_v p_s (log p_s - log p_t) of each pair; both p_s carry gradient."""
        softened_student, softened_teacher = self.softened(student, teacher, rows)
        log_student = softened_student.log_softmax(-1)  # [pairs, columns]
        log_teacher = softened_teacher.log_softmax(-1)
        return self.temperature**2 * (log_student.exp() * (log_student - log_teacher)).sum(-1)
