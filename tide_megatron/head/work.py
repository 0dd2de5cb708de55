"""The work of one fused head loss, slab by slab; `fused` says why it is done so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.base.clock import Clock
from tide_megatron.head.elementwise import column_tile
from tide_megatron.head.parts import HeadInput
from tide_megatron.head.products import product
from tide_megatron.head.running import Merged, Running, merge
from tide_megatron.head.slabs import Slab, make_slabs, rows_within, single_rows
from tide_megatron.head.statistics import Normaliser, gold_here, picked_golds
from tide_megatron.head.tiles import TiledHead, fixed_bytes, likelihood_statistics, tiles
from tide_megatron.head.workspace import Workspace
from tide_megatron.losses.columns import Columns
from tide_megatron.losses.rows import ColumnLoss, LikelihoodLoss, Loss, Rows
from tide_megatron.parallel.exchange import size_of


class Work:
    """The state of one call: what has been added up so far."""

    def __init__(
        self,
        student: HeadInput,
        answers: Mapping[str, HeadInput],
        losses: Mapping[str, Loss],
        counts: Mapping[str, Tensor],
        clock: Clock,
        where: tuple[ProcessGroup | None, tuple[int, int] | None],
        means: tuple[Workspace, bool],
    ) -> None:
        """Start with nothing added up; `where` is group and own samples, `means` buffers and compilation."""
        self.student, self.clock = student, clock
        self.workspace, self.compiled = means
        self.group, self.own = where
        self.likely = {name: loss for name, loss in losses.items() if isinstance(loss, LikelihoodLoss)}
        self.columns = {name: loss for name, loss in losses.items() if isinstance(loss, ColumnLoss)}
        self.factors = {name: loss.weight / float(counts[name]) for name, loss in losses.items()}
        self.counts = {name: float(counts[name]) for name in losses}
        heard = {loss.teacher for loss in losses.values() if loss.teacher is not None}
        self.answers = {name: answers[name] for name in sorted(heard)}
        device = student.hidden.device
        self.zero = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = {name: self.zero.clone() for name in losses}
        # fp32, because the shares of a head group's ranks may cancel: their owner rounds the sum, once.
        self.hidden_gradient = torch.zeros(student.hidden.shape, device=device)

    @property
    def chunked(self) -> set[str]:
        """Teachers whose chunks a term compares."""
        return {loss.teacher for loss in self.likely.values() if loss.teacher is not None}

    @property
    def read_again(self) -> set[str | None]:
        """Whose logits are kept for the second pass: the student's, and those that terms by columns read."""
        return {None, *(loss.teacher for loss in self.columns.values())}

    @property
    def releases(self) -> bool:
        """Whether gradients are wanted."""
        return self.student.gradient is not None

    @torch.no_grad()
    def all(self, rows: Rows, budget_bytes: int) -> None:
        """Work on all rows of a head group; all its ranks do so together.

        Raises:
            ConfigError: when the budget does not hold one row.
        """
        most = rows_within(budget_bytes, self.row_bytes(rows), fixed_bytes(self.student.hidden.device))
        for slab in make_slabs(rows, self.chunked, most):
            if slab.is_long:
                self.long(slab, most)
            else:
                self.slab(slab)

    def row_bytes(self, rows: Rows) -> int:
        """Return the bytes of the kept logits of one student row, with its share of teacher rows."""
        heads = [(self.student, 1.0)]
        for name, answer in self.answers.items():
            if name in self.read_again:
                heads.append((answer, len(rows.link(name).gold) / len(rows.gold)))
        # The widest range of ids of any rank, so that all ranks make the same slabs.
        widest = max(-(-head.num_ids // size_of(self.group)) for head, _ in heads)
        return max(1, round(sum(share * head.dtype.itemsize for head, share in heads) * widest))

    def slab(self, slab: Slab, blame: Tensor | None = None) -> None:
        """Work on a slab; all ranks of the group do so together.

        Args:
            slab: whole units, unless `blame` is given.
            blame: [rows] derivative of the objective by the gold log-likelihoods, where it is known already.
        """
        likely: list[str | None] = [None] if self.likely else []
        if blame is None:
            likely += sorted(self.chunked)
        heads = self._heads(slab, self.read_again.union(likely))
        statistics = self._statistics(slab, heads, likely)
        found = merge([*statistics[0].values()], [*statistics[1].values()], self.group)
        normalisers = dict(zip(statistics[0], found.normalisers, strict=True))
        if blame is None and self.likely:
            blame = self._blame(slab.rows, dict(zip(likely, found.golds, strict=True)), normalisers)
        self._second_pass(slab, heads, blame, (statistics[0], found))

    def long(self, slab: Slab, most_rows: int) -> None:
        """Work on a unit that is longer than a slab; all ranks of the group do so together."""
        kept: dict[Any, tuple[list[Running], list[Tensor]]] = {}
        for name in (None, *sorted(self.chunked)):
            hidden, gold = self._hidden(slab, name), _gold(slab, name)
            kept[name] = ([], [])
            for start in range(0, len(gold), most_rows):
                piece = slice(start, start + most_rows)
                head = TiledHead(self._input(name), hidden[piece], None)
                running, picked = likelihood_statistics(head, gold[piece])
                kept[name][0].append(running)
                kept[name][1].append(picked)
        joined = {name: _join(softmaxes) for name, (softmaxes, _) in kept.items()}
        golds = {name: torch.cat(picked) for name, (_, picked) in kept.items()}
        found = merge([*joined.values()], [*golds.values()], self.group)
        normalisers: dict[Any, Normaliser] = dict(zip(joined, found.normalisers, strict=True))
        blame = self._blame(slab.rows, dict(zip(golds, found.golds, strict=True)), normalisers)
        for part in single_rows(slab, most_rows):
            self.slab(part, blame[part.start - slab.start : part.stop - slab.start])

    def _input(self, name: str | None) -> HeadInput:
        return self.student if name is None else self.answers[name]

    def _hidden(self, slab: Slab, name: str | None) -> Tensor:
        """Return one model's hidden rows in a slab; a copy where a teacher has rows of its own."""
        if name is None:
            return self.student.hidden[slab.start : slab.stop]
        return slab.answer_rows(name, self.answers[name].hidden)

    def _heads(self, slab: Slab, names: set[str | None]) -> dict[str | None, TiledHead]:
        """Return some models' rows of a slab, with room for the logits that are read again."""
        heads: dict[str | None, TiledHead] = {}
        for name in [name for name in (None, *self.answers) if name in names]:
            hidden, given = self._hidden(slab, name), self._input(name)
            room = None
            if name in self.read_again:
                numbers = len(hidden) * len(given.weight)
                room = self.workspace.take(f"{name}", numbers, given.dtype, hidden.device)
            heads[name] = TiledHead(given, hidden, room)
        return heads

    def _statistics(
        self, slab: Slab, heads: Mapping[str | None, TiledHead], likely: list[str | None]
    ) -> tuple[dict[Any, Running], dict[str | None, Tensor]]:
        """Make all logits and this rank's statistics: by model for likelihoods, by term and side else."""
        device = slab.rows.gold.device
        softmaxes: dict[Any, Running] = {}
        asked = {name: _gold(slab, name) for name in likely}
        golds = {name: torch.zeros(len(gold), device=device) for name, gold in asked.items()}
        for name in likely:
            softmaxes[name] = Running(len(asked[name]), device)
        for name, loss in self.columns.items():
            pairs = len(loss.item_sample(slab.rows))
            softmaxes[name, "student"] = Running(pairs, device, has_gap=loss.needs_gap)
            softmaxes[name, "target"] = Running(pairs, device)
        for start, stop in self._tiles(heads):
            made = {name: head.make(start, stop) for name, head in heads.items()}
            for name in likely:
                softmaxes[name].add(made[name].logits)
                golds[name] += picked_golds(made[name], asked[name])
            for name, loss in self.columns.items():
                ours, target = loss.softened(made[None], made[loss.teacher], slab.rows, self.clock)
                softmaxes[name, "student"].add(ours, target)
                softmaxes[name, "target"].add(target)
        return softmaxes, golds

    def _tiles(self, heads: Mapping[str | None, TiledHead]) -> list[tuple[int, int]]:
        """Return the tiles that cover every model's columns here."""
        rows = max(len(head.hidden) for head in heads.values())
        columns = max(head.num_columns for head in heads.values())
        return list(tiles(columns, rows, self.student.hidden.device))

    def _blame(
        self, rows: Rows, golds: Mapping[str | None, Tensor], normalisers: Mapping[Any, Normaliser]
    ) -> Tensor:
        """Add up the terms over likelihoods; return the objective's derivative by the student's, [rows].

        Values count for own items only, derivatives for all: every rank has all rows and its own columns.
        """
        likelihoods = {name: normalisers[name].log_probabilities(gold) for name, gold in golds.items()}
        with torch.enable_grad():
            ours = likelihoods[None].requires_grad_()
            objective = ours.sum() * 0
            for name, loss in self.likely.items():
                theirs = None if loss.teacher is None else likelihoods[loss.teacher]
                values = loss.from_likelihoods(ours, theirs, rows, self.clock)  # [items]
                coefficients = loss.coefficients(rows, self.clock)
                objective = objective + (coefficients * self.factors[name] * values).sum()
                counted = coefficients.double() * values.detach().double()
                if self.own is not None:
                    sample = loss.item_sample(rows)
                    counted = counted * ((sample >= self.own[0]) & (sample < self.own[1]))
                self.sums[name] += counted.sum() / self.counts[name]
            (blame,) = torch.autograd.grad(objective, ours)
        return blame

    def _second_pass(
        self,
        slab: Slab,
        heads: Mapping[str | None, TiledHead],
        blame: Tensor | None,
        statistics: tuple[Mapping[Any, Running], Merged],
    ) -> None:
        """Read the logits again for the terms over columns and for all gradients."""
        keys, found = statistics
        normalisers = dict(zip(keys, found.normalisers, strict=True))
        gaps = dict(zip(keys, found.gaps, strict=True))
        if not self.columns and not self.releases:
            return
        coefficients, values, whole, both = {}, {}, {}, {}
        for name, loss in self.columns.items():
            coefficients[name] = loss.coefficients(slab.rows, self.clock)
            values[name] = torch.zeros_like(coefficients[name], dtype=torch.float64)
            gap = gaps[name, "student"]
            ours, target = (normalisers[name, side] for side in ("student", "target"))
            both[name] = ((ours.maximum, ours.log_sum), (target.maximum, target.log_sum))
            if gap is not None:  # from logits to log-probabilities
                gap = gap - (ours.maximum - target.maximum) - (ours.log_sum - target.log_sum)
            whole[name] = gap
        factors = {name: factor * self.factors[name] for name, factor in coefficients.items()}
        added = torch.zeros(heads[None].hidden.shape, device=slab.rows.gold.device)  # fp32, of this slab only
        for start, stop in self._tiles(heads):
            made = {name: heads[name].again(start, stop) for name in self.read_again}
            if blame is None:
                slope = torch.zeros_like(made[None].logits)
            else:
                slope = _likelihood_slope(made[None], slab.rows.gold, blame, normalisers[None])
            for name, loss in self.columns.items():
                ours, target = loss.softened(made[None], made[loss.teacher], slab.rows, self.clock)
                if not ours.shape[1]:
                    continue
                value, part = column_tile(loss, compiled=self.compiled)(
                    ours, target, *both[name], whole[name], factors[name]
                )
                values[name] += value
                if self.releases:
                    _add_rows(slope, part, slab.rows, loss.teacher)
            if self.releases:
                added += self._release(heads[None], slope, start, stop)
        self.hidden_gradient[slab.start : slab.stop] = added
        for name in self.columns:
            counted = coefficients[name].double() * values[name]
            self.sums[name] += counted.sum() / self.counts[name]

    def _release(self, head: TiledHead, slope: Tensor, start: int, stop: int) -> Tensor:
        """Add a tile's share to the head weight's gradient; return that of the hidden rows'."""
        gradient = self.student.gradient
        assert gradient is not None, "evaluation writes nothing"
        slope = slope.to(head.hidden.dtype)
        gradient[start:stop].add_(product(slope.T, head.hidden))
        return product(slope, head.weight(start, stop))


def _gold(slab: Slab, name: str | None) -> Tensor:
    """Return the gold ids of one model's rows in a slab."""
    return slab.rows.gold if name is None else slab.rows.link(name).gold


def _likelihood_slope(columns: Columns, gold: Tensor, blame: Tensor, normaliser: Normaliser) -> Tensor:
    """Return blame (onehot - p), the derivative through gold log-likelihoods, [rows, columns]."""
    slope = normaliser.log_probabilities(columns.logits).exp_().mul_(-blame[:, None])
    if slope.shape[1]:
        place, is_here = gold_here(columns, gold)
        slope.scatter_add_(1, place[:, None], torch.where(is_here, blame, 0.0)[:, None])
    return slope


def _add_rows(slope: Tensor, part: Tensor, rows: Rows, teacher: str | None) -> None:
    """Add a term's derivative [pairs, first columns] to the rows of its pairs."""
    pairs = rows.link(str(teacher)).pairs
    target = slope[:, : part.shape[1]]
    if pairs is None:
        target += part
    else:
        target.index_add_(0, pairs[0], part)


def _join(softmaxes: list[Running]) -> Running:
    """Put the rows of several statistics behind each other."""
    joined = Running(0, softmaxes[0].maximum.device)
    joined.maximum = torch.cat([one.maximum for one in softmaxes])
    joined.total = torch.cat([one.total for one in softmaxes])
    return joined
