"""What ranks make of each other's GPUs: no two may hold one, and all choose by the weakest."""

import re

import pytest

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.launch.gpus import Gpu, agree_on_gpus, agreed_on

DEVICE = Device(type="cuda", index=0, backend="nccl", threads=1, name="A100", capability=(8, 0))


def gpus(*identities, **change):
    return [Gpu(**{"identity": each, "capability": (8, 0), "name": "A100", **change}) for each in identities]


def test_a_gpu_each_is_well():
    assert agreed_on(DEVICE, gpus("a", "b", "c")) == DEVICE


def test_ranks_that_were_given_one_gpu_are_named():
    said = "ranks [1, 3] were given the same GPU, A100, which NCCL refuses"
    with pytest.raises(ConfigError, match=re.escape(said)):
        agreed_on(DEVICE, gpus("a", "b", "c", "b"))


def test_all_ranks_go_by_the_weakest_gpu():
    agreed = agreed_on(DEVICE, [*gpus("a"), *gpus("b", name="T4", capability=(7, 5)), *gpus("c")])
    assert (agreed.name, agreed.capability, agreed.has_bf16) == ("T4", (7, 5), False)
    assert agreed.index == DEVICE.index


def test_on_a_cpu_there_is_nothing_to_tell():
    device = Device(type="cpu", index=0, backend="gloo", threads=1)
    assert agree_on_gpus(device) is device  # without a world: no collective
