"""By what the ranks of a group talk: NCCL alone on CUDA, unless host values travel too."""

import datetime

from tide_megatron.platform import distributed
from tide_megatron.platform.distributed import subgroup_backend

import pytest
import torch.distributed as dist


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
