"""One model's rows of a slab against its columns, tile by tile.

Columns are worked on in tiles that stay in a core's cache: on CPU an elementwise operation on a tile costs a
fraction of one on the whole. The logits of a slab are made once, kept in the weight's dtype, and read again
for the gradients.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.base.device_kind import kind_of
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.softmax import OnlineLikelihood, OnlineSoftmax, merge
from tide_megatron.losses.rows import Columns

log = logging.getLogger(__name__)

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
    return CUDA_TILE if kind_of(device) == "cuda" else CPU_TILE


def fixed_bytes(device: torch.device) -> int:
    """Return what stands beside the kept logits, however many rows a slab has."""
    return TILES_ALIVE * 4 * tile_numbers(device)


def tiles(columns: int, rows: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of each tile of columns."""
    width = max(_LEAST, tile_numbers(device) // max(1, rows) // _MULTIPLE * _MULTIPLE)
    width = min(width, _MOST["cuda" if kind_of(device) == "cuda" else "cpu"])
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

    @property
    def first(self) -> int:
        """The id of this rank's first column."""
        return self._head.start

    @property
    def num_ids(self) -> int:
        """How many ids the whole head has."""
        return self._head.num_ids

    def _columns(self, logits: Tensor, start: int) -> Columns:
        place = min(self._head.start + start, self._head.num_ids)
        return Columns(logits=logits.float(), start=place, vocabulary=self._head.num_ids)


def likelihood_statistics(head: TiledHead, gold: Tensor) -> OnlineLikelihood:
    """Return what this rank's columns say of gold ids' likelihoods; keeps no logits.

    Args:
        head: the rows.
        gold: [rows] int64 ids, of any rank's columns.
    """
    found = OnlineLikelihood(gold)
    for start, stop in tiles(head.num_columns, len(gold), gold.device):
        found.add(head.make(start, stop))
    return found


class Tempered(NamedTuple):
    """What a model says of rows when its logits are divided by each of some temperatures."""

    nll: Tensor
    """[temperatures, rows] fp32, nats."""
    confidence: Tensor
    """[rows] fp32: probability of the most likely id, at temperature 1."""


class RowScores(NamedTuple):
    """How likely a model finds gold ids."""

    nll: Tensor
    """[rows] fp32, nats."""
    is_right: Tensor
    """[rows] bool: the gold id is the most likely (ties count)."""
    tempered: Tempered | None = None
    """Where temperatures were asked for."""


@torch.no_grad()
def score_rows(
    head: HeadInput, gold: Tensor, group: ProcessGroup | None = None, *, temperatures: Sequence[float] = ()
) -> RowScores:
    """Say how likely a model finds gold ids: no loss, no gradient. Alike on every rank.

    All ranks of the group call it together; memory does not grow with rows x vocabulary. Temperatures take
    the head's products, and the exchange, a second time.

    Args:
        head: all the group's hidden rows with this rank's columns.
        gold: [rows] int64 ids.
        group: the vocabulary group.
        temperatures: to divide the logits by as well.
    """
    (found,) = merge([likelihood_statistics(TiledHead(head, head.hidden, None), gold)], [], group).likelihoods
    nll, is_right = -found.log_probability, found.logits >= found.others.maximum
    if not temperatures:
        return RowScores(nll, is_right)
    softmax, tempered = found.softmax, _tempered_nll(head, gold, found.logits, group, temperatures)
    confidence = softmax.log_probabilities(softmax.maximum).exp()
    return RowScores(nll, is_right, Tempered(tempered, confidence))


def _tempered_nll(
    head: HeadInput, gold: Tensor, logits: Tensor, group: ProcessGroup | None, temperatures: Sequence[float]
) -> Tensor:
    """Return the NLL [temperatures, rows] of gold ids whose logits [rows] are known."""
    tiled = TiledHead(head, head.hidden, None)
    softmaxes = [OnlineSoftmax(len(gold), gold.device) for _ in temperatures]
    for start, stop in tiles(tiled.num_columns, len(gold), gold.device):
        columns = tiled.make(start, stop)
        for softmax, temperature in zip(softmaxes, temperatures, strict=True):
            softmax.add(columns.logits / temperature)
    merged = merge([], softmaxes, group).softmaxes
    return torch.stack(
        [-one.log_probabilities(logits / other) for one, other in zip(merged, temperatures, strict=True)]
    )


class Workspace:
    """Buffers that outlive a call, one for each name, as large as the largest that was asked for.

    Fresh memory of this size costs a page fault every 4 KiB.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [numbers] uninitialised; the last buffer of this name is given up."""
        buffer = self._buffers.get(name)
        is_same = buffer is not None and (buffer.dtype, buffer.device) == (dtype, device)
        if buffer is None or not is_same or buffer.numel() < numbers:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(numbers, dtype=dtype, device=device)
        return buffer[:numbers]


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices whose product is added up in fp32: a tile's gradients of weight and rows.

    A GPU accumulates bf16 products in fp32 and can hand them out as they are; rounding each to bf16 first
    would cost a gradient that adds up over slabs, ranks and microbatches its digits. On CPU torch has no such
    product: there a tile's result is rounded to bf16 before it is added, as it always was.

    Args:
        left: [a, b].
        right: [b, c], of the same dtype.
    """
    if kind_of(left.device) == "cuda" and left.dtype is torch.bfloat16 and _gives_fp32():
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
