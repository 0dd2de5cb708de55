"""What a loss may know: the masked `Rows` of one microbatch, logits of some ids, and what became of them.

Every vocabulary head of a run is cut at the same ids (design section 3), so the same rank holds the student's
and every teacher's logits of an id, and compares them without an exchange. A rank may own no column of a
head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from tide_megatron.diffusion.alignment import RowAlignment, same_rows
from tide_megatron.diffusion.batch import Noised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The masked rows of one microbatch, in (sample, position) order."""

    gold: Tensor
    """[rows] int64: the student token each row must predict."""
    sample: Tensor
    """[rows] int64: index of the row's sample in the microbatch."""
    time: Tensor
    """[samples] fp32 noise level."""
    maskable: Tensor
    """[samples] int64: how many tokens of each sample may be masked."""
    links: Mapping[str, RowAlignment] = dataclasses.field(default_factory=dict)
    """Teacher name -> how its rows join these; a teacher without an entry answers row by row."""

    def link(self, teacher: str) -> RowAlignment:
        """Return how a teacher's rows join these."""
        return self.links.get(teacher) or same_rows(self.gold, self.sample)


def rows_of(noised: Noised) -> Rows:
    """Describe a microbatch's masked rows to the losses."""
    sample, position = noised.row_index
    return Rows(
        gold=noised.batch.ids[sample, position],
        sample=sample,
        time=noised.time,
        maskable=noised.batch.maskable.sum(dim=1),
        links={name: noised.link(name) for name in {**noised.batch.sides, **noised.batch.taught}},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Logits of the ids [start, start + columns) of a vocabulary."""

    logits: Tensor
    """[rows, columns], any float dtype."""
    start: int = 0
    vocabulary: int
    """How many ids the whole head has."""

    def below(self, limit: int) -> Tensor:
        """Return the logits of those ids here that are less than `limit`, [rows, 0 or more]."""
        return self.logits[:, : max(0, limit - self.start)]


class Distribution:
    """Log-probabilities of some ids; their exponentials are made once, when they are first asked for."""

    def __init__(self, log: Tensor) -> None:
        """Take normalised log-probabilities, [items, columns] fp32."""
        self.log = log
        self._p: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """Probabilities, [items, columns] fp32."""
        if self._p is None:
            self._p = self.log.exp()
        return self._p
