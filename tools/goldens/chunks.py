"""Chunks as the reference has them: its matrices, and tokenkit's rule with and without bug 3 (spec, 9).

Where two template tables know different pieces, tokenkit's replacements fire on ordinary tokens and its count
of bytes restarts. `replaced` carries that out as the spec describes it; without tables it is the byte rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from goldens.row import Golden

QWEN_PIECES = frozenset({b"\n", b"system", b"user", b"assistant"})
"""Ordinary tokens that a Qwen table takes for pieces of its template (spec section 4.1)."""
KINDS = {"GPT2": frozenset[bytes](), "Qwen2": QWEN_PIECES, "Qwen3": QWEN_PIECES}
REPLACED = "bug 3: a template table takes content tokens for template pieces and restarts its count"

Chunks = list[list[int]]
"""[teacher start, teacher end, student start, student end] of each chunk, as the reference orders them."""
Kinds = tuple[str, str]
"""The template tables of teacher and student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrices:
    """Which tokens of both sides belong to which column; a column is one run of tokens, or padding."""

    student: Tensor
    """[samples, student length, columns] bool."""
    teacher: Tensor
    """[samples, teacher length, columns] bool."""

    @classmethod
    def read(cls, golden: Golden, prefix: str) -> Matrices:
        """Read the two arrays of a file."""
        return cls(student=golden.read(f"{prefix}_student"), teacher=golden.read(f"{prefix}_teacher"))

    def places(self, sample: int) -> Chunks:
        """List the columns of one sample up to the last used; an empty side is 0, 0."""
        columns = range(self.student.shape[2])
        found = [
            [*_run(self.teacher[sample, :, column]), *_run(self.student[sample, :, column])]
            for column in columns
        ]
        while found and not any(found[-1]):
            found.pop()
        return found

    def spans(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns with student tokens: [chunks, 4] (student first), sample and column of each."""
        sample, column = self.student.any(dim=1).nonzero(as_tuple=True)
        places = [
            [*_run(self.student[s, :, c]), *_run(self.teacher[s, :, c])]
            for s, c in zip(sample.tolist(), column.tolist(), strict=True)
        ]
        return torch.tensor(places, dtype=torch.int64), sample, column


def _run(column: Tensor) -> tuple[int, int]:
    """Return the half-open run of a column, (0, 0) of an empty one; a gap is an error."""
    place = column.nonzero().flatten().tolist()
    if not place:
        return 0, 0
    if place[-1] + 1 - place[0] != len(place):
        raise ValueError(f"a chunk has a gap: {place}")
    return place[0], place[-1] + 1


def same_bytes(chunks: Chunks, teacher: Sequence[bytes], student: Sequence[bytes]) -> Chunks:
    """Keep the chunks whose sides spell the same; ours do wherever both texts are one content."""
    return [[a, b, c, d] for a, b, c, d in chunks if b"".join(teacher[a:b]) == b"".join(student[c:d])]


def even_spaces(teacher: Sequence[bytes], student: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Give both sides as many leading spaces as the richer one has: the texts may differ in them."""
    if not teacher or not student:
        return list(teacher), list(student)
    spaces = [len(text) - len(text.lstrip(b" ")) for text in (b"".join(teacher), b"".join(student))]
    missing = [max(spaces) - own for own in spaces]
    return (
        [b" " * missing[0] + teacher[0], *teacher[1:]],
        [b" " * missing[1] + student[0], *student[1:]],
    )


def blanked(sides: Sequence[list[bytes]], kinds: Kinds | None) -> list[list[bytes]]:
    """Empty the tokens that tokenkit replaces; its check compares what is left."""
    return [[b"" if _fires(piece, side, kinds) else piece for piece in row] for side, row in enumerate(sides)]


def _fires(piece: bytes, side: int, kinds: Kinds | None) -> bool:
    """Say whether a table replaces a token that the other table has no counterpart for."""
    return kinds is not None and piece in KINDS[kinds[side]] and piece not in KINDS[kinds[1 - side]]


def replaced(teacher: Sequence[bytes], student: Sequence[bytes], kinds: Kinds | None = None) -> Chunks:
    """Align as tokenkit does: a replaced token is passed over and leaves no count behind it.

    Args:
        teacher: bytes of each token.
        student: the same.
        kinds: None: no token is replaced, which is the byte rule.
    """
    sides = (teacher, student)
    place, start, count = [0, 0], [0, 0], [0, 0]
    chunks = []
    while place[0] < len(teacher) and place[1] < len(student):
        skipped = next((side for side in (0, 1) if _fires(sides[side][place[side]], side, kinds)), None)
        if skipped is not None:
            place[skipped], count[skipped] = place[skipped] + 1, 0
            continue
        reached = [count[side] + len(sides[side][place[side]]) for side in (0, 1)]
        for side in (0, 1):
            if reached[side] <= reached[1 - side]:
                place[side], count[side] = place[side] + 1, reached[side]
        if reached[0] == reached[1]:
            chunks.append([start[0], place[0], start[1], place[1]])
            start = list(place)
    return chunks
