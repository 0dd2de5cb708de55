"""A teacher: a frozen model in its own layout that answers with final hidden rows, never with logits.

The answer travels as [rows, hidden of the teacher]; the head joins it with the teacher's output weight.
With an expert-parallel-only layout each rank forwards its own microbatch and tokens travel inside the
mixture layers, so nothing is exchanged before the head. Tensor and pipeline layouts will add collect and
deliver here without changing what `answer` returns.

A teacher may have tokens of its own (a side of the batch) and may be shown half of what is hidden at a time
(complementary views); both stay inside this package and the layer below: whoever asks gets rows.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.link import Reading
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View, complementary_passes, complementary_view, teacher_view
from tide_megatron.head.plain import HeadInput
from tide_megatron.models.build import TideModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """How a teacher sees a noised microbatch."""

    context: Context
    mask_id: int
    """The teacher's own mask token."""
    complementary: Complementary | None = None
    """Show half of the hidden tokens at a time; None: all are hidden in one view."""
    forwards: int = 1
    """Forward passes of complementary views: 1, or 2 (slower, equal; the oracle)."""

    def views(self, noised: Noised, reading: Reading) -> tuple[View, ...]:
        """Build what the teacher reads, one view per forward pass."""
        if self.complementary is None:
            return (teacher_view(reading, self.context, self.mask_id),)
        shown = self.complementary.shown(noised.batch, reading)
        if self.forwards == 1:
            return (complementary_view(reading, shown, self.context, self.mask_id),)
        return complementary_passes(reading, shown, self.context, self.mask_id)

    def merge(self, noised: Noised, reading: Reading, answers: list[Tensor]) -> Tensor:
        """Put the rows of all passes into (sample, position) order, [rows, hidden size]."""
        if len(answers) == 1:
            return answers[0]
        assert self.complementary is not None, "plain views are one pass"
        is_second = self.complementary.shown(noised.batch, reading)[reading.asked]  # [rows]
        merged = answers[0].new_empty(len(is_second), answers[0].shape[1])
        merged[~is_second], merged[is_second] = answers
        return merged


class Teacher:
    """One frozen model, resident on this rank beside the student."""

    def __init__(self, name: str, model: TideModel, sight: Sight) -> None:
        """Keep a model that was built with `trainable=False`."""
        self.name = name
        self.model = model
        self.sight = sight

    @torch.no_grad()
    def answer(self, noised: Noised) -> HeadInput:
        """Return the teacher's final hidden states at the rows it is asked about, with its head weight.

        All ranks of the teacher's layout call it equally often, also when a microbatch has no hidden row:
        their tokens pass through each other's experts.
        """
        reading = noised.reading(self.name)
        rows = [self.model.rows(view) for view in self.sight.views(noised, reading)]
        return HeadInput(hidden=self.sight.merge(noised, reading, rows), weight=self.model.head_weight)
