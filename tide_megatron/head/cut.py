"""Which ids each rank of a head group owns: ranges common to all heads, the student's and every teacher's.

Common ranges put both models' logits of an id on one rank, so that what compares ids one by one needs no
exchange of columns. The price: of a head smaller than the largest, the last ranks own less, or nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """One rank's part of every vocabulary. Pure arithmetic."""

    ranks: int
    """Ranks of the head group."""
    rank: int
    """This rank's place among them."""
    width: int
    """Ids of every range but the last."""

    @staticmethod
    def of(vocabularies: Iterable[int], ranks: int, rank: int) -> Cut:
        """Cut the largest vocabulary into equal ranges.

        Args:
            vocabularies: how many ids each head has.
            ranks: ranks of the head group.
            rank: this one's place.
        """
        assert 0 <= rank < ranks, f"rank {rank} of a head group of {ranks}"
        return Cut(ranks=ranks, rank=rank, width=-(-max(vocabularies) // ranks))

    def columns(self, vocabulary: int) -> tuple[int, int]:
        """Return the first and last-plus-one id that this rank owns of a head of so many ids; may be none."""
        assert vocabulary <= self.ranks * self.width, f"a head of {vocabulary} ids was not cut"
        start = self.rank * self.width
        return min(start, vocabulary), min(start + self.width, vocabulary)
