"""Softmaxes over a vocabulary that is cut over ranks: statistics of own columns, one exchange, log-sum-exps.

A rank's part of a softmax is its row maximum m and s = sum exp(z - m). All ranks' parts give M = max m and
S = sum s exp(m - M), and log p = (z - M) - log S, which loses no digits to a large M. The maxima carry no
gradient: they cancel. A rank without columns sends the least finite number as its maximum, so that no -inf
meets another.

How likely a gold id g is comes from a softmax WITHOUT it: log p = -log(1 + r), where r is the sum of
exp(z_v - z_g) over all v but g. Taken from the whole softmax, 1 - p has no digits below 1e-7, and log p is 0
there. The gold id's logit travels along: the rank that owns the id sends it, all others send 0.

The exchange's adjoint sums the gradients of all ranks (`parallel.exchange`). Softmaxes whose logits carry no
gradient (a teacher's, a mixture's) are cut out of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
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
        return (logits - maximum).sub_(log_sum)  # in place: fresh memory costs as much as the arithmetic


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

    def take(self, maximum: Tensor, total: Tensor, difference: Tensor | None) -> None:
        """Take in what was added up over other columns, [rows] each."""
        highest = torch.maximum(self.maximum, maximum)
        kept, new = (self.maximum - highest).exp_(), (maximum - highest).exp_()
        self.total = self.total.mul_(kept).add_(total * new)
        if self.difference is not None:
            assert difference is not None, "a difference was asked for"
            self.difference = self.difference.mul_(kept).add_(difference * new)
        self.maximum = highest


class OnlineLikelihood:
    """What says how likely gold ids are, over the columns seen so far: the softmax of all other ids.

    An id that is its rank's only column leaves that rank a sum of 1 at the lowest maximum: nothing.
    """

    def __init__(self, gold: Tensor) -> None:
        """Start with no column, for [rows] int64 gold ids."""
        self.gold = gold
        self.others = OnlineSoftmax(len(gold), gold.device)
        self.logits = torch.zeros(len(gold), device=gold.device)
        """[rows] fp32 the gold ids', 0 where another rank owns them."""

    @classmethod
    def of(cls, columns: Columns, gold: Tensor) -> OnlineLikelihood:
        """Take all own columns at once; autograd can go through both parts."""
        made = cls(gold)
        ids = torch.arange(columns.start, columns.start + columns.logits.shape[1], device=gold.device)
        made.others = OnlineSoftmax.of(columns.logits.masked_fill(ids == gold[:, None], LOWEST))
        made.logits = gold_logits(columns, gold)
        return made

    @classmethod
    def joined(cls, parts: Sequence[OnlineLikelihood]) -> OnlineLikelihood:
        """Put the rows of several behind each other."""
        made = cls(torch.cat([part.gold for part in parts]))
        made.others = OnlineSoftmax.joined([part.others for part in parts])
        made.logits = torch.cat([part.logits for part in parts])
        return made

    def add(self, columns: Columns) -> None:
        """Take in some columns; the gold ids' logits are put aside meanwhile, and back where they were."""
        logits = columns.logits
        if not logits.shape[1]:
            return
        place, is_here = (part[:, None] for part in gold_here(columns, self.gold))
        picked = logits.gather(1, place)
        logits.scatter_(1, place, picked.masked_fill(is_here, LOWEST))
        self.others.add(logits)
        logits.scatter_(1, place, picked)
        self.logits += picked.masked_fill_(~is_here, 0.0)[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldLikelihood:
    """How likely a model finds its rows' gold ids, over all columns of all ranks; digits wherever p is."""

    others: LogSumExp
    """Of all ids but the gold one."""
    logits: Tensor
    """[rows] fp32: the gold ids'."""

    @functools.cached_property
    def log_probability(self) -> Tensor:
        """[rows] fp32: -log(1 + r); the derivative by log r is p - 1, by the same digits."""
        log_ratio = (self.others.maximum - self.logits) + self.others.log_sum
        return -torch.nn.functional.softplus(log_ratio)

    @functools.cached_property
    def complement(self) -> Tensor:
        """[rows] fp32: 1 - p."""
        return -torch.expm1(self.log_probability)

    @functools.cached_property
    def softmax(self) -> LogSumExp:
        """Of all ids."""
        maximum = torch.maximum(self.others.maximum, self.logits)
        others = (self.others.maximum - maximum) + self.others.log_sum
        return LogSumExp(maximum=maximum, log_sum=torch.logaddexp(others, self.logits - maximum))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What one exchange told all ranks about the columns of all of them."""

    likelihoods: list[GoldLikelihood]
    """In the order given."""
    softmaxes: list[LogSumExp]
    """In the order given."""
    differences: list[Tensor | None]
    """[rows] sum of p (logit - other's logit), where it was asked for; one for each of `softmaxes`."""
    anchor: Tensor
    """0 with a graph that reaches the exchange: its backward is a collective, which no rank may leave out."""


def merge(
    likelihoods: Sequence[OnlineLikelihood], softmaxes: Sequence[OnlineSoftmax], group: ProcessGroup | None
) -> RowStatistics:
    """Put together what all ranks have seen, in ONE exchange. All ranks of the group call it together.

    Two fp32 numbers travel for a row of a softmax, a third where a difference is asked for, three for a row
    of a likelihood. Where gradients are wanted, its backward pass is a collective too.

    Args:
        likelihoods: this rank's, after its last column; all ranks have the same rows.
        softmaxes: likewise.
        group: the vocabulary group.
    """
    every = [*(likelihood.others for likelihood in likelihoods), *softmaxes]
    differences = [softmax.difference for softmax in every if softmax.difference is not None]
    golds = [likelihood.logits for likelihood in likelihoods]
    parts = [softmax.maximum for softmax in every] + [softmax.total for softmax in every]
    parts += [*differences, *golds]
    gathered = gather_statistics(torch.cat(parts), group)  # [ranks, numbers]
    pieces = iter(torch.split(gathered, [len(part) for part in parts], dim=1))
    maxima, totals = ([next(pieces) for _ in every] for _ in range(2))
    merged, found = [], []
    for softmax, maximum, total in zip(every, maxima, totals, strict=True):
        highest = maximum.detach().amax(0)  # [rows]
        scale = (maximum.detach() - highest).exp()  # takes each rank's sums to the common maximum
        log_sum = _like((total * scale).sum(0).log(), softmax.total)
        merged.append(LogSumExp(maximum=highest, log_sum=log_sum))
        found.append(None if softmax.difference is None else (next(pieces) * scale).sum(0) / log_sum.exp())
    return RowStatistics(
        likelihoods=[
            GoldLikelihood(others=others, logits=_like(next(pieces).sum(0), gold))
            for others, gold in zip(merged, golds, strict=False)
        ],
        softmaxes=merged[len(golds) :],
        differences=found[len(golds) :],
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
