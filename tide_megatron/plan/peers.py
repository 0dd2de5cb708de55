"""What other ranks would send of what a host reads, computed here: noise is a pure function of the samples.

Three things of a step are read on the host: the numbers that all ranks exchange before it, the rows that a
vocabulary group joins, and the views that a replica gathers. Each is recognised by what THIS rank gives,
which must be, number for number, what the plan computes for it; so an answer can not belong to another
question.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tide_megatron.head.gather import pack_rows
from tide_megatron.teachers.exchange import packed_views
from tide_megatron.train.step import Run
from tide_megatron.train.step_input import StepInput


class ComputedPeers:
    """Answers gathers of host values for all ranks; a `platform.lone_world.Peers`."""

    def __init__(self, rank: int) -> None:
        """Know nothing yet: everybody sends the same.

        Args:
            rank: of the world, this one.
        """
        self._rank = rank
        self._run: Run | None = None
        self._inputs: Sequence[StepInput] = ()
        self._expected: list[Tensor] = []

    def know(self, run: Run, given: Sequence[StepInput]) -> None:
        """Answer for a step from now on.

        Args:
            run: this rank's.
            given: what the first ranks of the world read; what the next ones read are the same again.
        """
        self._run, self._inputs = run, given

    def expect(self, by_rank: list[Tensor]) -> None:
        """Answer the next gather of this rank's entry with these, by rank of its group."""
        self._expected = by_rank

    def __call__(self, tensor: Tensor, ranks: Sequence[int]) -> Sequence[Tensor] | None:
        """Return what each of some world ranks sends where this one sends a tensor; None: the same."""
        if self._expected:
            found, self._expected = self._expected, []
            assert torch.equal(found[list(ranks).index(self._rank)], tensor), "routing is gathered elsewhere"
            return found
        if not self._inputs or tensor.dim() != 1:
            return None
        for question in self._questions():
            if _is_beginning(question(self._input(self._rank)), tensor):
                known = [_padded(question(given), tensor) for given in self._inputs]
                return [known[rank % len(known)] for rank in ranks]
        return None

    def _input(self, rank: int) -> StepInput:
        return self._inputs[rank % len(self._inputs)]

    def _questions(self) -> Iterator[Callable[[StepInput], Tensor]]:
        """Yield what a rank could be asked for."""
        assert self._run is not None, "asked of a step that is not known"
        yield lambda given: torch.tensor(
            [value for part in given.numbers.values() for value in part], dtype=torch.float64
        )
        yield lambda given: torch.cat([pack_rows(rows) for rows in given.rows])
        for name, teacher in self._run.teachers.items():
            for start in range(0, len(self._inputs[0].noised), teacher.shared_schedule):
                yield functools.partial(_views, name, slice(start, start + teacher.shared_schedule))


def _views(name: str, microbatches: slice, given: StepInput) -> Tensor:
    """Return the views of some microbatches as a replica gathers them."""
    return packed_views([view for passes in given.requests[name].views[microbatches] for view in passes])


def _is_beginning(part: Tensor, whole: Tensor) -> bool:
    """Say whether a vector begins another one of its dtype."""
    return part.dtype == whole.dtype and torch.equal(part, whole[: len(part)])


def _padded(part: Tensor, like: Tensor) -> Tensor:
    """Return a vector as long as another: what is behind it is that one's end or zeros."""
    if len(part) <= len(like) and part.dtype == torch.float64:
        return torch.cat([part, like[len(part) :]])
    return torch.nn.functional.pad(part, (0, len(like) - len(part)))
