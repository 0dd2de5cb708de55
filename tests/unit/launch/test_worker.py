"""One rank: no two hold one GPU, all choose by the weakest, and an echo is told from a rank's own failure."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch import worker
from tide_megatron.launch.worker import Gpu, Job, agree_on_gpus, agreed_on, is_echo, run_here


def test_ranks_agree_on_their_gpus_before_the_function_is_called(monkeypatch):
    chosen = Device(type="cuda", index=2, backend="nccl", threads=1, name="H100", capability=(9, 0))
    weakest = dataclasses.replace(chosen, name="T4", capability=(7, 5))
    done = []
    monkeypatch.setattr(worker, "choose_device", lambda wanted: chosen)
    monkeypatch.setattr(worker, "start_distributed", lambda *args, **options: done.append((args, options)))
    monkeypatch.setattr(worker, "agree_on_gpus", lambda device: done.append(device) or weakest)
    monkeypatch.setattr(worker, "stop_distributed", lambda: done.append("stop"))

    def function(number, *, device, stop):
        done.append((number, device, stop))
        return "value"

    stop = StopFlag()
    assert run_here(Job(function=function, args=(5,), timeout_seconds=7.0), None, stop) == "value"
    assert done == [
        ((chosen, None), {"timeout_seconds": 7.0, "store": None}),
        chosen,
        (5, weakest, stop),
        "stop",
    ]


def chained(outer, inner):
    try:
        try:
            raise inner
        except Exception as cause:
            raise outer from cause
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"
        ),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        RuntimeError("rank 1 failed: ValueError: planted"),  # what `fail_together` tells the others
        dist.DistNetworkError("The client socket has timed out"),
        chained(ValueError("could not save"), RuntimeError("Connection reset by peer")),
    ],
)
def test_a_lost_peer_is_an_echo(error):
    assert is_echo(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("gloo/ is a folder of mine"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("the layer after rank 1 failed: no"),
        KeyError("NCCL"),
    ],
)
def test_other_failures_are_not(error):
    assert not is_echo(error)


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
    monkeypatch.setattr(worker, "gather_objects", lambda own: [told.append(own.identity) or own])
    for variables in ({}, {"NCCL_HOSTID": "r1"}, {"NCCL_HOSTID": "r2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert agree_on_gpus(DEVICE) == DEVICE
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setattr(worker, "own_share", lambda: (3, 4))
    agree_on_gpus(DEVICE)
    assert told == [" GPU-12", "r1 GPU-12", "r2 GPU-12", "rank 3"]


def test_on_a_cpu_there_is_nothing_to_tell():
    device = Device(type="cpu", index=0, backend="gloo", threads=1)
    assert agree_on_gpus(device) is device  # without a world: no collective
