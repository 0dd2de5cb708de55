"""Process groups for one model, from explicit rank lists, in the form megatron-core takes.

Each model of a run, student or teacher, has a `ProcessGroupCollection` of its own, and every field that
megatron-core needs in models, DDP and optimizer is set: a field left out falls back to the global state in
some releases and raises in others. Groups are cached by their ranks, so layouts that share a group share
its communicator (dozens of NCCL communicators cost memory). On CUDA only the world and the head groups can
carry host values; all others carry device tensors, ours and megatron-core's. Left out: the newer optional
fields of the collection, which no path of ours needs.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import tide_megatron.platform  # noqa: F401 - before megatron
from tide_megatron.platform.distributed import group_backend, new_group

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from tide_megatron.parallel.head_group import across_replicas, head_groups
from tide_megatron.parallel.layout import Layout, RankList

# World -> its subgroups by ranks and backend (on gloo all are alike); None where this rank is not in one.
# It dies with the world, so the next one never meets stale groups.
_Made = dict[tuple[RankList, str], ProcessGroup | None]
_CACHE: weakref.WeakKeyDictionary[ProcessGroup, _Made] = weakref.WeakKeyDictionary()


def make_groups(layout: Layout, world: int | None = None) -> ProcessGroupCollection:
    """Make, or find again, all process groups of a layout.

    Args:
        layout: already checked against the model (`Layout.check`).
        world: number of ranks; None reads it from torch.distributed.

    Returns:
        A collection with every field set: this rank's group, or None for an embedding group it is not in.

    Every rank of the world must call it, for the same layouts in the same order, members or not.
    """
    size = dist.get_world_size() if world is None else world
    assert size == dist.get_world_size(), f"groups for {size} ranks in a world of {dist.get_world_size()}"
    lists = layout.rank_lists(size)
    groups = ProcessGroupCollection()
    groups.tp = _own(lists.tensor)
    groups.pp = _own(lists.pipeline)
    groups.dp = _own(lists.data)
    groups.mp = _own(lists.replica)
    groups.cp = _own(lists.alone)
    groups.tp_cp, groups.dp_cp, groups.tp_dp_cp = groups.tp, groups.dp, _own(lists.stage)
    groups.ep = _own(lists.expert)
    groups.expt_tp = _own(lists.expert_tensor)
    groups.tp_ep = _own(lists.expert_block)
    groups.expt_dp = _own(lists.expert_data)
    groups.tp_ep_pp = _own(lists.expert_replica)
    groups.embd, groups.pos_embd, groups.hcp = _own(lists.embedding), _own(lists.position_embedding), None
    # One instance of the distributed optimizer: shards over data-parallel ranks, norms over the world.
    groups.intra_dp_cp, groups.intra_expt_dp = groups.dp_cp, groups.expt_dp
    groups.intra_dist_opt, groups.inter_dist_opt = _own(lists.world), None
    return groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """The ranks over which every vocabulary head is cut, seen from one of them (design section 1)."""

    ranks: int = 1
    place: int = 0
    """This rank's number in it; place p holds the p-th range of ids."""
    first: int = 0
    """Rank of place 0 in the world."""
    group: ProcessGroup | None = None
    """None: one rank alone."""

    def own(self, sizes: Sequence[int]) -> slice:
        """Return where this place's part stands behind those of the places before it.

        Args:
            sizes: length of every place's part.
        """
        before = sum(sizes[: self.place])
        return slice(before, before + sizes[self.place])

    @property
    def world_ranks(self) -> range:
        """The group's ranks in the world; it is an aligned block."""
        return range(self.first, self.first + self.ranks)


def make_head_group(ranks: int) -> HeadGroup:
    """Make, or find again, this rank's head group of a checked size (`head_group_size`).

    Every rank of the world must call it, before groups of the same ranks are made for a model: those then
    share this one, which carries host values too.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    group = _own(head_groups(world, ranks), for_host_values=True) if ranks > 1 else None
    return HeadGroup(ranks=ranks, place=rank % ranks, first=rank // ranks * ranks, group=group)


def make_across(layout: Layout, ranks: int) -> ProcessGroup | None:
    """Make the group in which a teacher's replicas of one head group exchange rows; None for one replica.

    Every rank of the world must call it.

    Args:
        layout: the teacher's.
        ranks: size of the head groups.
    """
    if ranks == layout.replica_size:
        return None
    return _own(across_replicas(layout, dist.get_world_size(), ranks))


def _own(lists: tuple[RankList, ...], *, for_host_values: bool = False) -> ProcessGroup | None:
    """Make all the groups of a field, also those this rank is not in, and return the one it is in."""
    world = dist.group.WORLD
    assert world is not None, "groups are made after start_distributed"
    made = _CACHE.setdefault(world, {})
    widest, narrow = (group_backend(for_host_values=also) for also in (True, False))
    own = None
    for ranks in lists:
        if len(ranks) == world.size():
            return world
        carries = for_host_values or (ranks, widest) in made
        backend = widest if carries else narrow
        if (ranks, backend) not in made:
            made[ranks, backend] = new_group(ranks, for_host_values=carries)
        if world.rank() in ranks:
            own = made[ranks, backend]
    return own
