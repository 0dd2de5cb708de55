"""A process alone can join a world of one, leave it, and join again; fresh seeds repeat."""

import random

from tide_megatron.platform import seed_all, start_distributed, stop_distributed

import numpy
import torch
import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)


def leave_and_join():
    """Leave the pool's world of one, and join one without address, port or store, three times."""
    seen = []
    for _ in range(3):
        stop_distributed()
        stop_distributed()  # once more does no harm
        gone = not dist.is_initialized()
        start_distributed(CPU)
        total = torch.ones(2)
        dist.all_reduce(total, group=make_groups(Layout()).dp)
        seen.append((gone, dist.get_world_size(), total.tolist(), torch.get_num_threads()))
    return seen


def test_a_world_of_one_needs_no_address_and_can_be_left_and_joined_again(pool):
    assert pool(1).run(leave_and_join) == [[(True, 1, [1.0, 1.0], 1)] * 3]


def draw():
    return random.random(), numpy.random.rand(), torch.rand(2).tolist()


def draw_with_seeds():
    stop_distributed()
    start_distributed(CPU, seed=3)
    drawn = [draw()]
    for seed in (3, 4, 2**32 + 3):  # numpy takes 32 bits only
        seed_all(seed)
        drawn.append(draw())
    return drawn


def test_seeds_repeat_and_differ(pool):
    [(start, same, other, large)] = pool(1).run(draw_with_seeds)
    assert same == start
    assert other[0] != start[0]
    assert other[1] != start[1]
    assert other[2] != start[2]
    assert large[0] != start[0]
