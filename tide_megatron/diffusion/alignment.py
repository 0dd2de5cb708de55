"""A teacher with its own tokens: which stretches of both texts are the same bytes, and how rows pair.

A *chunk* pairs a run of student tokens with a run of teacher tokens that spell the same bytes and cannot be
cut further (spec section 4.1; made by `text.align`, stored by `data.preparation`). Chunks of a sample are in
order and do not overlap, on either side. Where both tokenizers agree, a chunk is one token on each side, so
that position pairs over two templates of one vocabulary are chunks too.

A teacher that shares the student's tokens reads them, and row i of its answer is row i of the student. A
teacher with its own tokens (`TeacherTokens`) masks every chunk that the student's masking touches, and is
asked about the chunks whose student tokens are ALL masked: only there do both models predict the same bytes.
Hence no chunk that reaches into a prompt, or that masking left half shown, enters a loss (spec section 4.1).

Left out: the reference's [samples, length, chunks] matrices; spans say the same in a thousandth of the
memory.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherTokens:
    """One teacher's copy of a microbatch, right-padded to its own length."""

    ids: Tensor
    """[samples, length] int64: teacher tokens; its length is not the student's."""
    lengths: Tensor
    """[samples] int64 real tokens."""
    spans: Tensor
    """[chunks, 4] int64: student start and end, teacher start and end, half-open; ordered by sample."""
    sample: Tensor
    """[chunks] int64: index of the chunk's sample in the microbatch."""
    number: Tensor
    """[chunks] int64: the chunk's number within its sample, which keys its noise."""

    @functools.cached_property
    def host_lengths(self) -> tuple[int, ...]:
        """`lengths` as plain numbers; a side that was moved brings them along, so no device is asked."""
        return tuple(self.lengths.tolist())

    def to(self, device: torch.device) -> TeacherTokens:
        """Return the side on a device."""
        values = {field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)}
        moved = TeacherTokens(**values)
        object.__setattr__(moved, "host_lengths", self.host_lengths)
        return moved

    def chosen(self, samples: Tensor) -> TeacherTokens:
        """Return some of the samples; [chosen] int64 indices, ascending."""
        number = torch.full_like(self.lengths, -1)
        number[samples] = torch.arange(len(samples), device=samples.device)
        sample = number[self.sample]
        kept = sample >= 0
        return TeacherTokens(
            ids=self.ids[samples],
            lengths=self.lengths[samples],
            spans=self.spans[kept],
            sample=sample[kept],
            number=self.number[kept],
        )

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole microbatch."""
        return len(self.spans)

    def students(self) -> tuple[Tensor, Tensor, Tensor]:
        """List the student tokens of all chunks: ([members] chunk, sample, position), chunks ascending."""
        return self._members(0)

    def teachers(self) -> tuple[Tensor, Tensor, Tensor]:
        """List the teacher tokens of all chunks: ([members] chunk, sample, position), chunks ascending."""
        return self._members(2)

    def _members(self, column: int) -> tuple[Tensor, Tensor, Tensor]:
        start = self.spans[:, column]
        sizes = self.spans[:, column + 1] - start
        chunk = torch.repeat_interleave(sizes)
        place = torch.arange(len(chunk), device=chunk.device) - (sizes.cumsum(0) - sizes)[chunk]
        return chunk, self.sample[chunk], start[chunk] + place

    def masked_members(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Count each chunk's masked student tokens.

        Args:
            masked: [samples, student length] bool.

        Returns:
            ([chunks] masked tokens, [chunks] all tokens), int64.
        """
        chunk, sample, position = self.students()
        counts = torch.zeros(self.num_chunks, dtype=torch.int64, device=masked.device)
        return counts.index_add(0, chunk, masked[sample, position].long()), self.spans[:, 1] - self.spans[
            :, 0
        ]


