"""The head loss in plain autograd: from hidden rows of both sides to one scalar.

Logits exist for picked rows only, once per model however many losses read them, and in fp32.
Coefficients go in and sums come out: weight and 1/count multiply every row before the sum, so nothing
divides afterwards and the gradients of all ranks and microbatches simply add up (design sections 3 and
6). This form is the oracle of the vocabulary-parallel and fused ones to come; it keeps [rows,
vocabulary] of each model in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.rows import Loss, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadInput:
    """One model's final hidden rows with its output weight."""

    hidden: Tensor
    """[rows, hidden size], final norm applied."""
    weight: Tensor
    """[vocabulary, hidden size]."""

    @property
    def logits(self) -> Tensor:
        """[rows, vocabulary] fp32; the product runs in the weight's dtype."""
        return torch.nn.functional.linear(self.hidden.to(self.weight.dtype), self.weight).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """What one microbatch contributes to a step."""

    objective: Tensor
    """fp32 scalar with graph: sum over terms of weight / count * sum over items; ranks just add."""
    sums: dict[str, Tensor]
    """Detached fp64 scalars by term: this microbatch's share of the term's mean, before its weight."""


def head_loss(
    student: HeadInput,
    answers: Mapping[str, HeadInput],
    losses: Mapping[str, Loss],
    rows: Rows,
    counts: Mapping[str, Tensor],
    clock: Clock,
) -> HeadLoss:
    """Evaluate every term on one microbatch's hidden rows. No collective: any rank may call it alone.

    Args:
        student: hidden rows and head with gradient.
        answers: hidden rows and head of each teacher, for the same rows; no gradient reaches them.
        losses: the terms by name.
        rows: what the losses may know of the rows; there may be none, then the objective is 0 with a graph.
        counts: each term's divisor, summed over all ranks and microbatches of the step. A term whose count is
            0 is absent from the result, never NaN.
        clock: where the run stands.
    """
    logits = student.logits  # [rows, vocabulary]
    with torch.no_grad():
        names = {loss.teacher for loss in losses.values() if loss.teacher is not None}
        heard = {name: answers[name].logits for name in sorted(names)}
    objective = logits[:0].sum()  # 0, and every rank's backward reaches its body and head
    sums: dict[str, Tensor] = {}
    for name, loss in losses.items():
        count = float(counts[name])
        if count == 0:
            continue
        theirs = None if loss.teacher is None else heard[loss.teacher]
        values = loss.values(logits, theirs, rows, clock)  # [items]
        coefficients = loss.coefficients(rows, clock)
        objective = objective + (coefficients * (loss.weight / count) * values).sum()
        sums[name] = (coefficients.double() * values.detach().double()).sum() / count
    return HeadLoss(objective=objective, sums=sums)
