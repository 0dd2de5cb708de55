"""Which ranks share one set of vocabulary heads: arithmetic over the layouts of all teachers, without torch.

A head group is an aligned block of ranks that holds whole replicas of every teacher (design section 1), so
its size is a multiple of each replica and divides the world. The least one is the default: fewer ranks to
exchange rows with; a larger one cuts the heads finer and saves memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tide_megatron.base.errors import ConfigError
from tide_megatron.parallel.layout import Layout, RankList


def head_group_size(layouts: Iterable[Layout], world: int, wanted: int | None = None) -> int:
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


def head_groups(world: int, size: int) -> tuple[RankList, ...]:
    """Return the ranks of each head group, in order: aligned blocks of `size` ranks."""
    return tuple(tuple(range(first, first + size)) for first in range(0, world, size))


def across_replicas(layout: Layout, world: int, size: int) -> tuple[RankList, ...]:
    """Return the ranks with the same seat in the replicas of one head group.

    Each list gathers rows over all replicas of its group; group by group, then seat by seat.

    Args:
        layout: of one model.
        world: number of ranks.
        size: of a head group, from `head_group_size`.
    """
    return tuple(
        ranks[seat :: layout.replica_size]
        for ranks in head_groups(world, size)
        for seat in range(layout.replica_size)
    )
