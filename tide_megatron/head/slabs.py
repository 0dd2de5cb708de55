"""Which rows are worked on together: slabs, as large as the byte budget allows, cut between units only.

A *unit* is what a loss may not split: the rows of chunks that a loss over likelihoods compares, joined over
all teachers' chunks, or a single row. Everything of a slab, statistics, values and gradients, is finished
before the next one starts, so memory does not grow with the rows. A unit that is longer than a slab stands
alone and is worked on in two phases (`fused`).

All ranks of a vocabulary group make the same slabs: they know the same rows, and the budget is divided by the
widest range of ids that any of them owns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.alignment import RowAlignment
from tide_megatron.losses.rows import Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slab:
    """Some rows of a microbatch, described as if there were no others."""

    start: int
    stop: int
    """The student's rows."""
    rows: Rows
    """What losses may know of them; numbers count from the slab's first row, samples keep theirs."""
    theirs: Mapping[str, Tensor]
    """Teacher with rows of its own -> [its rows in the slab] int64: which of its rows they are. Those of
    teachers without an entry are the student's."""
    is_long: bool = False
    """One unit, longer than a slab may be."""

    def gold(self, teacher: str | None) -> Tensor:
        """Return the gold ids of one model's rows in this slab; None is the student."""
        return self.rows.gold if teacher is None else self.rows.link(teacher).gold

    def teacher_rows(self, teacher: str, hidden: Tensor) -> Tensor:
        """Return a teacher's hidden rows in this slab."""
        chosen = self.theirs.get(teacher)
        return hidden[self.start : self.stop] if chosen is None else hidden[chosen]


def rows_within(budget_bytes: int, row_bytes: int, fixed_bytes: int) -> int:
    """Return how many rows a slab may have.

    Args:
        budget_bytes: for everything a slab holds beside hidden rows and gradients of the size of the weights.
        row_bytes: of the logits of one row, all models together.
        fixed_bytes: of what does not depend on the rows.

    Raises:
        ConfigError: when not even one row fits.
    """
    most = (budget_bytes - fixed_bytes) // row_bytes
    if most < 1:
        needed = -(-(fixed_bytes + row_bytes) // 2**20)
        raise ConfigError(
            f"head.budget_mib: {budget_bytes / 2**20:g} MiB do not hold the logits of a single row here; "
            f"use at least {needed}, or more head.ranks"
        )
    return most


def make_slabs(rows: Rows, chunked: Iterable[str], most_rows: int) -> list[Slab]:
    """Cut a microbatch's rows into slabs; waits for the device unless everything fits into one.

    Args:
        rows: of a vocabulary group.
        chunked: teachers whose chunks some loss over likelihoods compares.
        most_rows: of a slab.
    """
    number = len(rows.gold)
    if number <= most_rows:
        whole = {
            name: torch.arange(len(link.gold), device=rows.gold.device) for name, link in rows.links.items()
        }
        return [Slab(start=0, stop=number, rows=rows, theirs=whole)] if number else []
    splits = _splits(rows, [rows.links[name] for name in sorted(chunked) if name in rows.links])
    slabs, start = [], 0
    while start < number:
        left = number - start
        even = -(-left // -(-left // most_rows))  # no small last one, which would cost as much as a full one
        stop = _furthest(splits, start, start + even)
        if stop - start > most_rows:
            stop = _furthest(splits, start, start + most_rows)
        slabs.append(restrict(rows, start, stop, is_long=stop - start > most_rows))
        start = stop
    return slabs


def single_rows(slab: Slab, most_rows: int) -> list[Slab]:
    """Cut a long unit anywhere, for what needs no chunk whole."""
    return [
        dataclasses.replace(part, start=slab.start + part.start, stop=slab.start + part.stop, theirs=theirs)
        for start in range(0, slab.stop - slab.start, most_rows)
        for part in [restrict(slab.rows, start, min(start + most_rows, slab.stop - slab.start))]
        for theirs in [{name: slab.theirs[name][chosen] for name, chosen in part.theirs.items()}]
    ]


def _splits(rows: Rows, links: Sequence[RowAlignment]) -> list[bool]:
    """Say for 0 .. rows whether a slab may end before that row: no chunk reaches over it."""
    number = len(rows.gold)
    reach = torch.zeros(number + 1, dtype=torch.int64, device=rows.gold.device)
    for link in links:
        row, chunk = link.student_rows
        first = torch.full((link.num_chunks,), number, device=row.device).scatter_reduce(
            0, chunk, row, "amin"
        )
        last = torch.full((link.num_chunks,), -1, device=row.device).scatter_reduce(0, chunk, row, "amax")
        seen = last >= 0
        ones = torch.ones_like(first[seen])
        reach.scatter_add_(0, first[seen] + 1, ones)  # forbidden before the rows behind its first one ...
        reach.scatter_add_(0, last[seen] + 1, -ones)  # ... up to its last
    return (reach.cumsum(0) == 0).tolist()


def _furthest(splits: Sequence[bool], start: int, wanted: int) -> int:
    """Return the last place up to `wanted` where a slab may end, or the first one behind it."""
    number = len(splits) - 1
    for place in range(min(wanted, number), start, -1):
        if splits[place]:
            return place
    return next(place for place in range(min(wanted, number), number + 1) if splits[place])


def restrict(rows: Rows, start: int, stop: int, *, is_long: bool = False) -> Slab:
    """Describe a range of rows alone; a chunk that reaches out of it loses its members there."""
    links, theirs = {}, {}
    for name, link in rows.links.items():
        links[name], theirs[name] = _restrict_link(link, start, stop)
    part = dataclasses.replace(rows, gold=rows.gold[start:stop], sample=rows.sample[start:stop], links=links)
    return Slab(start=start, stop=stop, rows=part, theirs=theirs, is_long=is_long)


def _restrict_link(link: RowAlignment, start: int, stop: int) -> tuple[RowAlignment, Tensor]:
    """Return a link between the student rows of a range and the teacher rows they need, and those."""
    row, chunk = link.student_rows
    is_here = (row >= start) & (row < stop)
    kept = torch.zeros(link.num_chunks, dtype=torch.bool, device=row.device)
    kept[chunk[is_here]] = True
    number = kept.long().cumsum(0) - 1  # a chunk's number among those kept
    their_row, their_chunk = link.teacher_rows
    theirs_here = kept[their_chunk]
    needed = torch.zeros(len(link.gold), dtype=torch.bool, device=row.device)
    needed[their_row[theirs_here]] = True
    every = torch.arange(link.num_pairs, device=row.device)
    mine, theirs = link.pairs or (every, every)
    pair_here = (mine >= start) & (mine < stop)
    needed[theirs[pair_here]] = True
    place = needed.long().cumsum(0) - 1  # a teacher row's number among those needed
    restricted = RowAlignment(
        gold=link.gold[needed],
        chunk_sample=link.chunk_sample[kept],
        student_rows=(row[is_here] - start, number[chunk[is_here]]),
        teacher_rows=(place[their_row[theirs_here]], number[their_chunk[theirs_here]]),
        pairs=(mine[pair_here] - start, place[theirs[pair_here]]),
        pair_sample=link.pair_sample[pair_here],
    )
    return restricted, needed.nonzero().squeeze(1)
