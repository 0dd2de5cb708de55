"""The elementwise part of a term over columns: one pure function of a tile, plain or fused by torch.compile.

Whether a compiler pays is a matter of device and size: on CUDA it does, on CPU it takes tens of seconds to
compile and then saves a part of the time (docs/head_loss.md has figures).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tide_megatron.losses.rows import ColumnLoss

Softmax = tuple[Tensor, Tensor]
"""Maximum and log of the scaled sum over all columns, ([items], [items]) fp32."""
TileFunction = Callable[[Tensor, Tensor, Softmax, Softmax, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""(student's and target's softened logits of a tile, the softmax of each, gap, factors) -> ([items] values of
these columns, [items, columns] derivatives times factors)."""


@functools.lru_cache(maxsize=64)
def column_tile(loss: ColumnLoss, *, compiled: bool) -> TileFunction:
    """Return a term's function of a tile; compiled once per loss and process."""

    def tile(
        ours: Tensor, target: Tensor, our: Softmax, their: Softmax, gap: Tensor | None, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        # In place where a number is not needed again: fresh memory costs as much as the arithmetic.
        student = (ours - our[0][:, None]).sub_(our[1][:, None])
        other = (target - their[0][:, None]).sub_(their[1][:, None])
        value, slope = loss.value_and_slope(student, other, gap)
        return value, slope.mul_(factors[:, None])

    # Rows and the last tile's columns vary: one compilation serves all sizes.
    function: TileFunction = torch.compile(tile, dynamic=True) if compiled else tile
    return function
