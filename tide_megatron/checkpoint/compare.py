"""How two checkpoints differ, tensor by tensor; two whole tensors are in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from tide_megatron.checkpoint.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What is not the same about a tensor."""

    name: str
    words: str
    """Set where values cannot be compared: one side lacks it, or shapes differ."""
    absolute: float
    """Largest difference of two elements; NaN against a number is infinite."""
    relative: float
    """Largest difference over the larger of the two elements' sizes."""


def differences(left: Path, right: Path) -> Iterator[Difference]:
    """Yield the tensors that differ between two checkpoints, in the order of their names.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    one, other = Table(left), Table(right)
    for name in sorted({*one.tensors, *other.tensors}):
        words = _words(one, other, name)
        if words:
            yield Difference(name=name, words=words, absolute=0.0, relative=0.0)
            continue
        a, b = one.read(name), other.read(name)
        if torch.equal(a, b):
            continue
        if a.dtype != b.dtype or not a.is_floating_point():
            a, b = a.double(), b.double()
        a, b = a.float() if a.itemsize < 4 else a, b.float() if b.itemsize < 4 else b
        is_same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(
            is_same, torch.zeros_like(a), (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        )
        size = torch.maximum(a.abs(), b.abs())
        absolute = float(gap.max())
        if absolute:
            relative = torch.where(gap > 0, gap / size.clamp_min(torch.finfo(size.dtype).tiny), gap)
            yield Difference(
                name=name,
                words="",
                absolute=absolute,
                relative=float(relative.nan_to_num(nan=torch.inf).max()),
            )


def _words(one: Table, other: Table, name: str) -> str:
    """Say why a tensor's values cannot be compared; empty where they can."""
    for table, side in ((one, "first"), (other, "second")):
        if name not in table.tensors:
            return f"not in the {side}"
    if one.shape(name) != other.shape(name):
        return f"shapes {one.shape(name)} and {other.shape(name)}"
    return ""
