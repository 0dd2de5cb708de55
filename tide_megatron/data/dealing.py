"""How an update's samples are shared out to data shards and microbatches: pure functions of their lengths.

Like stands beside like, so that few positions are pads. Microbatches have a number of samples, or as many as
a budget of positions has room for; then every shard has equally many of them, because ranks meet in each, and
models see few lengths: a length is rounded up to one of at most eight (`Rungs`), for which kernels are
compiled and memory is laid out once. Where several samples share a row (`diffusion.packing`), all rows are of
the longest, and microbatches are filled by tokens, long and short samples together.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from tide_megatron.diffusion.packing import Packs

RUNGS = 8
"""Lengths that a model sees at most."""
LONG, UNIT, SHORT_UNIT = 1024, 128, 16
"""Lengths are multiples of `UNIT` where the longest sample has `LONG` tokens, else of `SHORT_UNIT`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rungs:
    """The lengths that one model's samples are padded to, ascending."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, longest: int, block_size: int, fixed_length: int | None = None) -> Rungs:
        """Choose them: all multiples up to the longest, or steps of a constant ratio of about 1.4.

        Args:
            longest: tokens of the longest sample.
            block_size: they are whole blocks, too.
            fixed_length: the only one; None: as above.
        """
        if fixed_length is not None:
            return cls(lengths=(fixed_length,))
        unit = math.lcm(UNIT if longest >= LONG else SHORT_UNIT, block_size)
        units = -(-longest // unit)
        if units <= RUNGS:
            return cls(lengths=tuple(unit * number for number in range(1, units + 1)))
        steps = (math.ceil(units * 2.0 ** (-number / 2)) for number in range(RUNGS))
        return cls(lengths=tuple(sorted({unit * step for step in steps})))

    def above(self, tokens: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """Return, for each number of tokens, the least of them that holds it."""
        lengths = numpy.array(self.lengths)
        return lengths[numpy.searchsorted(lengths, tokens)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dealt:
    """One microbatch."""

    places: tuple[int, ...]
    """Of its samples in the update."""
    lengths: tuple[int, ...] | None = None
    """Positions that each model's samples are padded to; None: to the longest of these samples."""


def by_length(tokens: NDArray[numpy.int64]) -> list[int]:
    """Return the samples of an update, [samples, models] tokens, longest first."""
    return [int(place) for place in numpy.argsort(-tokens.sum(axis=1), kind="stable")]


