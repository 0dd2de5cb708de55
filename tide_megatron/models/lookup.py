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
        if rows.device.type == "cpu":
            context.buffer.index_add_(0, ids.flatten(), rows)  # one row after the other
        else:  # sorted by id first, where index_add_ would use atomics in any order
            context.buffer.index_put_((ids.flatten(),), rows, accumulate=True)
        return None, None
