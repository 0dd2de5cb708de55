"""Softmaxes over a vocabulary that is cut over ranks: statistics of own columns, one exchange, log-sum-exps.

A rank's part of a softmax is its row maximum m and s = sum exp(z - m). All ranks' parts give M = max m and
S = sum s exp(m - M), and log p = (z - M) - log S, which loses no digits to a large M. The maxima carry no
gradient: they cancel. A rank without columns sends the least finite number as its maximum, so that no -inf
meets another. Gold logits travel along: the rank that owns an id sends it, all others send 0.

The exchange's adjoint sums the gradients of all ranks (`parallel.exchange`). Softmaxes whose logits carry no
gradient (a teacher's, a mixture's) are cut out of the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.losses.rows import Columns
from tide_megatron.parallel.exchange import gather_statistics

LOWEST = torch.finfo(torch.float32).min
"""Row maximum of a rank without columns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSumExp:
    """What makes logits of one softmax log-probabilities, on whichever rank their columns are."""

    maximum: Tensor
    """[rows] fp32 over all columns of all ranks, without gradient."""
    log_sum: Tensor
    """[rows] fp32: log of the sum of exp(logit - maximum)."""

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Normalise logits of some columns, [rows, columns] or for one column [rows]."""
        maximum, log_sum = self.maximum, self.log_sum
        if logits.dim() > 1:
            maximum, log_sum = maximum[:, None], log_sum[:, None]
        return (logits - maximum) - log_sum


class OnlineSoftmax:
    """Row maxima and scaled sums of one softmax over the columns seen so far.

    A tile's logits are seen once. Whenever a larger maximum comes, what was added up is scaled down to it.
    """

    def __init__(self, rows: int, device: torch.device, *, has_difference: bool = False) -> None:
        """Start with no column."""
        self.maximum = torch.full((rows,), LOWEST, device=device)
        self.total = torch.zeros(rows, device=device)
        self.difference = torch.zeros(rows, device=device) if has_difference else None
        """Sum of exp(logit - maximum) (logit - other's logit)."""

    @classmethod
    def of(cls, logits: Tensor) -> OnlineSoftmax:
        """Take all own columns at once, [rows, columns] fp32; autograd can go through the sums."""
        made = cls(len(logits), logits.device)
        if logits.shape[1]:
            made.maximum = logits.detach().amax(-1)
        made.total = (logits - made.maximum[:, None]).exp().sum(-1)
        return made

    @classmethod
    def joined(cls, parts: Sequence[OnlineSoftmax]) -> OnlineSoftmax:
        """Put the rows of several behind each other."""
        made = cls(0, parts[0].maximum.device)
        made.maximum = torch.cat([part.maximum for part in parts])
        made.total = torch.cat([part.total for part in parts])
        return made

    def add(self, logits: Tensor, other: Tensor | None = None) -> None:
        """Take in some columns, [rows, columns] fp32; `other`'s are needed for the difference only."""
        if not logits.shape[1]:
            return
        highest = torch.maximum(self.maximum, logits.amax(1))
        kept = (self.maximum - highest).exp_()
        weights = (logits - highest[:, None]).exp_()
        self.total = self.total.mul_(kept).add_(weights.sum(1))
        if self.difference is not None:
            assert other is not None, "a difference is between two models"
            self.difference = self.difference.mul_(kept).add_(weights.mul_(logits - other).sum(1))
        self.maximum = highest


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What one exchange told all ranks about the columns of all of them."""

    softmaxes: list[LogSumExp]
    """In the order given."""
    differences: list[Tensor | None]
    """[rows] sum of p (logit - other's logit), where it was asked for."""
    golds: list[Tensor]
    """[rows] fp32 each, in the order given: the logits of the gold ids."""
    anchor: Tensor
    """0 with a graph that reaches the exchange: its backward is a collective, which no rank may leave out."""


def merge(
    softmaxes: Sequence[OnlineSoftmax], golds: Sequence[Tensor], group: ProcessGroup | None
) -> RowStatistics:
    """Put together what all ranks have seen, in ONE exchange. All ranks of the group call it together.

    Two fp32 numbers travel for a row of a softmax, a third where a difference is asked for, one for a gold
    logit. Where gradients are wanted, its backward pass is a collective too.

    Args:
        softmaxes: this rank's, after its last column; all ranks have the same rows.
        golds: [rows] fp32 logits of gold ids where this rank owns them, else 0.
        group: the vocabulary group.
    """
    differences = [softmax.difference for softmax in softmaxes if softmax.difference is not None]
    parts = [softmax.maximum for softmax in softmaxes] + [softmax.total for softmax in softmaxes]
    parts += [*differences, *golds]
    gathered = gather_statistics(torch.cat(parts), group)  # [ranks, numbers]
    pieces = iter(torch.split(gathered, [len(part) for part in parts], dim=1))
    maxima, totals = ([next(pieces) for _ in softmaxes] for _ in range(2))
    merged, found = [], []
    for softmax, maximum, total in zip(softmaxes, maxima, totals, strict=True):
        highest = maximum.detach().amax(0)  # [rows]
        scale = (maximum.detach() - highest).exp()  # takes each rank's sums to the common maximum
        log_sum = _like((total * scale).sum(0).log(), softmax.total)
        merged.append(LogSumExp(maximum=highest, log_sum=log_sum))
        found.append(None if softmax.difference is None else (next(pieces) * scale).sum(0) / log_sum.exp())
    return RowStatistics(
        softmaxes=merged,
        differences=found,
        golds=[_like(next(pieces).sum(0), gold) for gold in golds],
        anchor=gathered[:, :0].sum(),
    )


def check_golds(gold: Tensor, num_ids: int, name: str = "") -> None:
    """Refuse gold ids that no rank owns, where that costs nothing: on CPU.

    On CUDA the host would have to wait for the comparison, and a failing device assertion would end the
    device's context with a message that names nobody. There the loader has compared every id with the
    vocabularies of all models that read it, on the host, before a device saw it (`data.loader.Loader.known`).

    Args:
        gold: [rows] int64 ids.
        num_ids: of the whole head.
        name: whose head it is, to stand before the message.
    """
    if gold.device.type == "cpu":
        torch._assert_async(
            ((gold >= 0) & (gold < num_ids)).all(),
            f"{name}a gold id lies outside the head's {num_ids} ids, so no rank owns it",
        )


def gold_logits(columns: Columns, gold: Tensor) -> Tensor:
    """Return the logit of each row's gold id where it is among some columns, and 0 elsewhere, [rows]."""
    if not columns.logits.shape[1]:
        return columns.logits.sum(-1)  # zeros with the same graph as on other ranks
    place, is_here = gold_here(columns, gold)
    picked = columns.logits.gather(1, place[:, None]).squeeze(1)
    return torch.where(is_here, picked, torch.zeros_like(picked))


def gold_here(columns: Columns, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each row's gold id stands among some columns, and whether it does, ([rows], [rows])."""
    place, width = gold - columns.start, columns.logits.shape[1]
    is_here = (place >= 0) & (place < width)
    return place.clamp(0, max(0, width - 1)), is_here


def _like(merged: Tensor, local: Tensor) -> Tensor:
    """Drop the gradient of what had none before the exchange packed it together with others."""
    return merged if local.requires_grad else merged.detach()
