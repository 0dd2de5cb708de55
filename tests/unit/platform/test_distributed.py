"""By what the ranks of a group talk: NCCL alone on CUDA, unless host values travel too."""

import datetime
from types import SimpleNamespace

from tide_megatron.platform import distributed
from tide_megatron.platform.distributed import subgroup_backend

import pytest
import torch
import torch.distributed as dist

from tide_megatron.base.device import Device


@pytest.mark.parametrize(
    ("backend", "for_host_values", "chosen"),
    [
        ("gloo", False, "gloo"),
        ("gloo", True, "gloo"),
        ("nccl", False, "nccl"),
        ("nccl", True, "cpu:gloo,cuda:nccl"),
    ],
)
def test_a_group_has_gloo_beside_nccl_only_where_host_values_travel(backend, for_host_values, chosen):
    assert subgroup_backend(backend, for_host_values=for_host_values) == chosen


class World:
    """Stands for a process group, which here nobody asks anything."""


@pytest.mark.parametrize(
    ("for_host_values", "backend"), [(False, "nccl"), (True, "cpu:gloo,cuda:nccl")], ids=["device", "host"]
)
def test_a_group_takes_timeout_and_backend_from_its_world(monkeypatch, for_host_values, backend):
    asked, world, wait = [], World(), datetime.timedelta(seconds=7)
    torch_distributed = SimpleNamespace(
        group=SimpleNamespace(WORLD=world), new_group=lambda ranks, **options: asked.append((ranks, options))
    )
    monkeypatch.setattr(distributed, "dist", torch_distributed)
    monkeypatch.setitem(distributed._WORLDS, world, distributed._World(backend="nccl", timeout=wait))
    assert distributed.new_group((1, 3), for_host_values=for_host_values) is None
    assert asked == [([1, 3], {"timeout": wait, "backend": backend})]


def test_a_world_on_cuda_gives_megatron_its_timeout_and_device_groups(monkeypatch):
    asked, world = {}, World()
    monkeypatch.setattr(
        distributed,
        "dist",
        SimpleNamespace(
            group=SimpleNamespace(WORLD=world), init_process_group=lambda **options: asked.update(options)
        ),
    )

    def initialize_model_parallel(*, create_gloo_process_groups, distributed_timeout_minutes):
        asked.update(gloo=create_gloo_process_groups, minutes=distributed_timeout_minutes)
        asked.update(megatron=distributed.parallel_state.create_group.keywords)

    megatron = SimpleNamespace(create_group=print, initialize_model_parallel=initialize_model_parallel)
    monkeypatch.setattr(distributed, "parallel_state", megatron)
    monkeypatch.setattr(distributed, "seed_all", lambda seed: None)
    device = Device(type="cpu", index=0, backend="nccl", threads=torch.get_num_threads())
    distributed.start_distributed(device, timeout_seconds=90.0)
    assert asked["backend"] == "cpu:gloo,cuda:nccl"
    assert (asked["timeout"].total_seconds(), asked["minutes"], asked["gloo"]) == (90.0, 1.5, False)
    assert asked["megatron"] == {"backend": "nccl"}
    assert megatron.create_group is print


def test_megatrons_own_groups_are_made_for_device_tensors_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "new_group", lambda **options: asked.append(options))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    wait = datetime.timedelta(seconds=5)
    with distributed._device_groups("nccl"):
        distributed.parallel_state.create_group([0], timeout=wait)
        distributed.parallel_state.create_group(
            [0], timeout=wait, backend="gloo"
        )  # what is asked for by name stays
    distributed.parallel_state.create_group([0], timeout=wait)
    assert [(options["backend"], options["timeout"]) for options in asked] == [
        ("nccl", wait),
        ("gloo", wait),
        (None, wait),
    ]
