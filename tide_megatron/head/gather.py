"""How masked rows reach the ranks of a vocabulary group: described once a step, gathered once a microbatch.

Gold ids, samples, noise levels and the links to every teacher are small integers: a rank packs those of all
its microbatches into one vector, and one exchange brings the vectors of all ranks to each. The description of
a vector (`row_sizes`) has the same length on every rank and travels in the step's one count collective, so
that whoever receives it knows its shape without asking the device. Noise levels travel as their bits. A rank
then joins the rows of all ranks into those of one larger microbatch. Hidden states follow microbatch by
microbatch (`head.loss`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.diffusion.alignment import RowAlignment
from tide_megatron.losses.rows import Rows
from tide_megatron.parallel.exchange import gather_parts
from tide_megatron.parallel.vocab_group import VocabGroup

_LINK_SIZES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatheredRows:
    """One microbatch's masked rows of a whole vocabulary group."""

    rows: Rows
    """Of all ranks behind each other."""
    sizes: Sequence[int]
    """Rows of each rank."""
    own: slice
    """This rank's samples in `rows`."""
    counts: Mapping[str, float]
    """Divisor of each loss, summed over all ranks and microbatches of the step."""

    @staticmethod
    def alone(rows: Rows, counts: Mapping[str, float]) -> GatheredRows:
        """Describe rows that no other rank shares."""
        return GatheredRows(rows=rows, sizes=(len(rows.gold),), own=slice(0, len(rows.time)), counts=counts)

    def is_own(self, sample: Tensor) -> Tensor:
        """Say of each sample number whether it is this rank's, [same shape] bool."""
        start, stop = int(self.own.start), int(self.own.stop)
        return (sample >= start) & (sample < stop)


def gather_microbatches(
    mine: Sequence[Rows],
    sizes: Sequence[Sequence[Sequence[int]]],
    counts: Mapping[str, float],
    group: VocabGroup,
) -> Iterator[GatheredRows]:
    """Yield the rows of the vocabulary group, microbatch by microbatch. All its ranks call it together.

    Args:
        mine: this rank's rows by microbatch; all have links of the same teachers.
        sizes: [group rank][microbatch] as `row_sizes` has them.
        counts: divisor of each loss.
        group: the vocabulary group.
    """
    if group.group is None:
        yield from (GatheredRows.alone(rows, counts) for rows in mine)
        return
    names = sorted(mine[0].links)
    lengths = [[num_packed(numbers, names) for numbers in rank] for rank in sizes]
    packed = torch.cat([pack_rows(rows) for rows in mine])
    whole = gather_parts(packed, [sum(rank) for rank in lengths], group.group, "rows")
    by_rank = [
        torch.split(part, of)
        for part, of in zip(torch.split(whole, [sum(rank) for rank in lengths]), lengths, strict=True)
    ]
    for microbatch in range(len(mine)):
        parts = [
            unpack_rows(rank[microbatch], numbers[microbatch], names)
            for rank, numbers in zip(by_rank, sizes, strict=True)
        ]
        yield GatheredRows(
            rows=join_rows(parts),
            sizes=[len(part.gold) for part in parts],
            own=group.own([len(part.time) for part in parts]),
            counts=counts,
        )


def row_sizes(rows: Rows) -> list[int]:
    """Describe how rows are packed: their number, the samples', and six numbers a link, in order of names."""
    sizes = [len(rows.gold), len(rows.time)]
    for name in sorted(rows.links):
        link = rows.links[name]
        sizes += [len(link.gold), link.num_chunks, len(link.student_rows[0]), len(link.teacher_rows[0])]
        sizes += [link.num_pairs, int(link.pairs is not None)]
    return sizes


def num_packed(sizes: Sequence[int], names: Sequence[str]) -> int:
    """Return the length of the vector of `pack_rows` from the numbers of `row_sizes`."""
    return sum(_lengths(sizes, names))


def pack_rows(rows: Rows) -> Tensor:
    """Put rows into one vector, [numbers] int64."""
    parts = [rows.gold, rows.sample, rows.time.view(torch.int32).long(), rows.maskable]
    for name in sorted(rows.links):
        link = rows.links[name]
        parts += [link.gold, link.chunk_sample, *link.student_rows, *link.teacher_rows, link.pair_sample]
        parts += [*(link.pairs or ())]
    return torch.cat(parts)


