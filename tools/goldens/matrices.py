"""The reference's form of chunks: one column a chunk in two [samples, length, columns] matrices."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.diffusion.side import Side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrices:
    """Which tokens of both sides belong to which column; a column is one run of tokens, or padding."""

    student: Tensor
    """[samples, student length, columns] bool."""
    teacher: Tensor
    """[samples, teacher length, columns] bool."""

    def places(self, sample: int) -> list[list[int]]:
        """List the columns of one sample up to the last used, [t0, t1, s0, s1]; an empty side is 0, 0."""
        found = [
            [*_run(self.teacher[sample, :, column]), *_run(self.student[sample, :, column])]
            for column in range(self.student.shape[2])
        ]
        while found and not any(found[-1]):
            found.pop()
        return found

    def side(self, ids: Tensor) -> Side:
        """Turn columns into chunks over teacher tokens `ids`; a chunk's number is its column."""
        sample, column = self.student.any(dim=1).nonzero(as_tuple=True)
        spans = [
            [*_run(self.student[s, :, c]), *_run(self.teacher[s, :, c])]
            for s, c in zip(sample.tolist(), column.tolist(), strict=True)
        ]
        return Side(
            ids=ids,
            lengths=torch.full((len(ids),), ids.shape[1]),
            spans=torch.tensor(spans, dtype=torch.int64).view(-1, 4),
            sample=sample,
            number=column,
        )


def _run(column: Tensor) -> tuple[int, int]:
    """Return the half-open run of a column, (0, 0) of an empty one; a gap is an error."""
    place = column.nonzero().flatten()
    if not len(place):
        return 0, 0
    start, end = int(place[0]), int(place[-1]) + 1
    if end - start != len(place):
        raise ValueError(f"a chunk has a gap: {place.tolist()}")
    return start, end
