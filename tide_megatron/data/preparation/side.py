"""A teacher's side of samples: its own tokens of the same conversations, and the chunks of learnt replies.

Truncation never leaves half a chunk: a chunk counts only if all of its tokens on both sides are inside their
windows, and a side that is cut ends where its last whole chunk does, so that the teacher is not shown text
that the student's window no longer has (spec section 4.1).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from tide_megatron.data.columns import CUT_COLUMN
from tide_megatron.text.align import Alignment, Numbers, align, starts_of
from tide_megatron.text.chat import Encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideRow:
    """What one sample has on a side."""

    row: dict[str, NDArray[numpy.int32]]
    """Of `SIDE_COLUMNS`."""
    counts: collections.Counter[str]


def side_rows(students: Sequence[Encoded], teachers: Sequence[Encoded], limit: int) -> list[SideRow]:
    """Return the columns of one side.

    Args:
        students: samples in the student's tokens, cut to its window.
        teachers: the same in the teacher's, uncut.
        limit: most tokens that a sample may have on this side.
    """
    found = align(students, teachers)
    inside = _chosen(found, found.spans[:, 3] <= limit)
    ends = _cut_ends(students, teachers, inside, limit)
    learnt = _chosen(inside, _is_learnt(inside, students))
    ids = numpy.fromiter(itertools.chain.from_iterable(teacher.ids for teacher in teachers), numpy.int32)
    first = starts_of(_sizes(teachers))
    pairs, aligned = _pairs(learnt, students, ids, first), _aligned_bytes(learnt, students)
    bounds = learnt.conversation.searchsorted(numpy.arange(len(students) + 1)).tolist()
    chunks = learnt.spans.astype(numpy.int32).ravel()
    return [
        SideRow(
            row={
                "ids": ids[start : start + end],
                "replies": numpy.array(_cut_ranges(teacher.replies, end), dtype=numpy.int32),
                CUT_COLUMN: numpy.array([end < len(teacher.ids)], dtype=numpy.int32),
                "chunks": chunks[4 * low : 4 * high],
            },
            counts=collections.Counter(
                tokens=end,
                chunks=high - low,
                pairs=num_pairs,
                aligned_bytes=num_bytes,
                cut=int(end < len(teacher.ids)),
                without_chunks=int(low == high),
            ),
        )
        for teacher, start, end, (low, high), num_pairs, num_bytes in zip(
            teachers, first.tolist(), ends, itertools.pairwise(bounds), pairs, aligned, strict=True
        )
    ]


def _chosen(alignment: Alignment, which: NDArray[numpy.bool_]) -> Alignment:
    if which.all():
        return alignment
    return Alignment(spans=alignment.spans[which], conversation=alignment.conversation[which])


def _cut_ends(
    students: Sequence[Encoded], teachers: Sequence[Encoded], inside: Alignment, limit: int
) -> list[int]:
    """Return how many tokens of each sample the side keeps."""
    last = numpy.zeros(len(teachers), dtype=numpy.int64)
    numpy.maximum.at(last, inside.conversation, inside.spans[:, 3])
    return [
        (behind or min(len(teacher.ids), limit))
        if len(student.ids) < student.uncut_tokens or len(teacher.ids) > limit
        else len(teacher.ids)
        for student, teacher, behind in zip(students, teachers, last.tolist(), strict=True)
    ]


def _is_learnt(chunks: Alignment, students: Sequence[Encoded]) -> NDArray[numpy.bool_]:
    """Say of each chunk whether its student tokens are of one reply."""
    base = starts_of(_sizes(students) + 1)
    counts = [len(student.replies) for student in students]
    flat = numpy.fromiter(itertools.chain.from_iterable(student.replies for student in students), numpy.int64)
    ranges = (flat + numpy.repeat(base, counts)).reshape(-1, 2)
    start, end = (chunks.spans[:, :2] + base[chunks.conversation][:, None]).T
    reply = ranges[:, 0].searchsorted(start, "right") - 1
    found: NDArray[numpy.bool_] = (reply >= 0) & (end <= ranges[reply, 1])
    return found


def _pairs(
    chunks: Alignment, students: Sequence[Encoded], ids: NDArray[numpy.int32], first: Numbers
) -> list[int]:
    """Count, of each sample, the chunks of one token of the same id on both sides."""
    is_single = numpy.all(chunks.spans[:, 1::2] - chunks.spans[:, ::2] == 1, axis=1)
    single = _chosen(chunks, is_single)
    own = numpy.fromiter(itertools.chain.from_iterable(student.ids for student in students), numpy.int32)
    mine = own[starts_of(_sizes(students))[single.conversation] + single.spans[:, 0]]
    theirs = ids[first[single.conversation] + single.spans[:, 2]]
    counts = numpy.bincount(single.conversation[mine == theirs], minlength=len(students))
    return [int(number) for number in counts]


def _aligned_bytes(chunks: Alignment, students: Sequence[Encoded]) -> list[int]:
    """Count, of each sample, the bytes inside chunks."""
    ends = numpy.concatenate([student.ends for student in students] or [numpy.empty(0, numpy.int64)])
    first = starts_of(_sizes(students))[chunks.conversation]
    start, end = chunks.spans[:, 0], chunks.spans[:, 1]
    begin = numpy.where(start == 0, 0, ends[first + start - 1])
    counted = numpy.bincount(chunks.conversation, ends[first + end - 1] - begin, len(students))
    return [int(number) for number in counted]


def _sizes(chats: Sequence[Encoded]) -> Numbers:
    return numpy.array([len(chat.ids) for chat in chats], dtype=numpy.int64)


def _cut_ranges(ranges: Sequence[int], end: int) -> list[int]:
    """Cut flat ranges (start, end, start, ...) at `end`; what is behind it goes, but the first stays."""
    kept = max(1, sum(start < end for start in ranges[::2]))
    return [min(place, end) for place in ranges[: 2 * kept]]
