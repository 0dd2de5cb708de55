"""A teacher: a frozen model in its own layout that answers with final hidden rows, never with logits.

    views of this rank -> collect -> forward -> deliver -> rows of the whole head group

A rank asks for its own microbatches; the replica reads them seat by seat; the answer holds the rows of ALL
ranks of the head group, because each of them owns a slice of the head's columns. With an expert-parallel
layout a rank forwards for itself and its tokens travel inside the mixture layers. Whoever asks never learns
which of these ways was taken.

In a run's times, collect and deliver are `exchange` and the rest is `teacher`. What megatron-core itself
sends in the forward pass (sums over tensor ranks, states from stage to stage, tokens to their experts) stays
in `teacher`: it is woven into the layers, and so is the waiting for other ranks that it brings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tide_megatron.base.phases import Phases
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.views import View
from tide_megatron.head.inputs import HeadInput
from tide_megatron.models.build import TideModel
from tide_megatron.teachers.collect import collect
from tide_megatron.teachers.request import Request, Sizes, num_rows
from tide_megatron.teachers.route import Route
from tide_megatron.teachers.schedule import forward_views
from tide_megatron.teachers.sight import Sight, merge_passes


class Teacher:
    """One frozen model, resident on this rank beside the student and other teachers."""

    def __init__(
        self,
        name: str,
        model: TideModel,
        sight: Sight,
        route: Route,
        *,
        shared_schedule: int = 1,
        phases: Phases | None = None,
    ) -> None:
        """Keep a model that was built with `trainable=False`.

        Args:
            name: as in the recipe and in `Batch.sides`.
            model: in its own layout.
            sight: how it sees a microbatch.
            route: how its rows travel.
            shared_schedule: how many microbatches of a step are read in one pipeline schedule, at most.
            phases: the timer of the run it is part of, which insists on its own (`train.step.Run`); None: a
                timer that nobody reads, for a teacher outside a run.
        """
        self.name = name
        self.model = model
        self.sight = sight
        self.route = route
        self.phases = Phases() if phases is None else phases
        self.shared_schedule = 1 if route.is_alone else shared_schedule

    def request(self, noised: Sequence[Noised]) -> Request:
        """Build this rank's views of a step's microbatches. Not a collective."""
        return Request(
            views=[self.sight.views(self.name, example) for example in noised],
            fingerprints=[example.batch.fingerprint for example in noised],
        )

    @torch.no_grad()
    def answers(self, request: Request, sizes: Sequence[Sizes]) -> Iterator[HeadInput]:
        """Yield, by microbatch, the final hidden rows of the whole head group with the head's slice.

        All ranks that share anything with this one through the teacher's layout or the head group iterate
        together and equally far, also when nothing is masked: no rank of a replica can forward alone.

        Args:
            request: this rank's.
            sizes: what every place of the head group asks for, [place][microbatch][pass].

        Yields:
            hidden [rows of all places, hidden size], in the order of places.
        """
        start = 0
        while start < len(request.views):
            stop = min(start + self.shared_schedule, len(request.views))
            for microbatch, rows in zip(
                range(start, stop), self._forward(request, sizes, range(start, stop)), strict=True
            ):
                seat_rows = [num_rows(place[microbatch]) for place in sizes]
                with self.phases("exchange"):
                    delivered = self.route.deliver(rows, seat_rows)
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
        seats = [
            [size for microbatch in window for size in sizes[place][microbatch]] for place in self.route.seats
        ]
        with self.phases("exchange"):
            views = [own] if self.route.is_alone else collect(own, seats, self.route.replica)
        passes = len(request.views[0])
        ordered = [
            view
            for number in range(len(window))
            for seat in views
            for view in seat[number * passes : (number + 1) * passes]
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
        """Put the rows of one microbatch's seats behind each other, or make room for them."""
        if not outputs:
            rows = sum(len(view.rows) for view in views)
            weight = self.model.head_weight
            return weight.new_empty(rows, weight.shape[1])
        merged = [
            merge_passes(views[first : first + passes], outputs[first : first + passes])
            for first in range(0, len(views), passes)
        ]
        return torch.cat(merged)