def unpack_rows(packed: Tensor, sizes: Sequence[int], names: Sequence[str]) -> Rows:
    """Rebuild rows from their vector and its description; the reverse of `pack_rows`.

    Args:
        packed: [numbers] int64.
        sizes: what `row_sizes` said of them.
        names: the teachers it was asked about.
    """
    lengths = _lengths(sizes, names)
    assert len(packed) == sum(lengths), f"{len(packed)} numbers where {sum(lengths)} were announced"
    gold, sample, time, maskable, *rest = torch.split(packed, lengths)
    parts = iter(rest)
    links = {}
    for index, name in enumerate(sorted(names)):
        has_pairs = sizes[_first(index) + 5]
        links[name] = RowAlignment(
            gold=next(parts),
            chunk_sample=next(parts),
            student_rows=(next(parts), next(parts)),
            teacher_rows=(next(parts), next(parts)),
            pair_sample=next(parts),
            pairs=(next(parts), next(parts)) if has_pairs else None,
        )
    levels = time.to(torch.int32).view(torch.float32)
    return Rows(gold=gold, sample=sample, time=levels, maskable=maskable, links=links)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Make the rows of several ranks those of one microbatch: samples, rows and chunks behind each other.

    Every teacher's rows must be joined in the same order. A teacher without an entry in `links` stays
    without one.

    Args:
        parts: in the order of ranks; all have links of the same teachers.
    """
    names = {name: None for part in parts for name in part.links}
    assert all(part.links.keys() == names.keys() for part in parts), "ranks have links of different teachers"
    rows = _before([len(part.gold) for part in parts])
    samples = _before([len(part.time) for part in parts])
    return Rows(
        gold=torch.cat([part.gold for part in parts]),
        sample=_moved([part.sample for part in parts], samples),
        time=torch.cat([part.time for part in parts]),
        maskable=torch.cat([part.maskable for part in parts]),
        links={name: _join_links([part.links[name] for part in parts], rows, samples) for name in names},
    )


def _join_links(links: Sequence[RowAlignment], rows: Sequence[int], samples: Sequence[int]) -> RowAlignment:
    """Join one teacher's links, given how many student rows and samples stand before each."""
    answers = _before([len(link.gold) for link in links])
    chunks = _before([link.num_chunks for link in links])
    pairs = None
    if any(link.pairs is not None for link in links):
        mine, theirs = zip(*(_explicit(link) for link in links), strict=True)
        pairs = (_moved(mine, rows), _moved(theirs, answers))
    return RowAlignment(
        gold=torch.cat([link.gold for link in links]),
        chunk_sample=_moved([link.chunk_sample for link in links], samples),
        student_rows=(
            _moved([link.student_rows[0] for link in links], rows),
            _moved([link.student_rows[1] for link in links], chunks),
        ),
        teacher_rows=(
            _moved([link.teacher_rows[0] for link in links], answers),
            _moved([link.teacher_rows[1] for link in links], chunks),
        ),
        pairs=pairs,
        pair_sample=_moved([link.pair_sample for link in links], samples),
    )


def _explicit(link: RowAlignment) -> tuple[Tensor, Tensor]:
    """Return a link's pairs, also where they are all rows in order."""
    if link.pairs is not None:
        return link.pairs
    row = torch.arange(link.num_pairs, device=link.gold.device)
    return row, row


def _lengths(sizes: Sequence[int], names: Sequence[str]) -> list[int]:
    """Return the length of every tensor in a vector, in its order."""
    assert len(sizes) == _first(len(names)), f"{len(sizes)} sizes for links of {sorted(names)}"
    lengths = [sizes[0], sizes[0], sizes[1], sizes[1]]
    for index in range(len(names)):
        gold, chunks, mine, theirs, pairs, has_pairs = sizes[_first(index) : _first(index + 1)]
        lengths += [gold, chunks, mine, mine, theirs, theirs, pairs, *([pairs, pairs] if has_pairs else [])]
    return lengths


def _first(index: int) -> int:
    """Return where the numbers of a link begin in `row_sizes`."""
    return 2 + index * _LINK_SIZES


def _before(lengths: Sequence[int]) -> list[int]:
    """Return how much stands before each part."""
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _moved(parts: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
    """Join numbers that count from each part's own beginning."""
    return torch.cat([part + offset for part, offset in zip(parts, offsets, strict=True)])
