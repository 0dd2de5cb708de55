"""What goes into a head loss and what comes out of it, in whichever form it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.softmax import check_golds
from tide_megatron.losses.base import ColumnLoss, LikelihoodLoss, Loss, teachers_of
from tide_megatron.losses.rows import Columns


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
    rows_only: bool = False
    """Give the hidden rows their gradient and leave the weight's out; in the fused form, for `gradient`."""

    @property
    def releases(self) -> bool:
        """Whether the fused head loss makes gradients, and not values alone."""
        return self.gradient is not None or self.rows_only

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
class HeadResult:
    """What one microbatch contributes to a step."""

    objective: Tensor
    """fp32 scalar with graph: sum over terms of weight / count * sum over items; ranks just add."""
    sums: dict[str, Tensor]
    """Detached fp64 scalars by term: this rank's share of the term's mean, before its weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One microbatch of a whole vocabulary group, before the heads."""

    student: HeadInput
    """All the group's rows with this rank's columns of the head, with gradient."""
    teachers: Mapping[str, HeadInput]
    """The same of each teacher; no gradient reaches them."""
    rows: GatheredRows
    losses: Mapping[str, Loss]
    """The terms that have something to compare in this step, by name."""
    clock: Clock
    """Where the run stands."""
    group: ProcessGroup | None

    @property
    def by_likelihood(self) -> dict[str, LikelihoodLoss]:
        """The terms over likelihoods."""
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, LikelihoodLoss)}

    @property
    def by_columns(self) -> dict[str, ColumnLoss]:
        """The terms over columns."""
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, ColumnLoss)}

    def check(self) -> None:
        """Refuse rows that do not belong together; every rank of the group has all of them and sees it alike.

        Raises:
            TideError: naming the model, with both numbers of rows.
        """
        rows = self.rows.rows
        models = [("the student", self.student, rows.gold)]
        for name in teachers_of(self.losses):
            if name not in self.teachers:
                raise TideError(
                    f"teachers.{name}: a loss listens to it, but it gave no answer to this microbatch"
                )
            models.append((f"teachers.{name}", self.teachers[name], rows.link(name).gold))
        for name, head, gold in models:
            if len(head.hidden) != len(gold):
                raise TideError(
                    f"{name}: {len(head.hidden)} hidden rows where the microbatch's rows are {len(gold)}; "
                    "make views and rows from the same noised batches"
                )
            check_golds(gold, head.num_ids, f"{name}: ")
