"""Which teacher broke a step: looked up only when an update was skipped, noted all the while.

Every rank looks at the answers about its own samples, on the device and without waiting for it. When the
ranks have agreed to skip an update, they tell each other what they saw: the log names teacher and samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tide_megatron.diffusion.batch import Noised
from tide_megatron.head.parts import HeadInput
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.groups import HeadGroup
from tide_megatron.teachers.request import num_rows
from tide_megatron.train.counts import Counts


class AnswerWatch:
    """Remembers, for one step, which rows of which teacher's answers were not finite."""

    def __init__(self, teachers: Iterable[str], head: HeadGroup, counts: Counts) -> None:
        """Start a step."""
        self._head, self._counts = head, counts
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in teachers}

    def look(self, answers: Mapping[str, HeadInput], microbatch: int, noised: Noised) -> None:
        """Note this rank's own rows of all answers to one microbatch. Not a collective."""
        for name, answer in answers.items():
            rows = [num_rows(place[microbatch]) for place in self._counts.asked[name]]
            own = answer.hidden[self._head.own(rows)]
            sample, _ = noised.reading(name).asked.nonzero(as_tuple=True)
            self._seen[name].append((~own.isfinite().all(dim=1), noised.batch.sample_ids[sample]))

    def report(self) -> dict[str, list[int]]:
        """Return, on every rank, the teachers whose answers were not finite with the sample ids, ascending.

        All ranks call it together.
        """
        mine = {
            name: torch.unique(torch.cat([ids[broken] for broken, ids in seen])).tolist()
            for name, seen in self._seen.items()
        }
        found: dict[str, set[int]] = {name: set() for name in mine}
        for other in gather_objects(mine):
            for name, ids in other.items():
                found[name] |= set(ids)
        return {name: sorted(ids) for name, ids in found.items() if ids}
