"""Collect: every seat of a replica learns what all its seats want read (design section 2).

A replica forwards the views of all its seats, one after the other, because no rank of it can forward alone.
What a view is made of travels packed as int32 in ONE collective for as many microbatches as share a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View, view_of_parts
from tide_megatron.parallel.exchange import gather_parts
from tide_megatron.teachers.request import ViewSize


def collect(
    views: Sequence[View], sizes: Sequence[Sequence[ViewSize]], group: ProcessGroup
) -> list[list[View]]:
    """Gather the views of all seats; every rank of the replica must call it together.

    Args:
        views: this seat's, all of one context.
        sizes: [seat][view]; each seat has as many views.
        group: the replica.

    Returns:
        [seat][view], in their own shapes; ids outside the model's vocabulary are the sender's fault.
    """
    first = views[0]
    form = _Form(first.context, has_lengths=first.lengths is not None)
    packed = torch.cat([form.pack(view) for view in views])
    whole = gather_parts(packed, [sum(map(form.numbers, seat)) for seat in sizes], group, "collect")
    parts = iter(torch.split(whole, [form.numbers(size) for seat in sizes for size in seat]))
    return [[form.unpack(next(parts), size) for size in seat] for seat in sizes]


class _Form:
    """How a view of one teacher is written as a row of int32: ids, real lengths, rows."""

    def __init__(self, context: Context, *, has_lengths: bool) -> None:
        self.context, self.has_lengths = context, has_lengths

    def fields(self, size: ViewSize) -> tuple[int, int, int]:
        """Return how many numbers each part takes."""
        lengths = size.samples if self.has_lengths else 0
        return size.samples * self.context.parts * size.length, lengths, size.rows

    def numbers(self, size: ViewSize) -> int:
        """Return how many numbers a view takes."""
        return sum(self.fields(size))

    def pack(self, view: View) -> Tensor:
        lengths = view.rows[:0] if view.lengths is None else view.lengths
        return torch.cat([view.ids.flatten(), lengths, view.rows]).to(torch.int32)

    def unpack(self, packed: Tensor, size: ViewSize) -> View:
        ids, lengths, rows = torch.split(packed.long(), list(self.fields(size)))
        known = lengths if self.has_lengths else None
        return view_of_parts(ids.view(size.samples, -1), self.context, known, rows)
