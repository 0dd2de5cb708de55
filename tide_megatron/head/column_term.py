"""A term over columns on one slab: its softmaxes while they grow, its values and derivatives tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.head.softmax import LogSumExp, OnlineSoftmax
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import Columns, Distribution, Rows

Logits = Mapping[str | None, Columns]
"""A tile's logits by model; None is the student."""


class ColumnTerm:
    """A term over columns on one slab: its softmaxes while they grow, and what the exchange made of them."""

    def __init__(self, loss: ColumnLoss, rows: Rows, clock: Clock, count: float) -> None:
        """Start with no column seen.

        Args:
            loss: the term.
            rows: of the slab.
            clock: where the run stands.
            count: the term's divisor.
        """
        self.loss, self.rows, self.clock = loss, rows, clock
        self.coefficients = loss.coefficients(rows, clock)  # [pairs]
        self.factors = self.coefficients * (loss.weight / count)
        self.values = torch.zeros_like(self.coefficients, dtype=torch.float64)
        pairs, device = len(self.coefficients), rows.gold.device
        self.student = OnlineSoftmax(pairs, device, has_difference=loss.row_statistic == "kl")
        self.target = OnlineSoftmax(pairs, device)
        self.merged: tuple[LogSumExp, LogSumExp]
        self.row = torch.zeros(pairs, device=device) if loss.row_statistic == "sum" else None
        """[pairs] the row statistic that the loss asks for."""

    def softened(self, made: Logits) -> tuple[Tensor, Tensor]:
        """Return both sides' logits over T in a tile."""
        return self.loss.softened(made[None], made[self.loss.teacher], self.rows, self.clock)

    def add(self, made: Logits) -> None:
        """Take in a tile's statistics."""
        ours, target = self.softened(made)
        self.student.add(ours, target)
        self.target.add(target)

    def know(self, student: LogSumExp, target: LogSumExp, difference: Tensor | None) -> None:
        """Take in what the exchange told; a mean difference of logits becomes KL(student || target)."""
        self.merged = (student, target)
        if difference is not None:
            self.row = difference - (student.maximum - target.maximum) - (student.log_sum - target.log_sum)

    def add_row_sum(self, made: Logits) -> None:
        """Add a tile's share to the sum that comes with the second exchange."""
        student, target = self._distributions(self.softened(made))
        assert self.row is not None, "only a term that asks for a sum has one"
        self.row += self.loss.row_sum(student, target)

    def evaluate(self, made: Logits) -> Tensor | None:
        """Add a tile's values; return the objective's derivative by its logits, [pairs, compared columns]."""
        softened = self.softened(made)
        if not softened[0].shape[1]:
            return None
        student, target = self._distributions(softened)
        self.values += self.loss.value(student, target)
        return self.loss.slope(student, target, self.row).mul_(self.factors[:, None])

    def _distributions(self, softened: tuple[Tensor, Tensor]) -> tuple[Distribution, Distribution]:
        """Normalise both sides' logits over T by all ranks' columns."""
        (ours, theirs), (student, target) = softened, self.merged
        return Distribution(student.log_probabilities(ours)), Distribution(target.log_probabilities(theirs))
