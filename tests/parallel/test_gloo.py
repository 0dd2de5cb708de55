"""Shares of unequal size over gloo: gathered and reduced through megatron-core's own entry points."""

from pathlib import Path

import tide_megatron.platform

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

SIZES = [3, 0, 1, 2]


def exchanged():
    rank, group = dist.get_rank(), dist.group.WORLD
    own = torch.full((SIZES[rank], 2), float(rank + 1))
    gathered = gather_from_sequence_parallel_region(own, group=group, output_split_sizes=SIZES)
    whole = torch.arange(12.0).view(6, 2) * (rank + 1)
    reduced = reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=SIZES)
    return gathered, reduced, whole


def test_shares_of_unequal_size(pool):
    total = torch.arange(12.0).view(6, 2) * 10
    for rank, (gathered, reduced, whole) in enumerate(pool(4).run(exchanged)):
        assert gathered[:, 0].tolist() == [1, 1, 1, 3, 4, 4]
        start = sum(SIZES[:rank])
        assert torch.equal(reduced, total[start : start + SIZES[rank]])
        assert torch.equal(whole, torch.arange(12.0).view(6, 2) * (rank + 1)), "what is given stays"


GROUPS = 8


def other_threads():
    """Count threads but for each group's own workers; the polling one has a name in newer torch only."""
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    return sum(name != "pt_gloo_runloop" for name in names)


def polling_threads():
    """Make groups and use them; return how many threads that took beside the groups' own workers."""
    dist.all_reduce(torch.ones(1))  # the world's group has a polling thread already
    before = other_threads()
    groups = [dist.new_group([0, 1]) for _ in range(GROUPS)]
    total = torch.ones(1)
    for group in groups:
        dist.all_reduce(total, group=group)
    more = other_threads() - before
    for group in groups:
        dist.destroy_process_group(group)
    return float(total), more


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
def test_all_groups_of_a_rank_share_one_polling_thread(pool):
    for total, more in pool(2).run(polling_threads):
        assert total == 2.0**GROUPS
        assert more < GROUPS / 2, "threads of other work come and go; a polling thread a group would be more"
