"""How an update's samples are shared out to data shards and microbatches: pure functions of their lengths.

Like stands beside like, so that few positions are pads. Microbatches have a number of samples, or as many as
a budget of positions has room for; then every shard has equally many of them, because ranks meet in each, and
models see few lengths: a length is rounded up to one of at most eight (`Rungs`), for which kernels are
compiled and memory is laid out once.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

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
