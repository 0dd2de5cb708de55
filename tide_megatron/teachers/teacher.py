"""A teacher: a frozen model in its own layout that answers with final hidden rows, never with logits.

    views of this rank -> gather_views -> forward -> gather_hidden -> rows of the whole vocabulary group

A rank asks for its own microbatches; the replica reads them rank by rank; the answer holds the rows of ALL
ranks of the vocabulary group, because each of them owns a slice of the head's columns. With an
expert-parallel layout a rank forwards for itself and its tokens travel inside the mixture layers. Whoever
asks never learns which of these ways was taken.

In a run's times, both gathers are `exchange` and the rest is `teacher`. What megatron-core itself
sends in the forward pass (sums over tensor ranks, states from stage to stage, tokens to their experts) stays
in `teacher`: it is woven into the layers, and so is the waiting for other ranks that it brings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tide_megatron.base.phases import Phases
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context, TwoViews
from tide_megatron.diffusion.views import (
    Complementary,
    View,
    complementary_passes,
    complementary_view,
    teacher_view,
    trimmed_view,
)
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.tiles import RowScores, score_rows
from tide_megatron.models.build import TideModel
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.exchange import gather_parts
from tide_megatron.parallel.vocab_group import VocabGroup
from tide_megatron.teachers.exchange import Request, Route, Sizes, gather_views, num_rows
from tide_megatron.teachers.pipeline import forward_views


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewBuilder:
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
        shown = self.complementary.shown(noised.part(name).batch, reading)
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


def merge_passes(views: Sequence[View], hidden: Sequence[Tensor]) -> Tensor:
    """Put the rows of all passes of a microbatch into (sample, position) order, [rows, hidden size].

    Args:
        views: of one shape, one per pass; every row is asked for in exactly one of them.
        hidden: [rows of the view, hidden size] each.
    """
    if len(views) == 1:
        return hidden[0]
    order = torch.cat([view.rows for view in views]).argsort()
    return torch.cat(list(hidden))[order]


class Teacher:
    """One frozen model, resident on this rank beside the student and other teachers."""

    def __init__(
        self,
        name: str,
        model: TideModel,
        view_builder: ViewBuilder,
        route: Route,
        *,
        shared_schedule: int = 1,
        phases: Phases | None = None,
    ) -> None:
        """Keep a model that was built with `trainable=False`.

        Args:
            name: as in the recipe and in `Batch.sides`.
            model: in its own layout.
            view_builder: how it sees a microbatch.
            route: how its rows travel.
            shared_schedule: how many microbatches of a step are read in one pipeline schedule, at most.
            phases: the timer of the run it is part of, which insists on its own (`train.step.Run`); None: a
                timer that nobody reads, for a teacher outside a run.
        """
        self.name = name
        self.model = model
        self.view_builder = view_builder
        self.route = route
        self.phases = Phases() if phases is None else phases
        self.shared_schedule = 1 if route.is_alone else shared_schedule

    def request(self, noised: Sequence[Noised]) -> Request:
        """Build this rank's views of a step's microbatches. Not a collective."""
        return Request(
            views=[self.view_builder.views(self.name, example) for example in noised],
            fingerprints=[example.batch.fingerprint for example in noised],
        )

    @torch.no_grad()
    def hidden_states(self, request: Request, sizes: Sequence[Sizes]) -> Iterator[HeadInput]:
        """Yield, by microbatch, the final hidden rows of the whole vocabulary group with the head's slice.

        All ranks that share anything with this one through the teacher's layout or the vocabulary group
        iterate together and equally far, also when nothing is masked: no rank of a replica can forward alone.

        Args:
            request: this rank's.
            sizes: what every group rank asks for, [group rank][microbatch][pass].

        Yields:
            hidden [rows of all group ranks, hidden size], in their order.
        """
        start = 0
        while start < len(request.views):
            stop = min(start + self.shared_schedule, len(request.views))
            for microbatch, rows in zip(
                range(start, stop), self._forward(request, sizes, range(start, stop)), strict=True
            ):
                rows_by_rank = [num_rows(of_rank[microbatch]) for of_rank in sizes]
                with self.phases("exchange"):
                    delivered = self.route.gather_hidden(rows, rows_by_rank)
                yield self.head_input(delivered)
            start = stop

    def head_input(self, hidden: Tensor) -> HeadInput:
        """Join hidden rows with this rank's slice of the head."""
        return HeadInput(
            hidden=hidden,
            weight=self.model.head_weight,
            start=self.model.head_start,
            vocabulary=self.model.architecture.vocabulary,
        )

    def _forward(self, request: Request, sizes: Sequence[Sizes], window: range) -> list[Tensor]:
        """Return this replica's rows for each microbatch of a window; room for them before the last stage."""
        own = [view for microbatch in window for view in request.views[microbatch]]
        by_source = [
            [size for microbatch in window for size in sizes[source][microbatch]]
            for source in self.route.sources
        ]
        with self.phases("exchange"):
            views = [own] if self.route.is_alone else gather_views(own, by_source, self.route.replica)
        passes = len(request.views[0])
        ordered = [
            view
            for number in range(len(window))
            for of_source in views
            for view in of_source[number * passes : (number + 1) * passes]
        ]
        outputs = forward_views(self.model, ordered)
        per_microbatch = len(views) * passes
        return [
            self._joined(
                ordered[first : first + per_microbatch], outputs[first : first + per_microbatch], passes
            )
            for first in range(0, len(ordered), per_microbatch)
        ]

    def _joined(self, views: Sequence[View], outputs: Sequence[Tensor], passes: int) -> Tensor:
        """Put the rows of one microbatch's source ranks behind each other, or make room for them."""
        if not outputs:
            rows = sum(len(view.rows) for view in views)
            weight = self.model.head_weight
            return weight.new_empty(rows, weight.shape[1])
        merged = [
            merge_passes(views[first : first + passes], outputs[first : first + passes])
            for first in range(0, len(views), passes)
        ]
        return torch.cat(merged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherScorer:
    """A teacher that reads batches of its own tokens in the plain view; an `evaluate.likelihood.Scorer`."""

    teacher: Teacher
    group: VocabGroup
    mask_id: int
    """What it is shown for a masked token; its own, unless others are tried."""

    def __call__(self, noised: Noised) -> RowScores:
        """Score this rank's microbatch. All ranks call it together and equally often."""
        view_builder = self.teacher.view_builder
        view = trimmed_view(noised, view_builder.context, self.mask_id)
        request = Request(views=[(view,)], fingerprints=[noised.batch.fingerprint])
        sizes = [request.sizes(numbers) for numbers in self._of_all(request.numbers())]
        (answer,) = self.teacher.hidden_states(request, sizes)
        rows = [num_rows(rank[0]) for rank in sizes]
        gold = gather_parts(noised.batch.ids[noised.row_index], rows, self.group.group, "rows")
        scores, mine = score_rows(answer, gold, self.group.group), self.group.own(rows)
        return RowScores(scores.nll[mine], scores.is_right[mine])

    def _of_all(self, numbers: list[int]) -> list[list[int]]:
        if self.group.group is None:
            return [numbers]
        return gather_objects(numbers, self.group.group)
