"""What KL, reverse KL and TIDAL have in common: two softened distributions over the same columns.

All three compare student and teacher at *pairs* of rows that predict the same id: every row where both read
the same tokens, the aligned positions where one vocabulary is used under two chat templates (spec section
4.2). Ids 0..SV-1 must mean the same bytes in both vocabularies (checked where the tokenizers are known).
`shared_vocab_size` cuts both logits BEFORE the softmax: the distributions are renormalised on the slice
(spec section 2). Vocabularies of different size need it; where no common range exists, the CALM family is
the way.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.batch import Noised
from tide_megatron.losses.columns import Columns, whole
from tide_megatron.losses.rows import STRICT, Rows, Temperature, Weight


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SharedVocabulary(abc.ABC):
    """Options and divisor of a loss that compares two distributions over the same ids."""

    teacher: str
    """Name of the teacher to listen to."""
    weight: Weight = 1.0
    temperature: Temperature = 2.0
    shared_vocab_size: int | None = Field(default=None, ge=1)
    """How many first ids are compared; None: all of them, which needs vocabularies of one size."""

    needs_teacher: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    """Whether `value_and_slope` must know sum_v p_s (log p_s - log target) of each pair."""

    def columns(self, student: int, teacher: int) -> int:
        """Return how many columns are compared, given both vocabulary sizes.

        Raises:
            ConfigError: the sizes differ and nothing was said, or `shared_vocab_size` exceeds one of them.
        """
        if self.shared_vocab_size is None and student != teacher:
            raise ConfigError(
                f"shared_vocab_size: student and teacher {self.teacher!r} have {student} and {teacher} ids; "
                "set it to the number of first ids that are the same bytes in both "
                f"(at most {min(student, teacher)}), or use calm or reverse_calm"
            )
        columns = student if self.shared_vocab_size is None else self.shared_vocab_size
        if columns > min(student, teacher):
            raise ConfigError(
                f"shared_vocab_size: {columns} exceeds a vocabulary (student {student}, "
                f"teacher {self.teacher!r} {teacher} ids); use at most {min(student, teacher)}"
            )
        return columns

    def softened(self, student: Columns, teacher: Columns, rows: Rows, clock: Clock) -> tuple[Tensor, Tensor]:
        """Return both logits over T on the compared columns, ([pairs, columns], [pairs, columns]) fp32."""
        compared = self.columns(student.vocabulary, teacher.vocabulary)
        ours, theirs = student.below(compared), teacher.below(compared)
        ids = [
            (part.start, part.start + logits.shape[1])
            for part, logits in ((student, ours), (teacher, theirs))
        ]
        assert ids[0] == ids[1] or not (ours.shape[1] or theirs.shape[1]), (
            f"teacher {self.teacher!r}: heads are cut at different ids, {ids[0]} and {ids[1]}"
        )
        pairs = rows.link(self.teacher).pairs
        if pairs is not None:
            ours, theirs = ours[pairs[0]], theirs[pairs[1]]
        return ours.float() / self.temperature, theirs.float() / self.temperature

    @abc.abstractmethod
    def divergence(self, student: Tensor, target: Tensor) -> Tensor:
        """Return the sum over these columns of the formula, from log-probabilities, [pairs] fp32."""

    @abc.abstractmethod
    def value_and_slope(self, student: Tensor, target: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `divergence` [pairs] and the whole formula's derivative by these logits [pairs, columns]."""

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return `divergence` of whole logits."""
        assert teacher is not None, f"no answer of teacher {self.teacher!r} reached its loss"
        ours, theirs = self.softened(whole(student), whole(teacher), rows, clock)
        return self.divergence(ours.log_softmax(-1), theirs.log_softmax(-1))

    def item_sample(self, rows: Rows) -> Tensor:
        """Return each pair's sample."""
        return rows.link(self.teacher).pair_sample

    def pair_time(self, rows: Rows) -> Tensor:
        """Return the noise level of each pair's sample, [pairs] fp32."""
        return rows.time[self.item_sample(rows)]

    def count(self, noised: Noised) -> Tensor:
        """Return the number of pairs of this microbatch."""
        return torch.tensor(noised.link(self.teacher).num_pairs, dtype=torch.float64)

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return 1 for every pair."""
        return torch.ones_like(self.pair_time(rows))
