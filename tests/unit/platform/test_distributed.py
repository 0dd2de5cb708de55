"""A process alone can join a world of one, leave it, and join again; fresh seeds repeat."""

import random

from tide_megatron.platform import seed_all, start_distributed, stop_distributed

import numpy
import pytest
import torch
import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)


@pytest.fixture(autouse=True)
def _no_world_left():
    assert not dist.is_initialized()
    yield
    stop_distributed()


def test_a_world_of_one_needs_no_address_and_can_be_left_and_joined_again():
    for _ in range(2):
        start_distributed(CPU)
        assert dist.get_world_size() == 1
        total = torch.ones(2)
        dist.all_reduce(total, group=make_groups(Layout()).dp)
        assert total.tolist() == [1.0, 1.0]
        assert torch.get_num_threads() == 1
        stop_distributed()
        assert not dist.is_initialized()
    stop_distributed()


def draw():
    return random.random(), numpy.random.rand(), torch.rand(2).tolist()


def test_seeds_repeat_and_differ():
    start_distributed(CPU, seed=3)
    first = draw()
    seed_all(3)
    assert draw() == first
    seed_all(4)
    assert draw() != first
    seed_all(2**32 + 3)  # numpy takes 32 bits only
