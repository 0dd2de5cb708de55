"""What one teacher reads of a noised microbatch, and how its answer's rows join the student's.

A teacher that shares the student's tokens reads them, and row i of its answer is row i of the student. A
teacher with its own tokens (a `Side`) masks every chunk that the student's masking touches, and is asked
about the chunks whose student tokens are ALL masked: only there do both models predict the same bytes. Hence
no chunk that reaches into a prompt, or that masking left half shown, enters a loss (spec section 4.1).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.diffusion.side import Side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One teacher's copy of a noised microbatch, before it becomes a view."""

    ids: Tensor
    """[samples, length] int64 clean tokens of this teacher."""
    lengths: Tensor
    """[samples] int64 real tokens."""
    masked: Tensor
    """[samples, length] bool: positions this teacher must not see."""
    asked: Tensor
    """[samples, length] bool: positions whose hidden states are wanted, a subset of `masked`."""
    index: tuple[Tensor, Tensor]
    """([rows], [rows]) int64: sample and position of what is asked, in (sample, position) order."""
    host_lengths: tuple[int, ...]
    """`lengths` as plain numbers."""
    unit: Tensor
    """[samples, length] int64: what a position's complementary draw is keyed by, its own number or its
    chunk's; positions of one chunk share a draw. Meaningless where nothing is masked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """Which rows of student and teacher belong together in one microbatch."""

    gold: Tensor
    """[teacher rows] int64: the teacher token each of its rows must predict."""
    chunk_sample: Tensor
    """[chunks] int64: sample of each chunk that enters a loss."""
    student_rows: tuple[Tensor, Tensor]
    """([members] row, [members] chunk) int64: the student rows of those chunks."""
    teacher_rows: tuple[Tensor, Tensor]
    """([members] row, [members] chunk) int64: the teacher rows of those chunks."""
    pairs: tuple[Tensor, Tensor] | None
    """([pairs] student row, [pairs] teacher row) int64 where both predict the same single id; None: row i is
    row i, for all rows."""
    pair_sample: Tensor
    """[pairs] int64: sample of each pair."""

    @property
    def num_chunks(self) -> int:
        """Chunks that enter a loss."""
        return len(self.chunk_sample)

    @property
    def num_pairs(self) -> int:
        """Position pairs that enter a loss."""
        return len(self.pair_sample)


def same_rows(gold: Tensor, sample: Tensor) -> Link:
    """Join a teacher that reads the student's own tokens: every row is a pair and a chunk of its own.

    Args:
        gold: [rows] int64 student tokens.
        sample: [rows] int64 sample of each row.
    """
    row = torch.arange(len(gold), device=gold.device)
    return Link(
        gold=gold,
        chunk_sample=sample,
        student_rows=(row, row),
        teacher_rows=(row, row),
        pairs=None,
        pair_sample=sample,
    )


def read_side(side: Side, drawn: Tensor) -> Reading:
    """Hide a teacher's own tokens after the student's.

    Args:
        side: the microbatch in the teacher's tokens.
        drawn: [samples, student length] bool: what the student must not see.
    """
    counts, sizes = side.masked_members(drawn)
    chunk, sample, position = side.teachers()
    shape = side.ids.shape
    masked = torch.zeros(shape, dtype=torch.bool, device=drawn.device)
    asked, unit = masked.clone(), torch.zeros(shape, dtype=torch.int64, device=drawn.device)
    masked[sample, position] = (counts > 0)[chunk]
    asked[sample, position] = (counts == sizes)[chunk]
    unit[sample, position] = side.number[chunk]
    rows, columns = asked.nonzero(as_tuple=True)
    return Reading(
        ids=side.ids,
        lengths=side.lengths,
        masked=masked,
        asked=asked,
        index=(rows, columns),
        host_lengths=side.host_lengths,
        unit=unit,
    )


def link_side(side: Side, ids: Tensor, masked: Tensor, asked: Tensor) -> Link:
    """Join the student's rows with those of a teacher that has its own tokens.

    Args:
        side: the microbatch in the teacher's tokens.
        ids: [samples, student length] int64.
        masked: [samples, student length] bool: the student's rows, in (sample, position) order.
        asked: [samples, teacher length] bool: the teacher's rows, in that order.
    """
    counts, sizes = side.masked_members(masked)
    active = counts == sizes
    renumbered = active.long().cumsum(0) - 1  # a chunk's number among the active ones
    mine, theirs = _row_numbers(masked), _row_numbers(asked)
    members = []
    for (chunk, sample, position), row in ((side.students(), mine), (side.teachers(), theirs)):
        kept = active[chunk]
        members.append((row[sample[kept], position[kept]], renumbered[chunk[kept]]))
    single = active & (sizes == 1) & (side.spans[:, 3] - side.spans[:, 2] == 1)
    sample, (start, _, teacher_start, _) = side.sample[single], side.spans[single].unbind(1)
    same = ids[sample, start] == side.ids[sample, teacher_start]
    return Link(
        gold=side.ids[asked],
        chunk_sample=side.sample[active],
        student_rows=members[0],
        teacher_rows=members[1],
        pairs=(mine[sample, start][same], theirs[sample, teacher_start][same]),
        pair_sample=sample[same],
    )


def _row_numbers(chosen: Tensor) -> Tensor:
    """Return which row each chosen position is, [samples, length]; meaningless elsewhere."""
    return (chosen.flatten().long().cumsum(0) - 1).view(chosen.shape)
