"""Telling a rank's own failure from the echo of another's."""

import dataclasses

import pytest
import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch import here
from tide_megatron.launch.here import is_echo


def test_ranks_agree_on_their_gpus_before_the_function_is_called(monkeypatch):
    chosen = Device(type="cuda", index=2, backend="nccl", threads=1, name="H100", capability=(9, 0))
    weakest = dataclasses.replace(chosen, name="T4", capability=(7, 5))
    done = []
    monkeypatch.setattr(here, "choose_device", lambda wanted: chosen)
    monkeypatch.setattr(here, "start_distributed", lambda *args, **options: done.append((args, options)))
    monkeypatch.setattr(here, "agree_on_gpus", lambda device: done.append(device) or weakest)
    monkeypatch.setattr(here, "stop_distributed", lambda: done.append("stop"))

    def function(number, *, device, stop):
        done.append((number, device, stop))
        return "value"

    stop = StopFlag()
    options = {"wanted": "auto", "ranks": None, "stop": stop, "timeout_seconds": 7.0}
    assert here.run_here(function, (5,), **options) == "value"
    assert done == [((chosen, None), {"timeout_seconds": 7.0}), chosen, (5, weakest, stop), "stop"]


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
