"""Which teacher broke a step: looked up only when an update was skipped.

Until then the answers are kept, and nothing is computed. When the ranks have agreed to skip an update, each
looks at the answers about its own samples and they tell each other what they saw: the log names teacher and
samples.

What that keeps: the hidden rows of all microbatches of a step until its end, where without it those of one
microbatch (of one schedule, in a pipeline) would do. Per teacher that is rows of the vocabulary group x
hidden size x bytes a number: 28 MB a microbatch for 3,400 rows of WeDLM-8B in bf16. They are kept as they
came: a copy of this rank's own rows would be smaller in a vocabulary group of several ranks, but would be
work on every good step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tide_megatron.diffusion.batch import Noised
from tide_megatron.head.inputs import HeadInput
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.vocab_group import VocabGroup
from tide_megatron.teachers.exchange import num_rows
from tide_megatron.train.counts import Counts


class AnswerWatch:
    """Keeps, for one step, what every teacher answered, until it is known whether anybody asks."""

    def __init__(self, teachers: Iterable[str], group: VocabGroup, counts: Counts) -> None:
        """Start a step."""
        self._teachers, self._group, self._counts = list(teachers), group, counts
        self._kept: list[tuple[Mapping[str, HeadInput], Noised]] = []

    def keep(self, answers: Mapping[str, HeadInput], noised: Noised) -> None:
        """Keep all answers to the next microbatch. Not a collective."""
        self._kept.append((answers, noised))

    def report(self) -> dict[str, list[int]]:
        """Return, on every rank, the teachers whose answers were not finite with the sample ids, ascending.

        All ranks call it together.
        """
        mine = {name: self._broken(name) for name in self._teachers}
        found: dict[str, set[int]] = {name: set() for name in mine}
        for other in gather_objects(mine):
            for name, ids in other.items():
                found[name] |= set(ids)
        return {name: sorted(ids) for name, ids in found.items() if ids}

    def _broken(self, name: str) -> list[int]:
        """Return this rank's samples of which a teacher gave a row that is not finite."""
        broken: set[int] = set()
        for microbatch, (answers, noised) in enumerate(self._kept):
            answer = answers[name]
            rows = [num_rows(place[microbatch]) for place in self._counts.view_sizes[name]]
            own = answer.hidden[self._group.own(rows)]
            sample, _ = noised.reading(name).index
            is_broken = ~own.isfinite().all(dim=1).cpu()  # rows and samples are known on the host
            broken |= set(noised.part(name).batch.sample_ids[sample[is_broken]].tolist())
        return sorted(broken)
