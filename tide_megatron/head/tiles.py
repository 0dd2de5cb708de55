"""One model's rows of a slab against its columns, tile by tile.

Columns are worked on in tiles that stay in a core's cache: on CPU an elementwise operation on a tile costs a
fraction of one on the whole. The logits of a slab are made once, kept in the weight's dtype, and read again
for the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tide_megatron.head.parts import HeadInput
from tide_megatron.head.running import Running
from tide_megatron.head.statistics import picked_golds
from tide_megatron.losses.columns import Columns

CPU_TILE = 2**18
"""Numbers of a tile: 1 MiB in fp32, of which several stand in a second-level cache (measured)."""
CUDA_TILE = 2**24
"""On CUDA kernels should be long: 64 MiB in fp32 (not measured)."""
TILES_ALIVE = 9
"""Tiles of temporaries in fp32 that stand at the same time, at most."""
_MULTIPLE, _LEAST = 64, 128
_MOST = {"cpu": 1024, "cuda": 2**15}
"""Columns of a tile, at most: with few rows it would be wide, and its weight gradient large (on CUDA as large
as two tiles, at a hidden size of 1,024)."""


def tile_numbers(device: torch.device) -> int:
    """Return how many numbers a tile has."""
    return CUDA_TILE if device.type == "cuda" else CPU_TILE


def fixed_bytes(device: torch.device) -> int:
    """Return what stands beside the kept logits, however many rows a slab has."""
    return TILES_ALIVE * 4 * tile_numbers(device)


def tiles(columns: int, rows: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of each tile of columns."""
    width = max(_LEAST, tile_numbers(device) // max(1, rows) // _MULTIPLE * _MULTIPLE)
    width = min(width, _MOST["cuda" if device.type == "cuda" else "cpu"])
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


class TiledHead:
    """Hidden rows of one model and its columns on this rank."""

    def __init__(self, head: HeadInput, hidden: Tensor, buffer: Tensor | None) -> None:
        """Take the rows of a slab.

        Args:
            head: the model's weight slice and its place.
            hidden: [rows, hidden size].
            buffer: room for [rows * columns] logits that are read again; None: they are not kept.
        """
        self.num_columns = len(head.weight)
        self.hidden = hidden.detach().to(head.dtype)
        self._head, self._buffer = head, buffer

    def make(self, start: int, stop: int) -> Columns:
        """Compute the logits of a tile (counted from this rank's first column), fp32."""
        weight = self.weight(start, stop)
        if self._buffer is None:
            return self._columns(self.hidden @ weight.T, start)
        return self._columns(torch.mm(self.hidden, weight.T, out=self._block(start, len(weight))), start)

    def weight(self, start: int, stop: int) -> Tensor:
        """Return the head's rows of a tile in the dtype of the products, [columns, hidden size]."""
        return self._head.weight.detach()[start:stop].to(self._head.dtype)

    def again(self, start: int, stop: int) -> Columns:
        """Return the logits of a tile that was made before, fp32."""
        columns = max(0, min(stop, self.num_columns) - start)
        return self._columns(self._block(min(start, self.num_columns), columns), start)

    def _block(self, start: int, columns: int) -> Tensor:
        assert self._buffer is not None, "these logits were not kept"
        rows = len(self.hidden)
        return self._buffer[rows * start : rows * (start + columns)].view(rows, columns)

    def _columns(self, logits: Tensor, start: int) -> Columns:
        place = min(self._head.start + start, self._head.num_ids)
        return Columns(logits=logits.float(), start=place, vocabulary=self._head.num_ids)


def likelihood_statistics(head: TiledHead, gold: Tensor) -> tuple[Running, Tensor]:
    """Return softmax statistics and gold logits of rows against this rank's columns; keeps no logits.

    Args:
        head: the rows.
        gold: [rows] int64 ids; those of other ranks' columns give 0.
    """
    running, picked = Running(len(gold), gold.device), torch.zeros(len(gold), device=gold.device)
    for start, stop in tiles(head.num_columns, len(gold), gold.device):
        columns = head.make(start, stop)
        running.add(columns.logits)
        picked += picked_golds(columns, gold)
    return running, picked
