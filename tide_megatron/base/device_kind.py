"""Which kind of device a tensor's code is chosen for, also where no such device is (`plan`).

A plan works with meta tensors, and with host tensors in the place of a device's. Code that takes another way,
or other sizes, on CUDA than on a CPU asks here and not the tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tide_megatron.base.device import Kind

_PLANNED: list[Kind] = []
"""For which kind this process only plans, innermost last."""


def kind_of(device: torch.device) -> str:
    """Return which kind's code and sizes a device takes: inside `planned_as` that kind's, else its own."""
    return _PLANNED[-1] if _PLANNED else device.type


@contextlib.contextmanager
def planned_as(kind: Kind) -> Iterator[None]:
    """Let tensors of every device stand for those of one kind while the block runs."""
    _PLANNED.append(kind)
    try:
        yield
    finally:
        _PLANNED.pop()
