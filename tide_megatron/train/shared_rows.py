"""The student's rows in its head group: described to all ranks once a step, gathered once a microbatch.

Gold ids, samples, noise levels and the links to every teacher are small integers; those of all microbatches
of a step travel in one packed exchange. Hidden states follow microbatch by microbatch, with their gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from tide_megatron.head.cut import Cut
from tide_megatron.head.parts import HeadInput
from tide_megatron.losses.rows import Rows
from tide_megatron.losses.transport import join_rows, num_packed, pack_rows, unpack_rows
from tide_megatron.parallel.exchange import gather_parts, gather_rows
from tide_megatron.parallel.groups import HeadGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRows:
    """One microbatch's hidden rows of a whole head group."""

    rows: Rows
    """Of all places behind each other."""
    sizes: Sequence[int]
    """Rows of each place."""
    own: tuple[int, int]
    """First and last-plus-one of this rank's samples in `rows`."""


def share_rows(
    mine: Sequence[Rows], sizes: Sequence[Sequence[Sequence[int]]], links: Sequence[str], head: HeadGroup
) -> Iterator[SharedRows]:
    """Yield the rows of the head group, microbatch by microbatch. All its ranks call it together.

    Args:
        mine: this rank's rows by microbatch.
        sizes: [place][microbatch] as `row_sizes` has them.
        links: names of the teachers with their own tokens, sorted.
        head: the head group.
    """
    if head.group is None:
        for rows in mine:
            yield SharedRows(rows=rows, sizes=(len(rows.gold),), own=(0, len(rows.time)))
        return
    lengths = [[num_packed(numbers, links) for numbers in place] for place in sizes]
    packed = torch.cat([pack_rows(rows) for rows in mine])
    whole = gather_parts(packed, [sum(place) for place in lengths], head.group, "rows")
    by_place = [
        torch.split(part, of)
        for part, of in zip(torch.split(whole, [sum(place) for place in lengths]), lengths, strict=True)
    ]
    for microbatch in range(len(mine)):
        parts = [
            unpack_rows(place[microbatch], numbers[microbatch], links)
            for place, numbers in zip(by_place, sizes, strict=True)
        ]
        own = head.own([len(part.time) for part in parts])
        yield SharedRows(
            rows=join_rows(parts),
            sizes=[len(part.gold) for part in parts],
            own=(own.start, own.stop),
        )


def share_student(student: HeadInput, sizes: Sequence[int], cut: Cut, head: HeadGroup) -> HeadInput:
    """Gather the student's hidden rows and keep this rank's columns of its head, both with gradient.

    All ranks of the head group call it together.

    Args:
        student: this rank's rows and the whole head [vocabulary, hidden].
        sizes: rows of every place.
        cut: who owns which ids.
        head: the head group.
    """
    if head.group is None:
        return student
    start, stop = cut.columns(len(student.weight))
    return HeadInput(
        hidden=gather_rows(student.hidden, sizes, head.group),
        weight=student.weight[start:stop],
        start=start,
        vocabulary=len(student.weight),
        gradient=None if student.gradient is None else student.gradient[start:stop],
    )
