"""How a teacher sees a noised microbatch: context, mask token, all masked tokens or half at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.mask import Context, TwoViews
from tide_megatron.diffusion.views import View, complementary_passes, complementary_view, teacher_view


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """What turns a microbatch into one teacher's views."""

    context: Context
    mask_id: int
    """The teacher's own mask token."""
    complementary: Complementary | None = None
    """Show half of the masked tokens at a time; None: all are masked in one view."""
    forwards: int = 1
    """Forward passes of complementary views: 1, or 2 (slower, equal; the oracle)."""

    def views(self, name: str, noised: Noised) -> tuple[View, ...]:
        """Build what the teacher of this name reads, one view per forward pass."""
        reading = noised.reading(name)
        if self.complementary is None:
            return (teacher_view(reading, self.context, self.mask_id),)
        shown = self.complementary.shown(noised.batch, reading)
        if self.forwards == 1:
            return (complementary_view(reading, shown, self.context, self.mask_id),)
        return complementary_passes(reading, shown, self.context, self.mask_id)

    def reads(self, lengths: Sequence[int]) -> tuple[Context, list[int]]:
        """Return what is read in one forward of samples of these lengths: context and sequence lengths.

        Two forwards of complementary views answer the same and are no reason to count more.
        """
        if self.complementary is None:
            return self.context, list(lengths)
        if self.context.kind == "block_diffusion":
            return TwoViews(kind=self.context.kind, block_size=self.context.block_size), list(lengths)
        return self.context, [*lengths, *lengths]


def merge_passes(views: Sequence[View], answers: Sequence[Tensor]) -> Tensor:
    """Put the rows of all passes of a microbatch into (sample, position) order, [rows, hidden size].

    Args:
        views: of one shape, one per pass; every row is asked for in exactly one of them.
        answers: [rows of the view, hidden size] each.
    """
    if len(views) == 1:
        return answers[0]
    order = torch.cat([view.rows for view in views]).argsort()
    return torch.cat(list(answers))[order]