def cut_by_budget(
    tokens: NDArray[numpy.int64], rungs: Sequence[Rungs], budget: int, shards: int
) -> list[list[Dealt]]:
    """Cut an update into microbatches of at most so many positions of any model.

    As few a shard as the budget allows; then the least budget that needs no more of them, so that all have
    nearly equal work and nobody waits long for the others.

    Args:
        tokens: [samples, models] of an update; a multiple of `shards` samples.
        rungs: of each model.
        budget: positions; every sample fits into it.
        shards: that share the update.

    Returns:
        [shard][microbatch], equally many each; those of one number are of the most equal work.
    """
    order = by_length(tokens)
    columns = [rung.above(tokens[order, model]).tolist() for model, rung in enumerate(rungs)]
    padded = list(zip(*columns, strict=True))
    most = -(-len(_filled(padded, budget)) // shards) * shards
    enough = range(budget)
    least = bisect.bisect_left(enough, True, key=lambda one: len(_filled(padded, one)) <= most)
    found = _filled(padded, least)
    while len(found) % shards:
        largest = max((part for part in found if len(part) > 1), key=lambda part: _positions(padded, part))
        found.remove(largest)
        half = (largest.start + largest.stop) // 2
        found += [range(largest.start, half), range(half, largest.stop)]
    found.sort(key=lambda part: (-_positions(padded, part), part.start))
    dealt = [
        Dealt(places=tuple(order[place] for place in part), lengths=_lengths(padded, part)) for part in found
    ]
    return [dealt[shard::shards] for shard in range(shards)]


def cut_into_packs(
    tokens: NDArray[numpy.int64],
    rungs: Sequence[Rungs],
    block_sizes: Sequence[int],
    budget: int,
    shards: int,
) -> list[list[Dealt]]:
    """Cut an update into microbatches of as many rows of packs as the budget has room for, in every model.

    Rows are as long as a model's longest sample. Samples go, longest first, where a row has room; else to the
    microbatch that has the fewest rows, so that all have nearly equal work. As few microbatches are made as
    suffice when they are filled so.

    Args:
        tokens: [samples, models] of an update; a multiple of `shards` samples.
        rungs: of each model.
        block_sizes: of each model: its samples begin at multiples of it.
        budget: positions; every sample fits into it.
        shards: that share the update.

    Returns:
        [shard][microbatch], equally many each; those of one number are of the most equal work.
    """
    order, lengths = by_length(tokens), tuple(rung.lengths[-1] for rung in rungs)
    blocks = numpy.array(block_sizes)
    filled = -(-tokens[order] // blocks) * blocks
    room = [budget // length * length for length in lengths]
    least = max(math.ceil(int(used) / own) for used, own in zip(filled.sum(axis=0), room, strict=True))
    number, sizes = -(-least // shards) * shards, filled.tolist()
    while True:
        found = [_Microbatch(lengths, block_sizes, budget) for _ in range(number)]
        if _share_out(order, sizes, found):
            break
        number += shards
    found.sort(key=lambda one: (-one.positions, -one.tokens))
    dealt = [Dealt(places=tuple(one.places), lengths=lengths) for one in found]
    return [dealt[shard::shards] for shard in range(shards)]


class _Microbatch:
    """Packs of every model that are being filled with the same samples."""

    def __init__(self, lengths: Sequence[int], block_sizes: Sequence[int], budget: int) -> None:
        self.places: list[int] = []
        self.tokens = self.positions = 0
        self._packs = [Packs(length, block) for length, block in zip(lengths, block_sizes, strict=True)]
        self._rows = [budget // length for length in lengths]

    def needed(self, sizes: Sequence[int]) -> int | None:
        """Return the positions that a sample of so many tokens of each model would add; None: no room."""
        added = 0
        for packs, rows, own in zip(self._packs, self._rows, sizes, strict=True):
            if packs.find(own)[0] == len(packs.ends):
                if len(packs.ends) == rows:
                    return None
                added += packs.length
        return added

    def take(self, place: int, sizes: Sequence[int], added: int) -> None:
        """Take a sample, which adds positions."""
        for packs, own in zip(self._packs, sizes, strict=True):
            packs.place(own)
        self.places.append(place)
        self.tokens += sum(sizes)
        self.positions += added


def _share_out(order: Sequence[int], sizes: Sequence[Sequence[int]], found: Sequence[_Microbatch]) -> bool:
    """Give every sample to a microbatch, and none nothing; say whether there was room for all."""
    for place, own in zip(order, sizes, strict=True):
        ways = [
            (bool(one.places), added, one.positions, one.tokens, number)
            for number, one in enumerate(found)
            if (added := one.needed(own)) is not None
        ]
        if not ways:
            return False
        _, added, *_, number = min(ways)
        found[number].take(place, own, added)
    return True


Padded = Sequence[tuple[int, ...]]
"""[samples][models] positions, longest samples first."""


def _filled(padded: Padded, budget: int) -> list[range]:
    """Fill microbatches one after the other; a sample that is longer than the budget stands alone."""
    found, first = [], 0
    longest = padded[0]
    for place, own in enumerate(padded):
        longer = tuple(map(max, longest, own))
        if place > first and (place + 1 - first) * max(longer) > budget:
            found.append(range(first, place))
            first, longer = place, own
        longest = longer
    return [*found, range(first, len(padded))]


def _positions(padded: Padded, part: range) -> int:
    """Return how many positions the models read together."""
    return len(part) * sum(_lengths(padded, part))


def _lengths(padded: Padded, part: range) -> tuple[int, ...]:
    """Return what each model's samples are padded to, to stand together."""
    return tuple(map(max, zip(*padded[part.start : part.stop], strict=True)))
