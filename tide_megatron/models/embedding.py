"""Look up token embeddings of a trained model; their gradient goes straight to the rows that were read.

torch's own embedding makes a gradient as large as the table for every microbatch, in the table's dtype, and
megatron-core's DDP then adds all of it to its fp32 buffer. With 152,000 ids and some thousand tokens nearly
all of that is zeros: it was the most expensive operation of a step beside the head (docs/head_loss.md). Here
only the rows of the ids in the batch are touched, and several occurrences of an id are summed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tide_megatron.base.device_kind import kind_of


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of some ids, [tokens, samples, hidden], as megatron-core orders them.

    Args:
        table: [vocabulary, hidden], a parameter inside megatron-core's DDP: its `main_grad` receives the
            gradient, nothing goes through `grad`. The DDP must not overlap its reduction, which waits for
            `grad`.
        ids: [samples, tokens] int64.
    """
    return _LookUp.apply(table, ids.T)  # type: ignore[no-any-return, no-untyped-call]


class _LookUp(Function):
    """Rows of a table; the way back adds to `table.main_grad`."""

    @staticmethod
    def forward(context: Any, table: Tensor, ids: Tensor) -> Tensor:
        """Gather rows."""
        context.save_for_backward(ids)
        context.buffer = table.main_grad  # type: ignore[attr-defined]
        return torch.nn.functional.embedding(ids, table)

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[None, None]:
        """Add to the rows of the ids, in an order that does not change from run to run."""
        (ids,) = context.saved_tensors
        rows = incoming[0].flatten(0, 1).to(context.buffer.dtype)
        if kind_of(rows.device) == "cpu":
            context.buffer.index_add_(0, ids.flatten(), rows)  # one row after the other
        else:
            add_by_id(context.buffer, ids.flatten(), rows)
        return None, None


def add_by_id(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows to the rows of a table that their ids name, in an order that does not change; for CUDA.

    There `index_add_` adds by atomics in any order, and `index_put_` one occurrence of an id after the other,
    while a third of all tokens may be the mask or the pad. Here distinct ids are numbered, torch's embedding
    gradient sums the rows of each number in segments, and each sum is added once. Nothing waits for the
    device: how many distinct ids there are stays unknown to the host.

    Args:
        table: [vocabulary, hidden], added to in place.
        ids: [tokens] int64.
        rows: [tokens, hidden] in the table's dtype.
    """
    tokens = len(ids)
    if not tokens:
        return
    ordered, order = ids.sort(stable=True)
    is_new = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))
    number = torch.empty_like(ids).scatter_(0, order, is_new.cumsum(0))  # [tokens] of the token's id
    sums = torch.ops.aten.embedding_dense_backward(rows, number, tokens, -1, False)  # [tokens, hidden]
    # There are as many sums as tokens; those of no id are zero and go to rows of their own, not all to one.
    place = torch.arange(tokens, device=ids.device).remainder_(len(table)).scatter_(0, number, ids)
    table.index_add_(0, place, sums)
