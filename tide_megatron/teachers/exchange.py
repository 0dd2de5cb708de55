"""What travels for a teacher: views to the ranks that read them together, hidden states to the head.

A rank asks for its own microbatches (`Request`); its sizes travel in the step's one count collective, so
nothing here asks a device for a length. A replica forwards the views of all its ranks, the *source ranks* of
its rows, one after the other, because no rank of it can forward alone (`gather_views`). Its last stage then
has the hidden states of all of them; they are broadcast inside the replica and gathered over the replicas of
a vocabulary group (`Route.gather_hidden`). Per receiver that is [rows, hidden size], never logits (design
section 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import View, view_of_parts
from tide_megatron.parallel.exchange import broadcast_rows, gather_parts
from tide_megatron.parallel.layout import Layout


class ViewSize(NamedTuple):
    """The shape of one view."""

    samples: int
    length: int
    """Of one part."""
    rows: int
    """Positions it asks for."""
    segments: int = 0
    """By which it hides pads and tells the samples of a pack apart; 0: there is nothing to hide."""

    @classmethod
    def of(cls, view: View) -> ViewSize:
        """Measure a view."""
        segments = 0 if view.segments is None else len(view.segments.pack)
        return cls(len(view.ids), view.length, len(view.rows), segments)


Sizes = Sequence[Sequence[ViewSize]]
"""[microbatch][pass]: what one rank asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One rank's views for one teacher."""

    views: Sequence[tuple[View, ...]]
    """[microbatch][pass]."""
    fingerprints: Sequence[int]
    """Of the batches the views were made from, one per microbatch."""

    def numbers(self) -> list[int]:
        """Return all sizes behind each other; as many numbers on every rank."""
        return [number for passes in self.views for view in passes for number in ViewSize.of(view)]

    def sizes(self, numbers: Sequence[int]) -> Sizes:
        """Read what another rank's request of the same form says of itself."""
        fields = len(ViewSize._fields)
        found = [ViewSize(*numbers[start : start + fields]) for start in range(0, len(numbers), fields)]
        passes = len(self.views[0])
        return [found[start : start + passes] for start in range(0, len(found), passes)]


def num_rows(passes: Sequence[ViewSize]) -> int:
    """Return the rows that all passes of one microbatch bring together."""
    return sum(size.rows for size in passes)


def gather_views(
    views: Sequence[View], sizes: Sequence[Sequence[ViewSize]], group: ProcessGroup
) -> list[list[View]]:
    """Gather the views of all source ranks; every rank of the replica must call it together.

    Args:
        views: this rank's, all of one context.
        sizes: [source rank][view]; each has as many views.
        group: the replica.

    Returns:
        [source rank][view], in their own shapes; ids outside the model's vocabulary are the sender's fault.
    """
    form = _Form(views[0].context)
    packed = packed_views(views)
    whole = gather_parts(packed, [sum(map(form.numbers, source)) for source in sizes], group, "collect")
    parts = iter(torch.split(whole, [form.numbers(size) for source in sizes for size in source]))
    return [[form.unpack(next(parts), size) for size in source] for source in sizes]


def packed_views(views: Sequence[View]) -> Tensor:
    """Write views of one context behind each other, [numbers] int32: what a rank gives to `gather_views`."""
    form = _Form(views[0].context)
    return torch.cat([form.pack(view) for view in views])


class _Form:
    """How a view of one teacher is written as a row of int32: ids, segments, rows."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def fields(self, size: ViewSize) -> tuple[int, int, int, int, int]:
        """Return how many numbers each part takes."""
        ids = size.samples * self.context.parts * size.length
        return ids, size.segments, size.segments, size.segments, size.rows

    def numbers(self, size: ViewSize) -> int:
        """Return how many numbers a view takes."""
        return sum(self.fields(size))

    def pack(self, view: View) -> Tensor:
        own = view.segments
        segments = [] if own is None else [own.pack, own.start, own.tokens]
        return torch.cat([view.ids.flatten(), *segments, view.rows]).to(torch.int32)

    def unpack(self, packed: Tensor, size: ViewSize) -> View:
        ids, pack, start, tokens, rows = torch.split(packed.long(), list(self.fields(size)))
        segments = Segments(pack=pack, start=start, tokens=tokens) if size.segments else None
        return view_of_parts(ids.view(size.samples, -1), self.context, segments, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """Where this rank stands between one teacher's replicas and its vocabulary group."""

    layout: Layout
    """The teacher's."""
    replica: ProcessGroup
    across: ProcessGroup | None
    """This vocabulary group's ranks of the same place in a replica, one each; None: there is one replica."""
    rank: int = 0
    """This rank's number in its vocabulary group, which consists of whole replicas."""

    @property
    def sources(self) -> range:
        """The group ranks of this rank's replica: whose views it reads."""
        size = self.layout.replica_size
        first = self.rank // size * size
        return range(first, first + size)

    @property
    def is_alone(self) -> bool:
        """Whether a rank forwards for itself, without views of others."""
        return self.layout.replica_size == 1

    def gather_hidden(self, rows: Tensor, rows_by_rank: Sequence[int]) -> Tensor:
        """Bring the rows of all replicas to every rank. All ranks of the vocabulary group call it together.

        Args:
            rows: [rows of this replica, hidden size] in the order of source ranks; what a rank before the
                last stage passes is overwritten.
            rows_by_rank: how many rows each group rank asked for.

        Returns:
            [sum of rows_by_rank, hidden size], in the order of group ranks.
        """
        size = self.layout.replica_size
        if size > 1:
            last_stage = self.layout.tensor * (self.layout.pipeline - 1)  # its first tensor rank
            rows = broadcast_rows(rows.contiguous(), last_stage, self.replica)
        if self.across is None:
            return rows
        parts = [sum(rows_by_rank[first : first + size]) for first in range(0, len(rows_by_rank), size)]
        return gather_parts(rows, parts, self.across, "deliver")
