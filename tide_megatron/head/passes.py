"""The passes over a slab's logits as pure functions of tensors, for a compiler to make one kernel of each.

`statistics` reads every model's logits and gives a number or three a row and softmax; `slopes` reads them
once more, gives every term's value and writes the objective's derivative where the student's logits were;
`row_sums` is the reading between, for losses that ask for a sum over the normalised row. Losses, models and
options are the functions' code; everything that varies from step to step is a tensor.

What eager code cuts off or puts aside is masked here, because a comparison costs a kernel nothing: padding,
ids that a loss does not compare, the gold id. Teachers' rows are read where they lie. Rows are cut into
blocks of columns, and what the blocks say is put together in a second, small step. For Inductor that is what
makes ONE kernel of a pass (docs/head_loss.md has its Triton code counted): it joins a sum over a row with a
store into the same row only by keeping the row, but a block of 64 stands in registers.

Uncompiled they give the same numbers and take several slabs of temporaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tide_megatron.head.softmax import LOWEST
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import Distribution

STATISTICS_BLOCK = 1024
"""Columns of a block of `statistics` and `row_sums`: what they write is under 1 % of what they read."""
SLOPES_BLOCK = 64
"""Columns of a block of `slopes`: the most of which Inductor always keeps all in registers."""
IMPOSSIBLE = -1e4
"""Log-probability of an id that is not compared; its exponential is 0."""

Terms = tuple[tuple[ColumnLoss, int], ...]
"""Losses over columns, each with the number of its teacher's logits; the student's have number 0."""


class Gold(NamedTuple):
    """Rows whose gold id's likelihood is wanted."""

    place: Tensor
    """[rows] int64: at which column the id stands; anything outside where another rank owns it."""
    columns: Tensor
    """[] int64: how many columns are real."""


class TermRows(NamedTuple):
    """What a term over columns knows of each of the student's rows."""

    compared: Tensor
    """[] int64: how many of these columns are compared."""
    teacher_row: Tensor | None
    """[rows] int64: the teacher's row of the pair, any where there is none; None: the row of that number."""
    share: Tensor | None
    """[rows] the loss's `target_share`."""


class TermSlopes(NamedTuple):
    """What a term needs for values and derivatives."""

    rows: TermRows
    student: tuple[Tensor, Tensor]
    """Maximum and log of the scaled sum over all columns of all ranks, [rows] each."""
    target: tuple[Tensor, Tensor]
    row: Tensor | None
    """[rows] the row statistic."""
    factor: Tensor
    """[rows] of the derivative; 0 where a row has no pair, whatever stands in the other numbers."""


class GoldSlopes(NamedTuple):
    """What the derivative through gold log-likelihoods needs."""

    place: Tensor
    softmax: tuple[Tensor, Tensor]
    factor: Tensor
    """[rows] minus the objective's derivative by the log-likelihood."""
    own: Tensor
    """[rows] the derivative by the gold id's own logit, which is known better than as a difference."""


class Sums(NamedTuple):
    """One softmax's statistics, [rows] each, as `softmax.OnlineSoftmax` has them."""

    maximum: Tensor
    total: Tensor
    difference: Tensor | None


