"""Segments: which positions of a view's rows belong to which sample.

A row that is a pack holds several samples behind each other; a token sees those of its own segment only.
Where a row holds one sample, its segment says where the row's pads begin.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NOBODY = -1
"""Number of a pad, which belongs to no segment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """Where samples stand, in their order; every row has one that begins at its first position."""

    pack: Tensor
    """[segments] int64: row of the view."""
    start: Tensor
    """[segments] int64: first position, in each part of the row."""
    tokens: Tensor
    """[segments] int64 real tokens in each part; what follows up to the next segment are pads."""

    @classmethod
    def of_rows(cls, lengths: Tensor) -> Segments:
        """Return those of rows that hold one sample each.

        Args:
            lengths: [rows] int64 real tokens of each part.
        """
        return cls(
            pack=torch.arange(len(lengths), device=lengths.device),
            start=torch.zeros_like(lengths),
            tokens=lengths,
        )

    def with_rows(self, packs: int, more: int) -> Segments:
        """Return these of so many packs and, behind them, further rows that hold one token each."""
        pack = torch.arange(packs, packs + more, device=self.pack.device)
        added = pack, torch.zeros_like(pack), torch.ones_like(pack)
        old = self.pack, self.start, self.tokens
        both = [torch.cat(pair) for pair in zip(old, added, strict=True)]
        return Segments(pack=both[0], start=both[1], tokens=both[2])

    def numbers(self, packs: int, length: int) -> Tensor:
        """Render them: [packs, length] int64 number of each position's segment, `NOBODY` of a pad.

        Asks no device, whatever device they are on.
        """
        number, offset = self._nearest(packs, length)
        return torch.where(offset < self.tokens[number], number, NOBODY)

    def positions(self, packs: int, length: int) -> Tensor:
        """Return [packs, length] int64: how far each position is from its segment's first, pads too."""
        return self._nearest(packs, length)[1]

    def _nearest(self, packs: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the last segment that begins at or before each position, and the distance from there."""
        first = self.pack * length + self.start
        ascending, order = first.sort()
        place = torch.arange(packs * length, device=first.device)
        number = order[torch.searchsorted(ascending, place, right=True) - 1]
        return number.view(packs, length), (place - first[number]).view(packs, length)
