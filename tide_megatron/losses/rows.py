"""What a loss may know: the hidden `Rows` of one microbatch, and the protocol every loss follows.

A loss owns one formula. It never sees a model, a layout or a head, and multiplies nothing by `weight /
count`: the head does, with a count that was summed over all ranks and microbatches before the forward pass
(design section 6). Each loss is of one of two families, which say what ranks that cut a head exchange:

- a `LikelihoodLoss` needs the log-likelihoods of gold tokens, one number a row;
- a `ColumnLoss` is a sum over ids, of which every rank adds up its own.

`values` is the dense form of the same functions: whole logits in, no exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.link import Link, same_rows
from tide_megatron.losses.columns import Columns

STRICT = ConfigDict(extra="forbid")
"""Every loss refuses options it does not have."""

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""Factor of a term in the objective."""
Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""Divisor of logits, or of chunk log-likelihoods in the CALM family."""


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
    links: Mapping[str, Link] = dataclasses.field(default_factory=dict)
    """Teacher name -> how its rows join these; a teacher without an entry answers row by row."""

    def link(self, teacher: str) -> Link:
        """Return how a teacher's rows join these."""
        return self.links.get(teacher) or same_rows(self.gold, self.sample)


def rows_of(noised: Noised) -> Rows:
    """Describe a microbatch's hidden rows to the losses."""
    sample, position = noised.row_index
    return Rows(
        gold=noised.batch.ids[sample, position],
        sample=sample,
        time=noised.time,
        maskable=noised.batch.maskable.sum(dim=1),
        links={name: noised.link(name) for name in noised.batch.sides},
    )


def one_per_row(rows: Rows) -> Tensor:
    """[rows] fp32 coefficients of a loss that weighs every row alike."""
    return torch.ones(rows.sample.shape, dtype=torch.float32, device=rows.sample.device)


def num_hidden(noised: Noised) -> Tensor:
    """Count a microbatch's hidden rows: the divisor of a mean over rows, fp64 scalar on CPU."""
    return torch.tensor(len(noised.row_index[0]), dtype=torch.float64)


@runtime_checkable
class Loss(Protocol):
    """One term of the objective; every implementation is a frozen keyword-only dataclass = its own options.

    An *item* is what the loss averages over: a row, a pair of rows, or for the CALM family a chunk.
    """

    needs_teacher: ClassVar[bool]
    """Whether `values` wants teacher logits."""

    @property
    def teacher(self) -> str | None:
        """Name of the teacher this loss listens to; None without one."""

    @property
    def weight(self) -> float:
        """Factor of this term in the objective."""

    def count(self, noised: Noised) -> Tensor:
        """Return this microbatch's contribution to the divisor (summed over the step), fp64 scalar on CPU.

        It should ask no device: `Batch` and `Noised` have plain numbers.
        """

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return per-item factors that no logit changes (timestep weights), [items] fp32.

        `weight` and the count are not in them.
        """

    def item_sample(self, rows: Rows) -> Tensor:
        """Return each item's sample, an index into `rows.time`, [items] int64."""

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return the formula of each item (with T^2 where the paper has it), [items] fp32.

        Differentiable in `student`.

        Args:
            student: [rows, student vocabulary] logits, any float dtype; computed on in fp32.
            teacher: [teacher rows, teacher vocabulary] logits without gradient, or None; `rows.link` says how
                its rows join the student's.
            rows: gold ids, samples and times of the student's rows.
            clock: where the run stands (TIDAL's lambda).
        """


@runtime_checkable
class LikelihoodLoss(Loss, Protocol):
    """A loss of gold tokens' log-likelihoods, at temperature 1 over each model's whole vocabulary."""

    def from_likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return the formula of each item, [items] fp32.

        Args:
            student: [rows] fp32, with gradient.
            teacher: [teacher rows] fp32 without gradient; None for a loss without a teacher.
            rows: which rows make an item.
            clock: where the run stands.
        """


@runtime_checkable
class ColumnLoss(Loss, Protocol):
    """A loss that compares two distributions over the same ids and is a sum over these ids."""

    def __hash__(self) -> int:
        """Losses are frozen: what is compiled for one is kept for its equals."""

    def softened(self, student: Columns, teacher: Columns, rows: Rows, clock: Clock) -> tuple[Tensor, Tensor]:
        """Return both sides' logits of the compared ids that are here, ([items, columns], same) fp32.

        Over T already; the softmax of each over all ranks' columns is a distribution of `divergence`. Only
        the first may carry gradient.
        """

    needs_gap: ClassVar[bool]
    """Whether `value_and_slope` wants the gap."""

    def divergence(self, student: Tensor, target: Tensor) -> Tensor:
        """Return the formula's sum over THESE columns, [items] fp32, from normalised log-probabilities."""

    def value_and_slope(self, student: Tensor, target: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `divergence` and the formula's derivative by the student's logits (not softened), fp32.

        One pure function of tensors, so that a compiler can fuse it.

        Args:
            student: [items, columns] log-probabilities.
            target: like `student`.
            gap: [items] sum over ALL columns of p_s (log p_s - log target); None unless `needs_gap`.

        Returns:
            [items] of these columns, [items, columns].
        """
