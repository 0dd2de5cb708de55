"""The head loss in one pass over slabs: values and gradients together, memory by a budget (design section 3).

For each slab of rows (`slabs`): logits of the student and of every teacher that a term reads, once;
statistics of own columns (`softmax`); ONE packed exchange of them over the vocabulary group; then, from the
same logits, every term's value, the derivative by the student's logits, and from that the gradients of the
hidden rows and of this rank's columns of the head. Four matrix products, none twice. A term whose derivative
needs a sum over the whole normalised row has the logits read once more, and a second exchange. What lies
before and after an exchange is a pass over the slab's logits: by torch's operations, tile by tile
(`tile_passes`), or by a compiled kernel each (`slab_passes`).

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

from tide_megatron.head.budget import HeadShape, row_bytes
from tide_megatron.head.column_term import ColumnTerm
from tide_megatron.head.compiler import PassCompiler
from tide_megatron.head.inputs import HeadInput, HeadResult, Microbatch
from tide_megatron.head.slab_passes import SlabPasses, passing_likelihoods
from tide_megatron.head.slabs import Slab, make_slabs, rows_within, single_rows
from tide_megatron.head.softmax import OnlineLikelihood, merge
from tide_megatron.head.tile_passes import SlabModel, TilePasses
from tide_megatron.head.tiles import TiledHead, Workspace, fixed_bytes, likelihood_statistics
from tide_megatron.losses.base import teachers_of
from tide_megatron.losses.rows import Rows
from tide_megatron.parallel.exchange import gather_statistics, size_of


def fused_head_loss(
    batch: Microbatch, *, budget_bytes: int, workspace: Workspace, compiler: PassCompiler | None = None
) -> HeadResult:
    """Evaluate every term, and its gradients, on one microbatch. All ranks of its group call it together.

    The same values, sums and gradients as `plain_head_loss`, which holds it to account. Without a gradient in
    `student.hidden` it evaluates and writes nothing.

    Args:
        batch: with `student.gradient`, to add the weight's gradient into.
        budget_bytes: for all that stands beside weights, hidden rows and their gradients.
        workspace: buffers kept between calls.
        compiler: makes one kernel of each pass over a slab; None: torch's own operations, tile by tile.

    Raises:
        ConfigError: when the budget does not hold one row.
    """
    student = batch.student
    assert student.releases or not student.hidden.requires_grad, "nowhere to add the weight's gradient"
    work = _Pass(batch, workspace, compiler)
    if batch.losses and len(batch.rows.rows.gold):
        work.run(budget_bytes)
    zero = torch.zeros((), dtype=torch.float64, device=student.hidden.device)
    value = torch.stack(
        [batch.losses[name].weight * total for name, total in work.sums.items()] or [zero]
    ).sum()
    if not student.hidden.requires_grad:
        return HeadResult(objective=value.float(), sums=work.sums)
    objective: Tensor = _Release.apply(student.hidden, value.float(), work.hidden_gradient)  # type: ignore[no-untyped-call]
    return HeadResult(objective=objective, sums=work.sums)


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


class _Pass:
    """One call's pass over the slabs: what has been added up so far."""

    def __init__(self, batch: Microbatch, workspace: Workspace, compiler: PassCompiler | None) -> None:
        self.batch, self.workspace, self.compiler = batch, workspace, compiler
        self.student, self.counts = batch.student, batch.rows.counts
        self.by_likelihood, self.by_columns = batch.by_likelihood, batch.by_columns
        self.teachers = {name: batch.teachers[name] for name in teachers_of(batch.losses)}
        self.chunked = teachers_of(self.by_likelihood)
        """Teachers whose chunks a term compares."""
        self.kept: set[str | None] = {None, *teachers_of(self.by_columns)}
        """Whose logits are read again: the student's, and those that terms over columns read."""
        device = self.student.hidden.device
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in batch.losses}
        # fp32, because the shares of a vocabulary group's ranks may cancel: their owner rounds the sum, once.
        self.hidden_gradient = torch.zeros(self.student.hidden.shape, device=device)

    @torch.no_grad()
    def run(self, budget_bytes: int) -> None:
        """Work on all rows. All ranks of the group do so together.

        Raises:
            ConfigError: when the budget does not hold one row.
        """
        most = rows_within(budget_bytes, self._row_bytes(), fixed_bytes(self.student.hidden.device))
        for slab in make_slabs(self.batch.rows.rows, self.chunked, most):
            if slab.is_long:
                self._long(slab, most)
            else:
                _SlabWork(self, slab).run()

    def _row_bytes(self) -> int:
        """Return the bytes of the kept logits of one student row, with its share of teacher rows."""
        rows = self.batch.rows.rows
        heads = [(self.student, 1.0)]
        heads += [
            (head, len(rows.link(name).gold) / len(rows.gold))
            for name, head in self.teachers.items()
            if name in self.kept
        ]
        kept = [(HeadShape(head.num_ids, head.dtype), share) for head, share in heads]
        return row_bytes(kept, size_of(self.batch.group))

    def _long(self, slab: Slab, most_rows: int) -> None:
        """Work on a unit that is longer than a slab. All ranks of the group do so together."""
        seen = []
        for name in (None, *self.chunked):
            hidden, gold = self.hidden(slab, name), slab.gold(name)
            parts = [
                self._passing(TiledHead(self.head(name), hidden[start:stop], None), gold[start:stop])
                for start, stop in ((start, start + most_rows) for start in range(0, len(gold), most_rows))
            ]
            seen.append(OnlineLikelihood.joined(parts))
        logs = [found.log_probability for found in merge(seen, [], self.batch.group).likelihoods]
        dloss_dlogp = self.likelihood_terms(slab.rows, dict(zip((None, *self.chunked), logs, strict=True)))
        for part in single_rows(slab, most_rows):
            _SlabWork(self, part).run(dloss_dlogp[part.start - slab.start : part.stop - slab.start])

    def _passing(self, head: TiledHead, gold: Tensor) -> OnlineLikelihood:
        """Return what this rank's columns say of gold ids' likelihoods; keeps no logits."""
        if self.compiler is None:
            return likelihood_statistics(head, gold)
        return passing_likelihoods(head, gold, self.workspace, self.compiler)

    def head(self, name: str | None) -> HeadInput:
        """Return a model's head; None is the student."""
        return self.student if name is None else self.teachers[name]

    def hidden(self, slab: Slab, name: str | None) -> Tensor:
        """Return one model's hidden rows in a slab; a copy where a teacher has rows of its own."""
        if name is None:
            return self.student.hidden[slab.start : slab.stop]
        return slab.teacher_rows(name, self.teachers[name].hidden)

    def likelihood_terms(self, rows: Rows, likelihoods: Mapping[str | None, Tensor]) -> Tensor:
        """Add up the terms over likelihoods; return the objective's derivative by the student's, [rows].

        Values count for own items only, derivatives for all: every rank has all rows and its own columns.
        """
        with torch.enable_grad():
            ours = likelihoods[None].requires_grad_()
            objective = ours.sum() * 0
            for name, loss in self.by_likelihood.items():
                theirs = None if loss.teacher is None else likelihoods[loss.teacher]
                values = loss.from_likelihoods(ours, theirs, rows, self.batch.clock)  # [items]
                coefficients = loss.coefficients(rows, self.batch.clock)
                objective = objective + (coefficients * (loss.weight / self.counts[name]) * values).sum()
                counted = coefficients.double() * values.detach().double()
                counted = counted * self.batch.rows.is_own(loss.item_sample(rows))
                self.sums[name] += counted.sum() / self.counts[name]
            (dloss_dlogp,) = torch.autograd.grad(objective, ours)
        return dloss_dlogp


