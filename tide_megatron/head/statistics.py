"""Softmaxes over a vocabulary that is cut over ranks: local statistics, one packed exchange, normalisers.

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

from tide_megatron.losses.columns import Columns
from tide_megatron.parallel.exchange import gather_statistics

LOWEST = torch.finfo(torch.float32).min
"""Row maximum of a rank without columns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normaliser:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one exchange told all ranks."""

    normalisers: list[Normaliser]
    """In the order of the softmaxes."""
    golds: list[Tensor]
    """[rows] fp32 each, in the order given: the logits of the gold ids."""
    anchor: Tensor
    """0 with a graph that reaches the exchange: its backward is a collective, which no rank may leave out."""


def exchange_statistics(
    softmaxes: Sequence[Tensor], golds: Sequence[Tensor], group: ProcessGroup | None
) -> Statistics:
    """Normalise softmaxes over the columns of all ranks, in one exchange.

    All ranks of the group call it together. Two fp32 numbers travel for a row of a softmax, one for a gold
    logit.

    Args:
        softmaxes: [rows, own columns] fp32 each; a rank may have no columns, all have the same rows.
        golds: [rows] fp32 each, from `gold_logits`.
        group: the head group.
    """
    with torch.no_grad():
        maxima = [_row_maximum(logits) for logits in softmaxes]
    sums = [
        (logits - maximum[:, None]).exp().sum(-1) for logits, maximum in zip(softmaxes, maxima, strict=True)
    ]
    packed = torch.cat([*maxima, *sums, *golds])
    gathered = gather_statistics(packed, group)  # [ranks, numbers]
    parts = torch.split(gathered, [len(part) for part in (*maxima, *sums, *golds)], dim=1)
    many = len(softmaxes)
    normalisers = []
    for logits, maximum, total in zip(softmaxes, parts[:many], parts[many : 2 * many], strict=True):
        merged, _ = merge_parts(maximum, total)
        normalisers.append(dataclasses.replace(merged, log_sum=_like(merged.log_sum, logits)))
    found = [_like(part.sum(0), gold) for part, gold in zip(parts[2 * many :], golds, strict=True)]
    return Statistics(normalisers=normalisers, golds=found, anchor=gathered[:, :0].sum())


def merge_parts(maxima: Tensor, totals: Tensor) -> tuple[Normaliser, Tensor]:
    """Put all ranks' parts of one softmax together.

    Args:
        maxima: [ranks, rows] row maxima; no gradient goes through them.
        totals: [ranks, rows] sums of exp(logit - the rank's maximum).

    Returns:
        The normaliser, and the factor [ranks, rows] that takes each rank's sums to the common maximum.
    """
    maxima = maxima.detach()
    highest = maxima.amax(0)  # [rows]
    scale = (maxima - highest).exp()
    return Normaliser(maximum=highest, log_sum=(totals * scale).sum(0).log()), scale


def gold_logits(columns: Columns, gold: Tensor) -> Tensor:
    """Return the logit of each row's gold id where this rank owns it and 0 elsewhere, [rows].

    Args:
        columns: fp32 logits of the ids that are here.
        gold: [rows] int64 ids.
    """
    check_golds(gold, columns.vocabulary)
    return picked_golds(columns, gold)


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


def picked_golds(columns: Columns, gold: Tensor) -> Tensor:
    """Return the gold logits among some columns and 0 for those elsewhere, [rows]."""
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


def _row_maximum(logits: Tensor) -> Tensor:
    if not logits.shape[1]:
        return logits.new_full((len(logits),), LOWEST)
    return logits.amax(-1)


def _like(merged: Tensor, local: Tensor) -> Tensor:
    """Drop the gradient of what had none before the exchange packed it together with others."""
    return merged if local.requires_grad else merged.detach()
