"""The head loss in plain autograd: from hidden rows of both sides to one scalar.

Logits exist for masked rows and own columns only, once per model however many losses read them, and in fp32;
one packed exchange makes softmaxes of them (`softmax`). Coefficients go in and sums come out: weight and
1/count multiply every item before the sum, so nothing divides afterwards and the gradients of all ranks and
microbatches simply add up (design sections 3 and 6). A group of one rank is the dense case.

This form is the oracle of the fused one; it keeps [rows, own columns] several times in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_megatron.head.inputs import HeadResult, Microbatch
from tide_megatron.head.softmax import OnlineLikelihood, OnlineSoftmax, merge
from tide_megatron.losses.base import LikelihoodLoss, teachers_of
from tide_megatron.losses.rows import Columns, Distribution


def plain_head_loss(batch: Microbatch) -> HeadResult:
    """Evaluate every term on one microbatch. All ranks of its group call it together, and run its backward.

    It makes ONE exchange of k fp32 numbers a rank, and in the backward pass one more: k = 3 rows where any
    term reads likelihoods, + 3 teacher rows for every teacher whose likelihoods a term reads, + 4 pairs for
    every term over columns. (G - 1) * 4 * padded(k) bytes arrive at each of G ranks, both times.
    """
    ours = batch.student.columns
    objective = ours.logits[:0].sum()  # 0, and every rank's backward reaches its body and head
    sums: dict[str, Tensor] = {}
    if not batch.losses:
        return HeadResult(objective=objective, sums=sums)
    with torch.no_grad():
        theirs = {name: batch.teachers[name].columns for name in teachers_of(batch.losses)}
    values, anchor = _values(batch, ours, theirs)
    objective = objective + anchor
    rows = batch.rows
    for name, loss in batch.losses.items():
        coefficients = loss.coefficients(rows.rows, batch.clock)  # [items]
        if isinstance(loss, LikelihoodLoss):  # one over columns gives this rank's columns' share of all items
            coefficients = coefficients * rows.is_own(loss.item_sample(rows.rows))
        count = rows.counts[name]
        objective = objective + (coefficients * (loss.weight / count) * values[name]).sum()
        sums[name] = (coefficients.double() * values[name].detach().double()).sum() / count
    return HeadResult(objective=objective, sums=sums)


def _values(batch: Microbatch, ours: Columns, theirs: dict[str, Columns]) -> tuple[dict[str, Tensor], Tensor]:
    """Return each term's values [items] (over columns: this rank's share) and the exchange's anchor."""
    rows, clock = batch.rows.rows, batch.clock
    softened = [
        logits
        for loss in batch.by_columns.values()
        for logits in loss.softened(ours, theirs[loss.teacher], rows, clock)
    ]
    readers: dict[str | None, tuple[Columns, Tensor]] = {}
    for loss in batch.by_likelihood.values():
        readers[None] = (ours, rows.gold)
        if loss.teacher is not None:
            readers[loss.teacher] = (theirs[loss.teacher], rows.link(loss.teacher).gold)
    found = merge(
        [OnlineLikelihood.of(columns, gold) for columns, gold in readers.values()],
        [OnlineSoftmax.of(logits) for logits in softened],
        batch.group,
    )
    pairs = (
        Distribution(softmax.log_probabilities(logits))
        for softmax, logits in zip(found.softmaxes, softened, strict=True)
    )
    values = {name: loss.value(next(pairs), next(pairs)) for name, loss in batch.by_columns.items()}
    likelihoods = dict(zip(readers, [read.log_probability for read in found.likelihoods], strict=True))
    for name, reader in batch.by_likelihood.items():
        teacher = None if reader.teacher is None else likelihoods[reader.teacher]
        values[name] = reader.from_likelihoods(likelihoods[None], teacher, rows, clock)
    return values, found.anchor