class _SlabWork:
    """One slab: logits and statistics, the exchange, then values and gradients from the same logits."""

    def __init__(self, work: _Pass, slab: Slab) -> None:
        self.work, self.slab, self.student = work, slab, work.student
        self.terms = {
            name: ColumnTerm(loss, slab.rows, work.batch.clock, work.counts[name])
            for name, loss in work.by_columns.items()
        }

    def run(self, dloss_dlogp: Tensor | None = None) -> None:
        """Do all of it. All ranks of the group do so together.

        Args:
            dloss_dlogp: [rows] derivative of the objective by the gold log-likelihoods, where it is known
                already; None: the slab has whole units.
        """
        work = self.work
        readers: list[str | None] = [None] if work.by_likelihood else []
        if dloss_dlogp is None:
            readers += work.chunked
        passes = self._passes(work.kept.union(readers))
        seen = passes.statistics(readers)
        online = [softmax for term in self.terms.values() for softmax in (term.student, term.target)]
        found = merge(seen, online, work.batch.group)
        merged = dict(zip(readers, found.likelihoods, strict=True))
        for term, place in zip(self.terms.values(), range(0, len(online), 2), strict=True):
            term.know(found.softmaxes[place], found.softmaxes[place + 1], found.differences[place])
        if dloss_dlogp is None and work.by_likelihood:
            logs = {name: likelihood.log_probability for name, likelihood in merged.items()}
            dloss_dlogp = work.likelihood_terms(self.slab.rows, logs)
        if self.terms or self.student.releases:
            self._second_exchange(passes)
            self._finish(passes.slopes(dloss_dlogp, merged.get(None)))

    def _passes(self, names: set[str | None]) -> TilePasses | SlabPasses:
        """Return how some models' logits of the slab are made and read."""
        work, slab = self.work, self.slab
        models: dict[str | None, SlabModel] = {
            name: SlabModel(work.head(name), work.hidden(slab, name), slab.gold(name), name in work.kept)
            for name in (None, *work.teachers)
            if name in names
        }
        terms = [*self.terms.values()]
        if work.compiler is None:
            return TilePasses(models, terms, slab.rows, work.workspace)
        return SlabPasses(models, terms, slab.rows, work.workspace, work.compiler)

    def _second_exchange(self, passes: TilePasses | SlabPasses) -> None:
        """Add up the rows' sums that some terms ask for, over all columns of all ranks."""
        asking = [term for term in self.terms.values() if term.loss.row_statistic == "sum"]
        if not asking or not self.student.releases:
            return
        passes.row_sums(asking)
        packed = torch.cat([term.row for term in asking if term.row is not None])
        whole = gather_statistics(packed, self.work.batch.group).sum(0)
        for term, row in zip(asking, torch.split(whole, [len(term.values) for term in asking]), strict=True):
            term.row = row

    def _finish(self, hidden_gradient: Tensor | None) -> None:
        """Add what the slab gave to the call's results."""
        work = self.work
        if hidden_gradient is not None:
            work.hidden_gradient[self.slab.start : self.slab.stop] = hidden_gradient
        for name, term in self.terms.items():
            counted = term.coefficients.double() * term.values
            work.sums[name] += counted.sum() / work.counts[name]
