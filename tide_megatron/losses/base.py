"""What a loss is: one formula on masked rows, in one of two families that say what ranks exchange.

A loss never sees a model, a layout or a head, and multiplies nothing by `weight / count`: the head does, with
a count that was summed over all ranks and microbatches before the forward pass (design section 6). An *item*
is what it averages over: a row, a pair of rows, or for the CALM family a chunk.

- A `LikelihoodLoss` reads the log-likelihoods of gold tokens, one number a row.
- A `ColumnLoss` compares two distributions and is a sum over ids, of which every rank adds up its own. It
  declares which number of the whole row its derivative needs (`row_statistic`), if any.

A new loss is one file here and one line of `LOSSES`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.options import STRICT, Paper
from tide_megatron.diffusion.batch import Noised
from tide_megatron.losses.rows import Columns, Distribution, Rows

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""Factor of a term in the objective."""
Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""Divisor of logits, or of chunk log-likelihoods in the CALM family."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Loss(abc.ABC):
    """One term of the objective; a loss is its own options, frozen and validated."""

    weight: Weight = 1.0
    """Factor of this term in the objective."""

    if TYPE_CHECKING:  # a field of every loss with a teacher, None of the others

        @property
        def teacher(self) -> str | None:
            """Name of the teacher this loss listens to."""

    @abc.abstractmethod
    def count(self, noised: Noised) -> Tensor:
        """Return this microbatch's contribution to the divisor (summed over the step), fp64 scalar on CPU.

        It should ask no device: `Batch` and `Noised` have plain numbers.
        """

    @abc.abstractmethod
    def item_sample(self, rows: Rows) -> Tensor:
        """Return each item's sample, an index into `rows.time`, [items] int64."""

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return per-item factors that no logit changes (timestep weights), [items] fp32.

        `weight` and the count are not in them.
        """
        return torch.ones_like(self.item_time(rows))

    def item_time(self, rows: Rows) -> Tensor:
        """Return the noise level of each item's sample, [items] fp32."""
        return rows.time[self.item_sample(rows)]

    def check(self, schedule: str, student: int, teacher: int | None) -> None:  # noqa: B027 - most fit all
        """Refuse a run that this loss does not fit.

        Args:
            schedule: name of the noise schedule that masks.
            student: ids of the student's vocabulary.
            teacher: ids of its teacher's, where it has one.

        Raises:
            ConfigError: beginning with the option's name.
        """

    def metrics(self, clock: Clock) -> Mapping[str, float]:
        """Return what a run should log of this loss beside its value, by kind of metric."""
        return {}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LikelihoodLoss(Loss):
    """A loss of gold tokens' log-likelihoods, at temperature 1 over each model's whole vocabulary."""

    @abc.abstractmethod
    def from_likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return the formula of each item, [items] fp32; autograd differentiates it.

        Args:
            student: [rows] fp32, with gradient.
            teacher: [teacher rows] fp32 without gradient; None for a loss without a teacher.
            rows: which rows make an item.
            clock: where the run stands.
        """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ColumnLoss(Loss):
    """A loss that compares two softened distributions over the same ids and is a sum over these ids.

    An item is a *pair* of rows that predict the same id: every row where both models read the same tokens,
    the aligned positions where one vocabulary is used under two chat templates (spec section 4.2). Ids
    0..SV-1 must mean the same bytes in both vocabularies (checked where the tokenizers are known).
    `shared_vocab_size` cuts both logits BEFORE the softmax: the distributions are renormalised on the slice
    (spec section 2). Vocabularies of different size need it; where no common range exists, the CALM family is
    the way.
    """

    teacher: str
    """Name of the teacher to listen to."""
    temperature: Annotated[Temperature, Paper("2.0")] = 2.0
    """Divisor of both models' logits before the softmax; the value is multiplied by its square."""
    shared_vocab_size: int | None = Field(default=None, ge=1)
    """How many first ids are compared; None: all of them, which needs vocabularies of one size."""

    row_statistic: ClassVar[Literal["kl", "sum"] | None] = None
    """What `slope` must know of the whole row beside these columns. `kl`: KL(student || target), which comes
    with the softmaxes in the one exchange. `sum`: `row_sum` of all columns, which asks for a second exchange
    and one more reading of the logits. None: nothing."""

    @abc.abstractmethod
    def value(self, student: Distribution, target: Distribution) -> Tensor:
        """Return the formula's sum over THESE columns, [...] fp32; autograd can differentiate it.

        An id that both find impossible (p of 0, logarithms equal and finite) adds nothing.

        Args:
            student: [..., columns], of items or of items cut into blocks of columns.
            target: like `student`.
        """

    @abc.abstractmethod
    def slope(self, student: Distribution, target: Distribution, row: Tensor | None) -> Tensor:
        """Return the derivative of the whole row's value by the student's logits of these columns, fp32.

        By the logits before they were divided by T, hence one factor T less than `value` has. It is the last
        to read the distributions and may overwrite their `p`. Like `value` a pure function of tensors and of
        the loss's options, so that a compiler can fuse both, and 0 for an id that both find impossible.

        Args:
            student: [..., columns].
            target: like `student`; it counts as a constant.
            row: [...] what `row_statistic` names.

        Returns:
            [..., columns].
        """

    def row_sum(self, student: Distribution, target: Distribution) -> Tensor:
        """Return what `row_statistic = "sum"` adds up, over these columns, [...] fp32; see `value`."""
        raise NotImplementedError(f"{type(self).__name__} asks for a row's sum but does not say of what")

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

    def check(self, schedule: str, student: int, teacher: int | None) -> None:
        """Refuse vocabularies that cannot be compared; see `Loss.check`."""
        assert teacher is not None, f"{self.teacher!r} has a vocabulary"
        self.columns(student, teacher)

    def softened(self, student: Columns, teacher: Columns, rows: Rows, clock: Clock) -> tuple[Tensor, Tensor]:
        """Return the logits of both distributions, over T, on the compared ids that are here.

        The softmax of each over all ranks' columns is a distribution of `value`. Only the first carries
        gradient.

        Returns:
            ([items, columns], [items, columns]) fp32.
        """
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
        share = self.target_share(rows, clock)
        return self.soften(ours, theirs, None if share is None else share[:, None])

    def target_share(self, rows: Rows, clock: Clock) -> Tensor | None:
        """Return what `soften` must know of each item beside the logits, [items] fp32; None: nothing."""
        return None

    def soften(self, ours: Tensor, theirs: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the logits of both distributions, over T, on compared ids; a pure function, like `slope`.

        Args:
            ours: [..., columns] the student's logits, any float dtype.
            theirs: the teacher's of the same ids.
            share: [..., 1] the items' `target_share`.

        Returns:
            ([..., columns], [..., columns]) fp32.
        """
        return ours.float() / self.temperature, theirs.float() / self.temperature

    def item_sample(self, rows: Rows) -> Tensor:
        """Return each pair's sample."""
        return rows.link(self.teacher).pair_sample

    def count(self, noised: Noised) -> Tensor:
        """Return the number of pairs of this microbatch."""
        return torch.tensor(noised.link(self.teacher).num_pairs, dtype=torch.float64)


def teachers_of(losses: Mapping[str, Loss]) -> list[str]:
    """Return the teachers that some of these losses listen to, sorted by name."""
    return sorted({loss.teacher for loss in losses.values() if loss.teacher is not None})
