"""Telling a rank's own failure from the echo of another's."""

import pytest
import torch.distributed as dist

from tide_megatron.launch.here import is_echo


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
