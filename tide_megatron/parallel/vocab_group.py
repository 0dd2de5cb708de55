"""The ranks over which every vocabulary head of a run is cut, and which ids each of them owns.

A vocabulary group is an aligned block of ranks that holds whole replicas of every teacher (design section 1),
so its size is a multiple of each replica and divides the world. The least one is the default: fewer ranks to
exchange rows with; a larger one cuts the heads finer and saves memory.

The ranges of ids are common to all heads, the student's and every teacher's: so both models' logits of an id
are on one rank, and what compares ids one by one needs no exchange of columns. The price: of a head smaller
than the largest, the last ranks own less, or nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_megatron.base.errors import ConfigError
from tide_megatron.parallel.groups import own_group
from tide_megatron.parallel.layout import Layout, RankList


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabGroup:
    """A vocabulary group, seen from one of its ranks; without arguments one rank alone."""

    size: int = 1
    """Ranks."""
    rank: int = 0
    """This rank's number in the group; group rank r owns the r-th range of ids."""
    first: int = 0
    """World rank of group rank 0."""
    width: int = 0
    """Ids of every range but the last; means nothing where one rank owns all."""
    group: ProcessGroup | None = None
    """What it communicates over; None: one rank alone, or pure arithmetic."""

    @staticmethod
    def of(
        vocabularies: Iterable[int], size: int, world_rank: int, group: ProcessGroup | None = None
    ) -> VocabGroup:
        """Cut the largest vocabulary into equal ranges.

        Args:
            vocabularies: how many ids each head has.
            size: ranks of a group.
            world_rank: this rank.
            group: the process group, once it is made.
        """
        first, rank = world_rank // size * size, world_rank % size
        width = -(-max(vocabularies) // size)
        return VocabGroup(size=size, rank=rank, first=first, width=width, group=group)

    def columns(self, vocabulary: int) -> tuple[int, int]:
        """Return the first and last-plus-one id that this rank owns of a head of so many ids; may be none."""
        if self.size == 1:
            return 0, vocabulary
        assert vocabulary <= self.size * self.width, f"a head of {vocabulary} ids was not cut"
        start = self.rank * self.width
        return min(start, vocabulary), min(start + self.width, vocabulary)

    def own(self, sizes: Sequence[int]) -> slice:
        """Return where this rank's part stands behind those of the ranks before it.

        Args:
            sizes: length of every rank's part.
        """
        before = sum(sizes[: self.rank])
        return slice(before, before + sizes[self.rank])

    @property
    def world_ranks(self) -> slice:
        """The group's part of a sequence that has an entry for each rank of the world."""
        return slice(self.first, self.first + self.size)


def vocab_group_size(layouts: Iterable[Layout], world: int, wanted: int | None = None) -> int:
    """Return how many ranks share the heads: one number for all models of a run.

    Args:
        layouts: of all models, already checked against the world (`Layout.check`).
        world: number of ranks.
        wanted: `head.ranks` of the recipe; None: as few as hold whole replicas of every model.

    Raises:
        ConfigError: when `wanted` is not a multiple of every replica or does not divide the world.
    """
    least = math.lcm(*(layout.replica_size for layout in layouts))
    assert world % least == 0, f"layouts that do not fit {world} ranks: check them first"
    if wanted is None:
        return least
    legal = [size for size in range(least, world + 1, least) if world % size == 0]
    if wanted not in legal:
        near = min(legal, key=lambda size: (abs(math.log(size / max(1, wanted))), size))
        raise ConfigError(
            f"head.ranks: {wanted} must be a multiple of every teacher's replica (together {least} ranks) "
            f"and divide the {world} ranks of this run; the nearest legal size is {near}"
        )
    return wanted


def vocab_groups(world: int, size: int) -> tuple[RankList, ...]:
    """Return the ranks of each vocabulary group, in order: aligned blocks of `size` ranks."""
    return tuple(tuple(range(first, first + size)) for first in range(0, world, size))


def across_replicas(layout: Layout, world: int, size: int) -> tuple[RankList, ...]:
    """Return the ranks with the same place in the replicas of one vocabulary group.

    Each list gathers rows over all replicas of its group; group by group, then place by place.

    Args:
        layout: of one model.
        world: number of ranks.
        size: of a vocabulary group, from `vocab_group_size`.
    """
    return tuple(
        ranks[place :: layout.replica_size]
        for ranks in vocab_groups(world, size)
        for place in range(layout.replica_size)
    )


def make_vocab_group(vocabularies: Iterable[int], size: int) -> VocabGroup:
    """Make, or find again, this rank's vocabulary group of a checked size (`vocab_group_size`).

    Every rank of the world must call it, before groups of the same ranks are made for a model: those then
    share this one, which carries host values too.

    Args:
        vocabularies: how many ids each head has.
        size: ranks of a group.
    """
    world = dist.get_world_size()
    group = own_group(vocab_groups(world, size), for_host_values=True) if size > 1 else None
    return VocabGroup.of(vocabularies, size, dist.get_rank(), group)


def make_across(layout: Layout, size: int) -> ProcessGroup | None:
    """Make the group in which a teacher's replicas of one vocabulary group exchange rows; None for one.

    Every rank of the world must call it.

    Args:
        layout: the teacher's.
        size: ranks of a vocabulary group.
    """
    if size == layout.replica_size:
        return None
    return own_group(across_replicas(layout, dist.get_world_size(), size))
