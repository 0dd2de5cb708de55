"""A world of one rank for tests that build models in this process."""

from tide_megatron.platform import start_distributed, stop_distributed

import pytest
import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)


@pytest.fixture(scope="module")
def groups():
    """Start a one-rank world for a file's tests, unless there is one, and give its process groups."""
    started = not dist.is_initialized()
    if started:
        start_distributed(CPU)
    yield make_groups(Layout())
    if started:
        stop_distributed()
