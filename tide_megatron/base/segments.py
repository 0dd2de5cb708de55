"""Sums over runs of items, added in one order on every device.

`index_add` on CUDA adds by atomics in any order: two runs of the same numbers differ in their last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values: Tensor, segment: Tensor, number: int) -> Tensor:
    """Add up items by segment, from the first to the last, as `index_add` does on CPU. Waits for no device.

    Args:
        values: [items, ...] floating point.
        segment: [items] int64: which one each belongs to, ascending.
        number: how many segments there are; one without items has sum 0.

    Returns:
        [number, ...], of the values' dtype; gradients flow to them.
    """
    if segment.device.type == "cpu":  # elsewhere the host would have to wait
        assert bool((segment.diff() >= 0).all()), "segments must ascend"
    sizes = torch.zeros(number, dtype=torch.int64, device=segment.device)
    sizes.index_add_(0, segment, torch.ones_like(segment))  # whole numbers: any order
    return torch.segment_reduce(values.contiguous(), "sum", lengths=sizes, unsafe=True)
