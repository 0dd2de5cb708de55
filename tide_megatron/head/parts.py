"""What goes into a head loss and what comes out of it, in whichever form it is computed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.losses.columns import Columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadInput:
    """One model's final hidden rows with its output weight, or the rows of the weight that this rank owns."""

    hidden: Tensor
    """[rows, hidden size], final norm applied."""
    weight: Tensor
    """[own ids, hidden size]: of the ids from `start` on."""
    start: int = 0
    vocabulary: int | None = None
    """How many ids the whole head has; None: `weight` is the whole head."""
    gradient: Tensor | None = None
    """[own ids, hidden size] fp32 into which the fused head loss adds the weight's gradient; None: it writes
    nothing. The plain form leaves gradients to autograd."""

    @property
    def logits(self) -> Tensor:
        """[rows, own ids] fp32; the product runs in the weight's dtype."""
        return torch.nn.functional.linear(self.hidden.to(self.weight.dtype), self.weight).float()

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
