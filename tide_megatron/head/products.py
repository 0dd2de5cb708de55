"""Products whose results are added up in fp32: the head's gradients of its weight and rows, tile by tile.

A GPU accumulates bf16 products in fp32 and can hand them out as they are; rounding each to bf16 first would
cost a gradient that adds up over slabs, ranks and microbatches its digits. On CPU torch has no such product:
there a tile's result is rounded to bf16 before it is added, as it always was.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices; in fp32 where the device gives it, else in the dtype of both.

    Args:
        left: [a, b].
        right: [b, c], of the same dtype.
    """
    if left.is_cuda and left.dtype is torch.bfloat16 and _gives_fp32():
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


@functools.cache
def _gives_fp32() -> bool:
    """Say whether this torch has products of another dtype than their factors' (2.8 and newer)."""
    found = "dtype" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]
    if not found:
        log.warning(
            "head loss: torch %s rounds each tile of a bf16 head's gradient to bf16; 2.8 and newer do not",
            torch.__version__,
        )
    return found
