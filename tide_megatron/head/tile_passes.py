"""A slab's passes by torch's own operations, tile by tile: on CPU a tile's numbers stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tide_megatron.head.column_term import ColumnTerm
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.softmax import GoldLikelihood, OnlineLikelihood, gold_here
from tide_megatron.head.tiles import TiledHead, Workspace, product, tiles
from tide_megatron.losses.rows import Columns, Rows


class SlabModel(NamedTuple):
    """One model in a slab."""

    head: HeadInput
    hidden: Tensor
    """[rows, hidden size] of the slab."""
    gold: Tensor
    """[rows] int64."""
    is_kept: bool
    """Whether its logits are read again."""


Models = Mapping[str | None, SlabModel]
"""The models whose logits are made, by name; None is the student."""


class TilePasses:
    """What is computed on one slab before and after the exchange."""

    def __init__(self, models: Models, terms: Sequence[ColumnTerm], rows: Rows, workspace: Workspace) -> None:
        """Take a slab.

        Args:
            models: the student first.
            terms: over columns.
            rows: of the slab.
            workspace: for the kept logits.
        """
        self.models, self.terms, self.rows = models, terms, rows
        self.heads: dict[str | None, TiledHead] = {}
        for name, (head, hidden, _, is_kept) in models.items():
            room = None
            if is_kept:
                room = workspace.take(f"{name}", len(hidden) * len(head.weight), head.dtype, hidden.device)
            self.heads[name] = TiledHead(head, hidden, room)

    def statistics(self, readers: Sequence[str | None]) -> list[OnlineLikelihood]:
        """Make all logits; add to the terms' softmaxes.

        Args:
            readers: models whose gold likelihoods are read.

        Returns:
            Of each reader what these columns say of its gold ids.
        """
        seen = {name: OnlineLikelihood(self.models[name].gold) for name in readers}
        for start, stop in self._tiles():
            made = {name: head.make(start, stop) for name, head in self.heads.items()}
            for name, likelihood in seen.items():
                likelihood.add(made[name])
            for term in self.terms:
                term.add(made)
        return [*seen.values()]

    def row_sums(self, asking: Sequence[ColumnTerm]) -> None:
        """Add up the rows' sums that some terms ask for."""
        for bounds in self._tiles():
            made = self._again(*bounds)
            for term in asking:
                term.add_row_sum(made)

    def slopes(self, dloss_dlogp: Tensor | None, likelihood: GoldLikelihood | None) -> Tensor | None:
        """Read the logits again for the terms' values and for all gradients; the weight's is added at once.

        Args:
            dloss_dlogp: [rows] the objective's derivative by the student's gold log-likelihoods, if any.
            likelihood: those.

        Returns:
            The gradient of the student's hidden rows, [rows, hidden size] fp32; None in an evaluation.
        """
        student = self.models[None]
        releases = student.head.releases
        added = torch.zeros(student.hidden.shape, device=student.hidden.device)  # fp32, of this slab only
        for start, stop in self._tiles():
            made = self._again(start, stop)
            if dloss_dlogp is None or likelihood is None:
                dlogits = torch.zeros_like(made[None].logits)
            else:
                dlogits = _through_likelihoods(made[None], student.gold, dloss_dlogp, likelihood)
            for term in self.terms:
                part = term.evaluate(made)
                if releases and part is not None:
                    _add_rows(dlogits, part, self.rows, term.loss.teacher)
            if releases:
                added += self._release(dlogits, start, stop)
        return added if releases else None

    def _release(self, dlogits: Tensor, start: int, stop: int) -> Tensor:
        """Add a tile's share to the head weight's gradient, if wanted; return that of the hidden rows'."""
        head, gradient = self.heads[None], self.models[None].head.gradient
        dlogits = dlogits.to(head.hidden.dtype)
        if gradient is not None:
            gradient[start:stop].add_(product(dlogits.T, head.hidden))
        return product(dlogits, head.weight(start, stop))

    def _again(self, start: int, stop: int) -> dict[str | None, Columns]:
        kept = [name for name, model in self.models.items() if model.is_kept]
        return {name: self.heads[name].again(start, stop) for name in kept}

    def _tiles(self) -> Iterator[tuple[int, int]]:
        """Yield the tiles that cover every model's columns here."""
        rows = max(len(head.hidden) for head in self.heads.values())
        columns = max(head.num_columns for head in self.heads.values())
        return tiles(columns, rows, self.rows.gold.device)


def _through_likelihoods(
    columns: Columns, gold: Tensor, dloss_dlogp: Tensor, likelihood: GoldLikelihood
) -> Tensor:
    """Return dloss_dlogp (onehot - p), the derivative through gold log-likelihoods, [rows, columns].

    1 - p of a gold id is known better than as a difference.
    """
    dlogits = likelihood.softmax.log_probabilities(columns.logits).exp_().mul_(-dloss_dlogp[:, None])
    if dlogits.shape[1]:
        place, is_here = (part[:, None] for part in gold_here(columns, gold))
        own = (dloss_dlogp * likelihood.complement)[:, None]
        dlogits.scatter_(1, place, torch.where(is_here, own, dlogits.gather(1, place)))
    return dlogits


def _add_rows(dlogits: Tensor, part: Tensor, rows: Rows, teacher: str) -> None:
    """Add a term's derivative [pairs, first columns] to the rows of its pairs."""
    pairs = rows.link(teacher).pairs
    target = dlogits[:, : part.shape[1]]
    if pairs is None:
        target += part
    else:
        target.index_add_(0, pairs[0], part)  # a row has one pair at most, so there is no order
