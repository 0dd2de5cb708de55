"""The head loss in plain autograd: from hidden rows of both sides to one scalar.

Every rank of a head group has ALL the group's hidden rows and its own columns of every head. Logits exist
for picked rows and own columns only, once per model however many losses read them, and in fp32; one packed
exchange makes softmaxes of them (`statistics`). Coefficients go in and sums come out: weight and 1/count
multiply every item before the sum, so nothing divides afterwards and the gradients of all ranks and
microbatches simply add up (design sections 3 and 6). A group of one rank is the dense case.

This form is the oracle of the fused one; it keeps [rows, own columns] several times in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.base.clock import Clock
from tide_megatron.head.parts import HeadInput, HeadLoss, check_rows, exactly
from tide_megatron.head.statistics import exchange_statistics, gold_logits
from tide_megatron.losses.columns import Columns
from tide_megatron.losses.rows import ColumnLoss, LikelihoodLoss, Loss, Rows
from tide_megatron.parallel.exchange import size_of


def head_loss(  # noqa: PLR0913 - what a step knows, and which ranks share it
    student: HeadInput,
    answers: Mapping[str, HeadInput],
    losses: Mapping[str, Loss],
    rows: Rows,
    counts: Mapping[str, Tensor],
    clock: Clock,
    *,
    group: ProcessGroup | None = None,
    own: tuple[int, int] | None = None,
    is_exact: bool = False,
) -> HeadLoss:
    """Evaluate every term on the hidden rows of one microbatch of each rank of a head group.

    All ranks of the group call it together and run its backward together, also those without rows, columns
    or items; alone (no group) it is no collective. The result is this rank's SHARE, and the shares of all
    ranks add up: of a loss over columns what its columns give for all items, of one over likelihoods the
    items of its own samples.

    It makes ONE exchange of k fp32 numbers a rank, and in the backward pass one more: k = 3 rows where any
    term reads likelihoods, + 3 teacher rows for every teacher whose likelihoods a term reads, + 4 pairs for
    every term over columns. (G - 1) * 4 * padded(k) bytes arrive at each of G ranks, both times.

    Args:
        student: all the group's hidden rows with this rank's columns of the head, with gradient.
        answers: the same of each teacher; no gradient reaches them.
        losses: the terms by name.
        rows: what the losses may know of the rows; there may be none, then the objective is 0 with a graph.
        counts: each term's divisor, summed over all ranks and microbatches of the step. A term whose count is
            0 is absent from the result, never NaN.
        clock: where the run stands.
        group: the head group.
        is_exact: multiply in fp32 whatever the weights' dtypes.
        own: this rank's samples in `rows`, first and last plus one; None: all, for a rank alone.
    """
    assert own is not None or size_of(group) == 1, "which samples are this rank's own must be said in a group"
    if is_exact:
        student, answers = exactly(student, answers)
    active = {name: loss for name, loss in losses.items() if float(counts[name]) != 0}
    if active:
        check_rows(student, answers, active, rows)
    ours = student.columns
    with torch.no_grad():
        names = {loss.teacher for loss in active.values() if loss.teacher is not None}
        theirs = {name: answers[name].columns for name in sorted(names)}
    objective = ours.logits[:0].sum()  # 0, and every rank's backward reaches its body and head
    sums: dict[str, Tensor] = {}
    if not active:
        return HeadLoss(objective=objective, sums=sums)
    values, anchor = _evaluate(ours, theirs, active, (rows, clock), group)
    objective = objective + anchor
    for name, loss in active.items():
        count = float(counts[name])
        coefficients = loss.coefficients(rows, clock)  # [items]
        if own is not None and isinstance(loss, LikelihoodLoss):
            sample = loss.item_sample(rows)
            coefficients = coefficients * ((sample >= own[0]) & (sample < own[1]))
        objective = objective + (coefficients * (loss.weight / count) * values[name]).sum()
        sums[name] = (coefficients.double() * values[name].detach().double()).sum() / count
    return HeadLoss(objective=objective, sums=sums)


def _evaluate(
    ours: Columns,
    theirs: Mapping[str, Columns],
    losses: Mapping[str, Loss],
    where: tuple[Rows, Clock],
    group: ProcessGroup | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return each term's values [items] (over columns: this rank's share) and the exchange's anchor."""
    rows, clock = where
    by_columns = {name: loss for name, loss in losses.items() if isinstance(loss, ColumnLoss)}
    by_likelihood = {name: loss for name, loss in losses.items() if isinstance(loss, LikelihoodLoss)}
    softened = [
        logits
        for loss in by_columns.values()
        for logits in loss.softened(ours, theirs[str(loss.teacher)], rows, clock)
    ]
    readers: dict[str | None, tuple[Columns, Tensor]] = {}
    for loss in by_likelihood.values():
        readers[None] = (ours, rows.gold)
        if loss.teacher is not None:
            readers[loss.teacher] = (theirs[loss.teacher], rows.link(loss.teacher).gold)
    found = exchange_statistics(
        [*softened, *(columns.logits for columns, _ in readers.values())],
        [gold_logits(columns, gold) for columns, gold in readers.values()],
        group,
    )
    logarithms = [
        normaliser.log_probabilities(logits)
        for normaliser, logits in zip(found.normalisers, [*softened, *found.golds], strict=True)
    ]
    values = {
        name: loss.divergence(*logarithms[2 * index : 2 * index + 2])
        for index, (name, loss) in enumerate(by_columns.items())
    }
    likelihoods = dict(zip(readers, logarithms[len(softened) :], strict=True))
    for name, reader in by_likelihood.items():
        teacher = None if reader.teacher is None else likelihoods[reader.teacher]
        values[name] = reader.from_likelihoods(likelihoods[None], teacher, rows, clock)
    return values, found.anchor
