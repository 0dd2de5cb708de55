"""What travels between the ranks of a replica and of a vocabulary group, each with its adjoint.

Rows are uneven: every rank of a group has its own number of them, and all ranks know all numbers beforehand
(they travel in the step's one count collective), so nothing here synchronises with the host. Uneven parts are
padded to the longest for transport and cut on arrival. A group of None, or of one rank, sends nothing.

Two sums appear in the backward pass of a vocabulary-parallel loss (design section 3). What every rank of the
group consumes (gathered rows, gathered statistics) gets its gradient from all of them: the adjoint of the
gather is a reduce-scatter. The objective is left as each rank's share, whose adjoint is the identity. With
the wrong one the loss is right and the gradient garbage.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

Kind = Literal["collect", "deliver", "rows", "statistics", "gradients"]
"""Views to a replica's ranks; a teacher's rows to the vocabulary group; the student's rows to it; packed
numbers of the vocabulary-parallel softmax, forward and backward; gradients of rows back to their owners."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class CommStats:
    """Bytes and calls by kind since the last `take`."""

    def __init__(self) -> None:
        """Start at zero."""
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, kind: Kind, num_bytes: int) -> None:
        """Count one collective that brought so many bytes from other ranks."""
        self.bytes[kind] += num_bytes
        self.calls[kind] += 1

    def take(self) -> dict[Kind, int]:
        """Return the bytes of every kind, zero included, and start again."""
        taken: dict[Kind, int] = {kind: self.bytes[kind] for kind in KINDS}
        self.bytes.clear()
        self.calls.clear()
        return taken

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out what travels in the block: measurements are no part of an update."""
        kept = self.bytes.copy(), self.calls.copy()
        try:
            yield
        finally:
            self.bytes, self.calls = kept


COMM_STATS = CommStats()
"""Of this process: what travels is a property of the process, like its memory."""


_TRANSPORT_MULTIPLE = 8
"""Padded lengths are multiples of this, so that buffers of neighbouring microbatches have few sizes."""

# torch 2.13 renamed both; older releases have the older names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size_of(group: ProcessGroup | None) -> int:
    """Return the number of ranks of a group; None is one rank alone. Not a collective."""
    return 1 if group is None else group.size()


def padded(length: int) -> int:
    """Return the length at which parts of at most `length` rows travel."""
    return -(-length // _TRANSPORT_MULTIPLE) * _TRANSPORT_MULTIPLE


def gather_parts(tensor: Tensor, sizes: Sequence[int], group: ProcessGroup | None, kind: Kind) -> Tensor:
    """Put the parts of all ranks behind each other, in group order; no gradient.

    Every rank of the group must call it, with the same `sizes`.

    Args:
        tensor: [sizes[own rank], ...].
        sizes: length of every rank's part.
        group: the ranks.
        kind: what it counts as.

    Returns:
        [sum of sizes, ...], the same on every rank.
    """
    assert len(sizes) == size_of(group), f"{len(sizes)} sizes for {size_of(group)} ranks"
    if group is None or group.size() == 1:
        return tensor
    longest = padded(max(sizes))
    if longest == 0:
        return tensor
    sent = _pad(tensor, longest)
    received = sent.new_empty(len(sizes), *sent.shape)
    _all_gather(received.flatten(0, 1), sent, group=group)
    COMM_STATS.add(kind, (len(sizes) - 1) * sent.numel() * sent.element_size())
    return _cut(received, sizes)


def broadcast_rows(tensor: Tensor, source: int, group: ProcessGroup) -> Tensor:
    """Give all ranks of a group what its rank `source` (a place in the group) holds; counts as deliver.

    Every rank of the group must call it, with a tensor of the same shape and dtype; it is overwritten on all
    but the source.
    """
    if group.size() > 1 and tensor.numel():
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
        moved = 0 if group.rank() == source else tensor.numel() * tensor.element_size()
        COMM_STATS.add("deliver", moved)
    return tensor


def gather_rows(rows: Tensor, sizes: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Gather the student's hidden rows; the gradients of all ranks are summed back to each row's owner.

    Rows travel in their own dtype. Their gradients travel and are summed in fp32, because the ranks' shares
    may cancel, and are rounded to the rows' dtype once, by the owner. autograd gives a gradient the dtype of
    the tensor it is the gradient of, so the gathered rows are handed out in fp32.

    Every rank of the group must call it, and must run the backward pass through it: that is a collective too.

    Args:
        rows: [sizes[own rank], hidden].
        sizes: rows of every rank; they may be zero.
        group: the vocabulary group.

    Returns:
        [sum of sizes, hidden] in fp32; `rows` itself where nothing travels.
    """
    if group is None or group.size() == 1 or not any(sizes):
        return rows
    gathered: Tensor = _Gather.apply(rows, tuple(sizes), group, "rows", "gradients")  # type: ignore[no-untyped-call]
    return gathered


def gather_statistics(packed: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather each rank's packed row statistics; the gradients of all ranks are summed back to each rank.

    Every rank of the group must call it, and must run the backward pass through it: that is a collective too.

    Args:
        packed: [numbers], as many on every rank.
        group: the vocabulary group.

    Returns:
        [ranks, numbers].
    """
    if group is None or group.size() == 1 or not packed.numel():
        return packed.expand(size_of(group), -1)
    sizes = (len(packed),) * group.size()
    gathered: Tensor = _Gather.apply(packed, sizes, group, "statistics", "statistics")  # type: ignore[no-untyped-call]
    return gathered.view(group.size(), -1)


class _Gather(Function):
    """All-gather of uneven parts, handed out in fp32, with reduce-scatter in fp32 as its adjoint."""

    @staticmethod
    def forward(
        context: Any, tensor: Tensor, sizes: tuple[int, ...], group: ProcessGroup, there: Kind, back: Kind
    ) -> Tensor:
        """Gather; `there` and `back` are what both directions count as."""
        context.sizes, context.group, context.kind = sizes, group, back
        return gather_parts(tensor.detach(), sizes, group, there).float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Sum the gradient of each rank's part over all ranks, onto that rank, in fp32."""
        sizes, group = context.sizes, context.group
        longest = padded(max(sizes))
        parts = torch.split(gradients[0], list(sizes))
        sent = torch.stack([_pad(part, longest) for part in parts])  # [ranks, longest, ...]
        received = torch.empty_like(sent[0])
        _reduce_scatter(received, sent.flatten(0, 1), group=group)
        COMM_STATS.add(context.kind, (len(sizes) - 1) * received.numel() * received.element_size())
        return received[: sizes[group.rank()]], None, None, None, None


def _pad(tensor: Tensor, length: int) -> Tensor:
    """Lengthen the first axis with zeros."""
    missing = length - len(tensor)
    if not missing:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _cut(received: Tensor, sizes: Sequence[int]) -> Tensor:
    """Drop the pads: [ranks, longest, ...] -> [sum of sizes, ...]."""
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])
