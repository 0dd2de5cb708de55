"""The head loss in one pass over slabs: values and gradients together, memory by a budget (design section 3).

For each slab of rows (`slabs`): logits of the student and of every teacher that is heard, once, tile by tile
(`tiles`); local softmax statistics (`running`); ONE packed exchange of them over the head group; then, from
the same logits, every term's value, the derivative by the student's logits, and from that the gradients of
the hidden rows and of this rank's columns of the head. Four matrix products, none twice.

It differs from autograd's way in two things. Terms over gold likelihoods are differentiated on vectors of one
number a row, where autograd is cheap; every rank does so for ALL items, so no gradient of a statistic travels
back. The head weight's gradient is added straight into an fp32 buffer (DDP's `main_grad`) while the values
are computed: the backward pass only releases the hidden rows' gradients, and must be called with 1.

A unit longer than a slab is worked on in two phases: first the likelihoods of all its rows, whose logits are
not kept, then its rows in any slabs, with known derivatives; its logits are made twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from tide_megatron.base.clock import Clock
from tide_megatron.head.budget import BUDGET_MIB, MIB
from tide_megatron.head.parts import HeadInput, HeadLoss, check_rows, exactly
from tide_megatron.head.work import Work
from tide_megatron.head.workspace import Workspace
from tide_megatron.losses.rows import Loss, Rows
from tide_megatron.parallel.exchange import size_of


def fused_head_loss(  # noqa: PLR0913 - the plain form's arguments and two of its own
    student: HeadInput,
    answers: Mapping[str, HeadInput],
    losses: Mapping[str, Loss],
    rows: Rows,
    counts: Mapping[str, Tensor],
    clock: Clock,
    *,
    group: ProcessGroup | None = None,
    own: tuple[int, int] | None = None,
    budget_bytes: int | None = None,
    workspace: Workspace | None = None,
    compiled: bool = False,
    is_exact: bool = False,
) -> HeadLoss:
    """Evaluate every term, and its gradients, on the hidden rows of one microbatch of a head group.

    The same values, sums and gradients as `plain.head_loss`, which holds it to account; see there for the
    other arguments. All ranks of the group call it together.

    Args:
        student: with gradient in `hidden`, and `gradient` to add the weight's into; without both it evaluates
            and writes nothing.
        answers: see `plain`.
        losses: see `plain`.
        rows: see `plain`.
        counts: see `plain`.
        clock: see `plain`.
        group: see `plain`.
        own: see `plain`.
        budget_bytes: for all that stands beside weights, hidden rows and their gradients; None: the device's
            default.
        workspace: buffers kept between calls; None: none are.
        is_exact: multiply in fp32 whatever the weights' dtypes.
        compiled: let torch.compile fuse each term's elementwise part.

    Raises:
        ConfigError: when the budget does not hold one row.
    """
    assert own is not None or size_of(group) == 1, "which samples are this rank's own must be said in a group"
    assert student.gradient is not None or not student.hidden.requires_grad, (
        "nowhere to add the weight's gradient"
    )
    if is_exact:
        student, answers = exactly(student, answers)
    active = {name: loss for name, loss in losses.items() if float(counts[name]) != 0}
    if active:
        check_rows(student, answers, active, rows)
    means = (workspace or Workspace(), compiled)
    work = Work(student, answers, active, counts, clock, (group, own), means)
    if active and len(rows.gold):
        device = student.hidden.device.type
        work.all(rows, BUDGET_MIB[device] * MIB if budget_bytes is None else budget_bytes)
    value = torch.stack(
        [active[name].weight * total for name, total in work.sums.items()] or [work.zero]
    ).sum()
    if not student.hidden.requires_grad:
        return HeadLoss(objective=value.float(), sums=work.sums)
    objective: Tensor = _Release.apply(student.hidden, value.float(), work.hidden_gradient)  # type: ignore[no-untyped-call]
    return HeadLoss(objective=objective, sums=work.sums)


class _Release(Function):
    """A value whose gradient by the hidden rows is known already."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """Keep the gradient; return the value."""
        context.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        """Hand the gradient on, fp32; the head's was added with factor 1 already, so no other may come."""
        torch._assert_async((incoming[0] == 1).all(), "the head loss was scaled after it was computed")
        (gradient,) = context.saved_tensors
        return gradient, None, None
