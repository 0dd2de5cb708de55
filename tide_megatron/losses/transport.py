"""How `Rows` travel to the ranks of a head group: a vector of integers, described in a few numbers.

The description (`row_sizes`) has the same length on every rank and travels in the step's one count
collective, so that whoever receives a vector knows its shape without asking the device. Noise levels travel
as their bits. A rank then joins the rows of all seats into those of one larger microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.diffusion.link import Link
from tide_megatron.losses.rows import Rows

_LINK_SIZES = 6


def row_sizes(rows: Rows, names: Sequence[str]) -> list[int]:
    """Describe how rows are packed: their number, the samples', and six numbers a link.

    Args:
        rows: of one microbatch.
        names: the teachers that have an entry in `rows.links`, in any order.

    Returns:
        2 + 6 * names numbers, >= 0.
    """
    sizes = [len(rows.gold), len(rows.time)]
    assert set(names) == set(rows.links), f"links of {sorted(rows.links)}, asked about {sorted(names)}"
    for name in sorted(names):
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
        links[name] = Link(
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
    """Make the rows of several seats those of one microbatch: samples, rows and chunks behind each other.

    Every teacher's answer must be joined in the same order. A teacher without an entry in `links` stays
    without one.

    Args:
        parts: in the order of seats; all have links of the same teachers.
    """
    names = {name: None for part in parts for name in part.links}
    assert all(part.links.keys() == names.keys() for part in parts), "seats have links of different teachers"
    rows = _before([len(part.gold) for part in parts])
    samples = _before([len(part.time) for part in parts])
    return Rows(
        gold=torch.cat([part.gold for part in parts]),
        sample=_moved([part.sample for part in parts], samples),
        time=torch.cat([part.time for part in parts]),
        maskable=torch.cat([part.maskable for part in parts]),
        links={name: _join_links([part.links[name] for part in parts], rows, samples) for name in names},
    )


def _join_links(links: Sequence[Link], rows: Sequence[int], samples: Sequence[int]) -> Link:
    """Join one teacher's links, given how many student rows and samples stand before each."""
    answers = _before([len(link.gold) for link in links])
    chunks = _before([link.num_chunks for link in links])
    pairs = None
    if any(link.pairs is not None for link in links):
        mine, theirs = zip(*(_explicit(link) for link in links), strict=True)
        pairs = (_moved(mine, rows), _moved(theirs, answers))
    return Link(
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


def _explicit(link: Link) -> tuple[Tensor, Tensor]:
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
