"""What ranks make of each other's GPUs: no two may hold one, and all choose by the weakest."""

import re
from types import SimpleNamespace

import pytest
import torch

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.launch import gpus as module
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


def test_a_gpu_is_known_by_its_number_unless_it_is_shared_on_purpose(monkeypatch):
    properties = SimpleNamespace(uuid="GPU-12")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    told = []
    monkeypatch.setattr(module, "gather_objects", lambda own: [told.append(own.identity) or own])
    for variables in ({}, {"NCCL_HOSTID": "r1"}, {"NCCL_HOSTID": "r2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert agree_on_gpus(DEVICE) == DEVICE
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setattr(module, "own_share", lambda: (3, 4))
    agree_on_gpus(DEVICE)
    assert told == [" GPU-12", "r1 GPU-12", "r2 GPU-12", "rank 3"]


def test_on_a_cpu_there_is_nothing_to_tell():
    device = Device(type="cpu", index=0, backend="gloo", threads=1)
    assert agree_on_gpus(device) is device  # without a world: no collective
