"""Process groups for one model, from explicit rank lists, in the form megatron-core takes.

Each model of a run, student or teacher, has a `ProcessGroupCollection` of its own, and every field that
megatron-core needs in models, DDP and optimizer is set: a field left out falls back to the global state in
some releases and raises in others. Groups are cached by their ranks, so layouts that share a group share
its communicator (dozens of NCCL communicators cost memory). On CUDA only the world and the vocabulary groups
can carry host values; all others carry device tensors, ours and megatron-core's. Left out: the newer optional
fields of the collection, which no path of ours needs.
"""

from __future__ import annotations

import weakref

import tide_megatron.platform
from tide_megatron.platform.distributed import group_backend, new_group

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

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
    groups.tp = own_group(lists.tensor)
    groups.pp = own_group(lists.pipeline)
    groups.dp = own_group(lists.data)
    groups.mp = own_group(lists.replica)
    groups.cp = own_group(lists.alone)
    groups.tp_cp, groups.dp_cp, groups.tp_dp_cp = groups.tp, groups.dp, own_group(lists.stage)
    groups.ep = own_group(lists.expert)
    groups.expt_tp = own_group(lists.expert_tensor)
    groups.tp_ep = own_group(lists.expert_block)
    groups.expt_dp = own_group(lists.expert_data)
    groups.tp_ep_pp = own_group(lists.expert_replica)
    groups.embd, groups.pos_embd = own_group(lists.embedding), own_group(lists.position_embedding)
    groups.hcp = None
    # One instance of the distributed optimizer: shards over data-parallel ranks, norms over the world.
    groups.intra_dp_cp, groups.intra_expt_dp = groups.dp_cp, groups.expt_dp
    groups.intra_dist_opt, groups.inter_dist_opt = own_group(lists.world), None
    return groups


def own_group(lists: tuple[RankList, ...], *, for_host_values: bool = False) -> ProcessGroup | None:
    """Make, or find again, all the groups of these ranks; return the one this rank is in, if any.

    Every rank of the world must call it, members or not, with the same lists in the same order.

    Args:
        lists: disjoint; all of the world's ranks in one list is the world's own group.
        for_host_values: whether it must carry CPU tensors too, also in a CUDA run.
    """
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