def mask_whole_chunks(masked: Tensor, maskable: Tensor, sides: list[TeacherTokens]) -> Tensor:
    """Widen a masked set until no chunk of any side is masked in part (spec section 4.1, "in the step").

    Tokens that may not be masked stay visible, so a chunk that reaches into the prompt stays half shown (no
    loss uses it). With several sides the widening is repeated until nothing changes: what one teacher's chunk
    masks may touch another's (design section 4).

    Args:
        masked: [samples, length] bool, what was drawn.
        maskable: [samples, length] bool, what may be masked.
        sides: every side whose chunks must be closed.

    Returns:
        [samples, length] bool, a superset of `masked`.
    """
    while True:
        wider = masked.clone()
        for side in sides:
            chunk, sample, position = side.students()
            touched = side.masked_members(wider)[0] > 0
            wider[sample, position] |= touched[chunk] & maskable[sample, position]
        if len(sides) == 1 or torch.equal(wider, masked):
            return wider
        masked = wider


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherInput:
    """One teacher's copy of a noised microbatch, before it becomes a view."""

    ids: Tensor
    """[samples, length] int64 clean tokens of this teacher."""
    lengths: Tensor
    """[samples] int64 real tokens."""
    masked: Tensor
    """[samples, length] bool: positions this teacher must not see."""
    targets: Tensor
    """[samples, length] bool: positions whose hidden states are wanted, a subset of `masked`."""
    index: tuple[Tensor, Tensor]
    """([rows], [rows]) int64: sample and position of the targets, in (sample, position) order."""
    host_lengths: tuple[int, ...]
    """`lengths` as plain numbers."""
    unit: Tensor
    """[samples, length] int64: what a position's complementary draw is keyed by, its own number or its
    chunk's; positions of one chunk share a draw. Meaningless where nothing is masked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowAlignment:
    """Which rows of student and teacher belong together in one microbatch."""

    gold: Tensor
    """[teacher rows] int64: the teacher token each of its rows must predict."""
    chunk_sample: Tensor
    """[chunks] int64: sample of each chunk that enters a loss."""
    student_rows: tuple[Tensor, Tensor]
    """([members] row, [members] chunk) int64: the student rows of those chunks; chunks ascend."""
    teacher_rows: tuple[Tensor, Tensor]
    """([members] row, [members] chunk) int64: the teacher rows of those chunks; chunks ascend."""
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

    def within(self, samples: Tensor, rows: Tensor) -> RowAlignment:
        """Return how the teacher's rows join those of a larger microbatch, of which this is a part.

        Args:
            samples: [samples] int64: which samples of that these are.
            rows: [student rows] int64: which of its rows these are.
        """
        if self.pairs is None:
            pairs = rows, torch.arange(len(rows), device=rows.device)
        else:
            pairs = rows[self.pairs[0]], self.pairs[1]
        return dataclasses.replace(
            self,
            chunk_sample=samples[self.chunk_sample],
            student_rows=(rows[self.student_rows[0]], self.student_rows[1]),
            pairs=pairs,
            pair_sample=samples[self.pair_sample],
        )


def same_rows(gold: Tensor, sample: Tensor) -> RowAlignment:
    """Join a teacher that reads the student's own tokens: every row is a pair and a chunk of its own.

    Args:
        gold: [rows] int64 student tokens.
        sample: [rows] int64 sample of each row.
    """
    row = torch.arange(len(gold), device=gold.device)
    return RowAlignment(
        gold=gold,
        chunk_sample=sample,
        student_rows=(row, row),
        teacher_rows=(row, row),
        pairs=None,
        pair_sample=sample,
    )


def read_side(side: TeacherTokens, drawn: Tensor) -> TeacherInput:
    """Mask a teacher's own tokens after the student's.

    Args:
        side: the microbatch in the teacher's tokens.
        drawn: [samples, student length] bool: what the student must not see.
    """
    counts, sizes = side.masked_members(drawn)
    chunk, sample, position = side.teachers()
    shape = side.ids.shape
    masked = torch.zeros(shape, dtype=torch.bool, device=drawn.device)
    targets, unit = masked.clone(), torch.zeros(shape, dtype=torch.int64, device=drawn.device)
    masked[sample, position] = (counts > 0)[chunk]
    targets[sample, position] = (counts == sizes)[chunk]
    unit[sample, position] = side.number[chunk]
    rows, columns = targets.nonzero(as_tuple=True)
    return TeacherInput(
        ids=side.ids,
        lengths=side.lengths,
        masked=masked,
        targets=targets,
        index=(rows, columns),
        host_lengths=side.host_lengths,
        unit=unit,
    )


def link_side(side: TeacherTokens, ids: Tensor, masked: Tensor, targets: Tensor) -> RowAlignment:
    """Join the student's rows with those of a teacher that has its own tokens.

    Args:
        side: the microbatch in the teacher's tokens.
        ids: [samples, student length] int64.
        masked: [samples, student length] bool: the student's rows, in (sample, position) order.
        targets: [samples, teacher length] bool: the teacher's rows, in that order.
    """
    counts, sizes = side.masked_members(masked)
    active = counts == sizes
    renumbered = active.long().cumsum(0) - 1  # a chunk's number among the active ones
    mine, theirs = _row_numbers(masked), _row_numbers(targets)
    members = []
    for (chunk, sample, position), row in ((side.students(), mine), (side.teachers(), theirs)):
        kept = active[chunk]
        members.append((row[sample[kept], position[kept]], renumbered[chunk[kept]]))
    single = active & (sizes == 1) & (side.spans[:, 3] - side.spans[:, 2] == 1)
    sample, (start, _, teacher_start, _) = side.sample[single], side.spans[single].unbind(1)
    same = ids[sample, start] == side.ids[sample, teacher_start]
    return RowAlignment(
        gold=side.ids[targets],
        chunk_sample=side.sample[active],
        student_rows=members[0],
        teacher_rows=members[1],
        pairs=(mine[sample, start][same], theirs[sample, teacher_start][same]),
        pair_sample=sample[same],
    )


def _row_numbers(chosen: Tensor) -> Tensor:
    """Return which row each chosen position is, [samples, length]; meaningless elsewhere."""
    return (chosen.flatten().long().cumsum(0) - 1).view(chosen.shape)
