"""A microbatch in a teacher's own tokens, and which stretches of both texts are the same bytes.

A *chunk* pairs a run of student tokens with a run of teacher tokens that spell the same bytes and cannot be
cut further (spec section 4.1; made by `text.align`, stored by `data.prepare`). Chunks of a sample are in
order and do not overlap, on either side. Where both tokenizers agree, a chunk is one token on each side, so
that position pairs over two templates of one vocabulary are chunks too.

Left out: the reference's [samples, length, chunks] matrices; spans say the same in a thousandth of the
memory.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
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

    def to(self, device: torch.device) -> Side:
        """Return the side on a device."""
        values = {field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)}
        moved = Side(**values)
        object.__setattr__(moved, "host_lengths", self.host_lengths)
        return moved

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


def mask_whole_chunks(masked: Tensor, maskable: Tensor, sides: list[Side]) -> Tensor:
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