def blocks_of(logits: Tensor, block: int) -> Tensor:
    """Cut [rows, columns padded to whole blocks] into [rows, blocks, block] without a copy."""
    return logits.view(len(logits), logits.shape[1] // block, block)


def statistics(
    terms: Terms,
    logits: Sequence[Tensor],
    golds: Sequence[Gold | None],
    rows: Sequence[TermRows],
) -> tuple[list[Sums], list[Sums]]:
    """Return what some columns say of every softmax.

    Args:
        terms: over columns.
        logits: of each model, cut into blocks of `STATISTICS_BLOCK` columns (`blocks_of`), any float dtype.
        golds: of each model, or None where its likelihoods are not read.
        rows: of each term.

    Returns:
        Of each gold: the softmax of all other ids. Of each term: its student's and its target's softmax.
    """
    others = []
    for part, gold in zip(logits, golds, strict=True):
        if gold is not None:
            ids = _ids(part)
            is_left_out = (ids == _each(gold.place)) | (ids >= gold.columns)
            others.append(_sums(part.float().masked_fill(is_left_out, LOWEST), None))
    softmaxes = []
    for (loss, teacher), term in zip(terms, rows, strict=True):
        ours, target = (
            torch.where(_ids(logits[0]) < term.compared, part, LOWEST)
            for part in _softened(loss, logits[0], logits[teacher], term)
        )
        softmaxes.append(_sums(ours, ours - target if loss.row_statistic == "kl" else None))
        softmaxes.append(_sums(target, None))
    return others, softmaxes


def row_sums(terms: Terms, logits: Sequence[Tensor], slopes: Sequence[TermSlopes]) -> list[Tensor]:
    """Return each term's share of the sum that it asks for, [rows].

    Args:
        terms: over columns that ask for a sum.
        logits: like those of `statistics`.
        slopes: of each term.
    """
    return [
        loss.row_sum(*_distributions(loss, logits[0], logits[teacher], known)).sum(-1)
        for (loss, teacher), known in zip(terms, slopes, strict=True)
    ]


def slopes(
    terms: Terms,
    writes: bool,
    logits: Sequence[Tensor],
    gold: GoldSlopes | None,
    slopes: Sequence[TermSlopes],
) -> list[Tensor]:
    """Return each term's value of each of the student's rows; write the derivative over the student's logits.

    Args:
        terms: over columns.
        writes: leave the logits alone where this is not so: values only.
        logits: like those of `statistics`, cut into blocks of `SLOPES_BLOCK` columns.
        gold: of terms over likelihoods.
        slopes: of each term. A value of a row without a pair means nothing.
    """
    values, dlogits = [], [] if gold is None else [_through_gold(logits[0], gold)]
    for (loss, teacher), known in zip(terms, slopes, strict=True):
        student, target = _distributions(loss, logits[0], logits[teacher], known)
        values.append(loss.value(student, target).sum(-1))
        if writes:
            factor = _each(known.factor)
            slope = loss.slope(student, target, None if known.row is None else known.row[:, None])
            dlogits.append(torch.where(factor != 0, slope * factor, 0.0))
    if writes:
        logits[0].copy_(sum(dlogits[1:], dlogits[0]))
    return values


def _softened(loss: ColumnLoss, ours: Tensor, theirs: Tensor, rows: TermRows) -> tuple[Tensor, Tensor]:
    """Return both sides over T, [rows, the student's blocks, block]; on ids not compared anything."""
    missing = ours.shape[1] - theirs.shape[1]
    if missing > 0:
        theirs = torch.nn.functional.pad(theirs, (0, 0, 0, missing))
    theirs = theirs[:, : ours.shape[1]]
    if rows.teacher_row is not None:
        theirs = theirs[rows.teacher_row]
    return loss.soften(ours, theirs, None if rows.share is None else _each(rows.share))


def _distributions(
    loss: ColumnLoss, ours: Tensor, theirs: Tensor, known: TermSlopes
) -> tuple[Distribution, Distribution]:
    is_compared = _ids(ours) < known.rows.compared
    softened = _softened(loss, ours, theirs, known.rows)
    student, target = (
        Distribution(torch.where(is_compared, (part - _each(maximum)) - _each(log_sum), IMPOSSIBLE))
        for part, (maximum, log_sum) in zip(softened, (known.student, known.target), strict=True)
    )
    return student, target


def _through_gold(ours: Tensor, gold: GoldSlopes) -> Tensor:
    """Return the derivative through gold log-likelihoods; anything on padding."""
    maximum, log_sum = gold.softmax
    dlogits = ((ours.float() - _each(maximum)) - _each(log_sum)).exp() * _each(gold.factor)
    return torch.where(_ids(ours) == _each(gold.place), _each(gold.own), dlogits)


def _sums(logits: Tensor, difference: Tensor | None) -> Sums:
    """Return one softmax's statistics, [rows], from blocks [rows, blocks, block]."""
    maxima = logits.amax(-1)
    weights = (logits - maxima[..., None]).exp()
    totals = [weights.sum(-1)] + ([] if difference is None else [(weights * difference).sum(-1)])
    highest = maxima.amax(-1)
    scale = (maxima - highest[:, None]).exp()
    total, *differences = ((part * scale).sum(-1) for part in totals)
    return Sums(maximum=highest, total=total, difference=differences[0] if differences else None)


def _ids(blocks: Tensor) -> Tensor:
    """Return the columns' numbers, [blocks, block]."""
    number = blocks.shape[1] * blocks.shape[2]
    return torch.arange(number, device=blocks.device).view(blocks.shape[1:])


def _each(numbers: Tensor) -> Tensor:
    """Return [rows, 1, 1] of [rows]."""
    return numbers[:, None, None]
