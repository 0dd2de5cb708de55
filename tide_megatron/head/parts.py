"""What goes into a head loss and what comes out of it, in whichever form it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.head.statistics import check_golds
from tide_megatron.losses.columns import Columns
from tide_megatron.losses.rows import Loss, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadInput:
    """One model's final hidden rows with its output weight, or the rows of the weight that this rank owns."""

    hidden: Tensor
    """[rows, hidden size], final norm applied; in the weight's dtype or in fp32, which holds the same numbers
    where rows were gathered (`parallel.exchange.gather_rows`)."""
    weight: Tensor
    """[own ids, hidden size]: of the ids from `start` on."""
    start: int = 0
    vocabulary: int | None = None
    """How many ids the whole head has; None: `weight` is the whole head."""
    gradient: Tensor | None = None
    """[own ids, hidden size] fp32 into which the fused head loss adds the weight's gradient; None: it writes
    nothing. The plain form leaves gradients to autograd."""
    is_exact: bool = False
    """Multiply in fp32 whatever the weight's dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the products run; what comes out of them is worked on in fp32 always."""
        return torch.float32 if self.is_exact else self.weight.dtype

    @property
    def logits(self) -> Tensor:
        """[rows, own ids] fp32."""
        return torch.nn.functional.linear(self.hidden.to(self.dtype), self.weight.to(self.dtype)).float()

    @property
    def num_ids(self) -> int:
        """How many ids the whole head has."""
        vocabulary = len(self.weight) if self.vocabulary is None else self.vocabulary
        assert 0 <= self.start <= vocabulary - len(self.weight), (
            f"ids {self.start} to {self.start + len(self.weight)} are not in a head of {vocabulary}"
        )
        return vocabulary

    @property
    def columns(self) -> Columns:
        """The logits with their ids."""
        return Columns(logits=self.logits, start=self.start, vocabulary=self.num_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """What one microbatch contributes to a step."""

    objective: Tensor
    """fp32 scalar with graph: sum over terms of weight / count * sum over items; ranks just add."""
    sums: dict[str, Tensor]
    """Detached fp64 scalars by term: this rank's share of the term's mean, before its weight."""


def exactly(student: HeadInput, answers: Mapping[str, HeadInput]) -> tuple[HeadInput, dict[str, HeadInput]]:
    """Return the same heads, multiplied in fp32."""
    exact = {name: dataclasses.replace(answer, is_exact=True) for name, answer in answers.items()}
    return dataclasses.replace(student, is_exact=True), exact


def check_rows(
    student: HeadInput, answers: Mapping[str, HeadInput], losses: Mapping[str, Loss], rows: Rows
) -> None:
    """Refuse rows that do not belong together; every rank of a head group has all of them and sees it alike.

    Raises:
        TideError: naming the model, with both numbers of rows.
    """
    told = [("the student", student, rows.gold)]
    for name in sorted({loss.teacher for loss in losses.values() if loss.teacher is not None}):
        if name not in answers:
            raise TideError(
                f"teachers.{name}: a loss listens to it, but it gave no answer to this microbatch"
            )
        told.append((f"teachers.{name}", answers[name], rows.link(name).gold))
    for name, head, gold in told:
        if len(head.hidden) != len(gold):
            raise TideError(
                f"{name}: {len(head.hidden)} hidden rows where the microbatch's rows are {len(gold)}; make "
                "views and rows from the same noised batches"
            )
        check_golds(gold, head.num_ids, f"{name}: ")


class HeadLossForm(Protocol):
    """A way to compute the head loss: `plain.head_loss`, or `fused.fused_head_loss` with its budget given."""

    def __call__(  # noqa: PLR0913 - see plain.head_loss
        self,
        student: HeadInput,
        answers: Mapping[str, HeadInput],
        losses: Mapping[str, Loss],
        rows: Rows,
        counts: Mapping[str, Tensor],
        clock: Clock,
        *,
        group: ProcessGroup | None = None,
        own: tuple[int, int] | None = None,
    ) -> HeadLoss:
        """Evaluate every term on one microbatch of a head group; see `plain.head_loss`."""
