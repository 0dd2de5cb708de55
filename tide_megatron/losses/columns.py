"""Logits of one model, whole or cut by vocabulary: a loss must know which ids its columns are.

Every vocabulary head of a head group is cut at the same ids (design section 3), so that the same rank holds
the student's and every teacher's logits of an id. A rank may own no column of a head.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


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


def whole(logits: Tensor) -> Columns:
    """Describe logits of all ids, [rows, vocabulary]."""
    return Columns(logits=logits, vocabulary=logits.shape[-1])
