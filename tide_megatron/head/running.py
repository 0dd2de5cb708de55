"""Softmax statistics that grow tile by tile, and their merger over ranks: `statistics` for the fused form.

A tile's logits are seen once. Whenever a larger maximum comes, what was added up so far is scaled down to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.head.statistics import LOWEST, Normaliser, merge_parts
from tide_megatron.parallel.exchange import gather_statistics


class Running:
    """Row maxima and scaled sums of one softmax over the columns seen so far."""

    def __init__(self, rows: int, device: torch.device, *, has_gap: bool = False) -> None:
        """Start with no column: the maximum is the least finite number, so that no -inf meets another."""
        self.maximum = torch.full((rows,), LOWEST, device=device)
        self.total = torch.zeros(rows, device=device)
        self.gap = torch.zeros(rows, device=device) if has_gap else None
        """Sum of exp(logit - maximum) (logit - other's logit)."""

    def add(self, logits: Tensor, other: Tensor | None = None) -> None:
        """Take in some columns, [rows, columns] fp32; `other`'s are needed for the gap only."""
        if not logits.shape[1]:
            return
        highest = torch.maximum(self.maximum, logits.amax(1))
        kept = (self.maximum - highest).exp_()
        weights = (logits - highest[:, None]).exp_()
        self.total = self.total.mul_(kept).add_(weights.sum(1))
        if self.gap is not None:
            assert other is not None, "a gap is between two models"
            self.gap = self.gap.mul_(kept).add_(weights.mul_(logits - other).sum(1))
        self.maximum = highest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged:
    """The statistics of all ranks' columns."""

    normalisers: list[Normaliser]
    """One a softmax."""
    gaps: list[Tensor | None]
    """[rows] sum of p (logit - other's logit) where it was asked for."""
    golds: list[Tensor]
    """[rows] logits of gold ids."""


def merge(softmaxes: Sequence[Running], golds: Sequence[Tensor], group: ProcessGroup | None) -> Merged:
    """Put together what all ranks have seen, in ONE exchange. All ranks of the group call it together.

    Args:
        softmaxes: this rank's, after its last column.
        golds: [rows] logits of gold ids where this rank owns them, else 0.
        group: the head group.
    """
    gaps = [softmax.gap for softmax in softmaxes if softmax.gap is not None]
    parts = [softmax.maximum for softmax in softmaxes] + [softmax.total for softmax in softmaxes]
    parts += [*gaps, *golds]
    if not parts:
        return Merged(normalisers=[], gaps=[], golds=[])
    gathered = gather_statistics(torch.cat(parts), group)  # [ranks, numbers]
    pieces = iter(torch.split(gathered, [len(part) for part in parts], dim=1))
    maxima, totals = ([next(pieces) for _ in softmaxes] for _ in range(2))
    merged = [merge_parts(*parts) for parts in zip(maxima, totals, strict=True)]
    found: list[Tensor | None] = []
    for softmax, (normaliser, scale) in zip(softmaxes, merged, strict=True):
        found.append(
            None if softmax.gap is None else (next(pieces) * scale).sum(0) / normaliser.log_sum.exp()
        )
    return Merged(
        normalisers=[normaliser for normaliser, _ in merged],
        gaps=found,
        golds=[next(pieces).sum(0) for _ in golds],
    )
