"""A slab's passes as compiled kernels, each over all columns at once; the derivative replaces the logits.

Logits of a model lie row by row, [rows, own columns] with padding to whole blocks (`passes`) that means
nothing. Only the products are cut, by columns, so that no gradient of the weight's size stands beside the one
that it is added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.device_kind import kind_of
from tide_megatron.head.column_term import ColumnTerm
from tide_megatron.head.compiler import PassCompiler
from tide_megatron.head.passes import (
    SLOPES_BLOCK,
    STATISTICS_BLOCK,
    Gold,
    GoldSlopes,
    Sums,
    TermRows,
    Terms,
    TermSlopes,
    blocks_of,
    row_sums,
    slopes,
    statistics,
)
from tide_megatron.head.softmax import GoldLikelihood, LogSumExp, OnlineLikelihood, OnlineSoftmax, gold_logits
from tide_megatron.head.tile_passes import Models
from tide_megatron.head.tiles import TiledHead, Workspace, product
from tide_megatron.losses.rows import Columns, Rows

PRODUCT_COLUMNS = {"cpu": 1024, "cuda": 2**15}
"""Columns of the weight's gradient that are made at a time: on CUDA 128 MiB at a hidden size of 1,024."""
PASSING_COLUMNS = {"cpu": STATISTICS_BLOCK, "cuda": 8 * STATISTICS_BLOCK}
"""Columns of logits that are not kept."""
CPU_ROWS = 8
"""Rows of a call that overwrites: Inductor's C++ keeps the derivative of them all first. Its Triton code
does not, and gets the whole slab."""


class SlabPasses:
    """What is computed on one slab before and after the exchange; like `tile_passes.TilePasses`."""

    def __init__(
        self,
        models: Models,
        terms: Sequence[ColumnTerm],
        rows: Rows,
        workspace: Workspace,
        compiler: PassCompiler,
    ) -> None:
        """Take a slab; see `tile_passes.TilePasses`."""
        self.models, self.workspace, self.compiler = models, workspace, compiler
        self.device = models[None].hidden.device
        self.heads = {name: TiledHead(model.head, model.hidden, None) for name, model in models.items()}
        self.kept = [name for name, model in models.items() if model.is_kept]
        self.logits: list[Tensor] = []
        """Of each of `kept`, [rows, own columns padded]; the student's first."""
        for name in self.kept:
            head, width = self.heads[name], _padded(self.heads[name].num_columns)
            size = len(head.hidden), width
            buffer = workspace.take(f"{name}", size[0] * size[1], head.hidden.dtype, self.device)
            self.logits.append(buffer.view(size))
        self.terms = [term for term in terms if len(term.values) and self._compared(term) > 0]
        """Those that have something to compare here."""
        self.term_rows = [self._rows_of(term) for term in self.terms]

    def statistics(self, readers: Sequence[str | None]) -> list[OnlineLikelihood]:
        """Make all logits; add to the terms' softmaxes. See `TilePasses.statistics`."""
        seen: dict[str | None, OnlineLikelihood] = {}
        golds: list[Gold | None] = []
        for name, logits in zip(self.kept, self.logits, strict=True):
            head, gold = self.heads[name], self.models[name].gold
            for start, stop in _parts(head.num_columns, PRODUCT_COLUMNS, self.device):
                torch.mm(head.hidden, head.weight(start, stop).T, out=logits[:, start:stop])
            golds.append(None)
            if name in readers:
                seen[name] = OnlineLikelihood(gold)
                if logits.numel():
                    golds[-1] = Gold(gold - head.first, self._number(head.num_columns))
        if self.terms or any(golds):
            others, softmaxes = self.compiler.run(
                statistics, (self._terms(self.terms),), self._blocks(), golds, self.term_rows
            )
            with_gold = [name for name, gold in zip(self.kept, golds, strict=True) if gold is not None]
            for name, sums in zip(with_gold, others, strict=True):
                _take_gold(seen[name], self.heads[name], self.logits[self.kept.index(name)], 0, sums)
            for term, ours, target in zip(self.terms, softmaxes[::2], softmaxes[1::2], strict=True):
                _take_items(term, term.student, ours)
                _take_items(term, term.target, target)
        for name in readers:
            if name not in seen:
                seen[name] = passing_likelihoods(
                    self.heads[name], self.models[name].gold, self.workspace, self.compiler
                )
        return [seen[name] for name in readers]

    def row_sums(self, asking: Sequence[ColumnTerm]) -> None:
        """Add up the rows' sums that some terms ask for."""
        chosen = [
            (term, rows) for term, rows in zip(self.terms, self.term_rows, strict=True) if term in asking
        ]
        if chosen:
            terms = [term for term, _ in chosen]
            known = [self._slopes_of(*one) for one in chosen]
            found = self.compiler.run(row_sums, (self._terms(terms),), self._blocks(), known)
            for term, sums in zip(terms, found, strict=True):
                assert term.row is not None, "only a term that asks for a sum has one"
                term.row += _by_item(term, sums)

    def slopes(self, dloss_dlogp: Tensor | None, likelihood: GoldLikelihood | None) -> Tensor | None:
        """Read the logits for values and gradients. See `TilePasses.slopes`."""
        head, model = self.heads[None], self.models[None].head
        gold = None
        if dloss_dlogp is not None and likelihood is not None and model.releases and head.num_columns:
            place = self.models[None].gold - head.first
            own = dloss_dlogp * likelihood.complement
            gold = GoldSlopes(place, _pair(likelihood.softmax), -dloss_dlogp, own)
        known = [self._slopes_of(*one) for one in zip(self.terms, self.term_rows, strict=True)]
        if gold is not None or known:
            self._evaluate(gold, known, writes=model.releases)
        if not model.releases:
            return None
        added = torch.zeros(head.hidden.shape, device=self.device)
        if gold is not None or known:
            for start, stop in _parts(head.num_columns, PRODUCT_COLUMNS, self.device):
                dlogits = self.logits[0][:, start:stop]
                if model.gradient is not None:
                    model.gradient[start:stop].add_(product(dlogits.T, head.hidden))
                added += product(dlogits, head.weight(start, stop))
        return added

    def _evaluate(self, gold: GoldSlopes | None, known: Sequence[TermSlopes], *, writes: bool) -> None:
        """Add to the terms' values; where `writes`, the derivative replaces the student's logits."""
        found = []
        paired = zip(self.terms, self.term_rows, strict=True)
        alike = {None, *(term.loss.teacher for term, rows in paired if rows.teacher_row is None)}
        for rows in self._row_blocks():
            models = zip(self.kept, self.logits, strict=True)
            logits = [blocks_of(part[rows] if name in alike else part, SLOPES_BLOCK) for name, part in models]
            options = (self._terms(self.terms), writes)
            found.append(self.compiler.run(slopes, options, logits, _cut(gold, rows), _cut([*known], rows)))
        for term, parts in zip(self.terms, zip(*found, strict=True), strict=True):
            term.values += _by_item(term, torch.cat(parts))

    def _blocks(self) -> list[Tensor]:
        return [blocks_of(part, STATISTICS_BLOCK) for part in self.logits]

    def _row_blocks(self) -> Iterator[slice]:
        number = len(self.logits[0])
        blocks = 1 if kind_of(self.device) == "cuda" else -(-number // CPU_ROWS)
        for block in range(blocks):
            yield slice(block * number // blocks, (block + 1) * number // blocks)

    def _terms(self, terms: Sequence[ColumnTerm]) -> Terms:
        return tuple((term.loss, self.kept.index(term.loss.teacher)) for term in terms)

    def _compared(self, term: ColumnTerm) -> int:
        """Return how many of the student's columns here a term compares."""
        ours, theirs = (self.models[name].head for name in (None, term.loss.teacher))
        compared = term.loss.columns(ours.num_ids, theirs.num_ids) - ours.start
        compared = max(0, min(compared, len(ours.weight)))
        assert not compared or (theirs.start == ours.start and len(theirs.weight) >= compared), (
            f"teacher {term.loss.teacher!r}: heads are cut at different ids"
        )
        return compared

    def _rows_of(self, term: ColumnTerm) -> TermRows:
        pairs = term.rows.link(term.loss.teacher).pairs
        share = term.loss.target_share(term.rows, term.clock)
        return TermRows(
            compared=self._number(self._compared(term)),
            teacher_row=None if pairs is None else self._by_row(term, pairs[1]),
            share=None if share is None else self._by_row(term, share),
        )

    def _slopes_of(self, term: ColumnTerm, rows: TermRows) -> TermSlopes:
        student, target = (tuple(self._by_row(term, part) for part in _pair(one)) for one in term.merged)
        return TermSlopes(
            rows=rows,
            student=(student[0], student[1]),
            target=(target[0], target[1]),
            row=None if term.row is None else self._by_row(term, term.row),
            factor=self._by_row(term, term.factors),
        )

    def _by_row(self, term: ColumnTerm, numbers: Tensor) -> Tensor:
        """Return [rows] of [pairs]; 0 where a row has no pair."""
        pairs = term.rows.link(term.loss.teacher).pairs
        if pairs is None:
            return numbers
        return numbers.new_zeros(len(self.logits[0])).index_copy_(0, pairs[0], numbers)

    def _number(self, value: int) -> Tensor:
        return torch.full((), value, dtype=torch.int64, device=self.device)


def passing_likelihoods(
    head: TiledHead, gold: Tensor, workspace: Workspace, compiler: PassCompiler
) -> OnlineLikelihood:
    """Return what this rank's columns say of gold ids' likelihoods, like `likelihood_statistics`.

    Args:
        head: the rows.
        gold: [rows] int64 ids, of any rank's columns.
        workspace: for some columns at a time.
        compiler: of the pass over these.
    """
    found, device = OnlineLikelihood(gold), head.hidden.device
    width = min(PASSING_COLUMNS["cuda" if kind_of(device) == "cuda" else "cpu"], _padded(head.num_columns))
    room = workspace.take("passing", len(gold) * width, head.hidden.dtype, device).view(len(gold), width)
    for start, stop in _parts(head.num_columns if len(gold) else 0, PASSING_COLUMNS, device):
        torch.mm(head.hidden, head.weight(start, stop).T, out=room[:, : stop - start])
        columns = torch.full((), stop - start, dtype=torch.int64, device=device)
        golds = [Gold(gold - head.first - start, columns)]
        (sums,), _ = compiler.run(statistics, ((),), [blocks_of(room, STATISTICS_BLOCK)], golds, [])
        _take_gold(found, head, room, start, sums)
    return found


def _take_gold(found: OnlineLikelihood, head: TiledHead, logits: Tensor, start: int, sums: Sums) -> None:
    """Add columns from `start` on, counted from this rank's first."""
    found.others.take(sums.maximum, sums.total, sums.difference)
    ours = logits[:, : head.num_columns - start]  # as they are: in fp32 they would be a second slab
    columns = Columns(logits=ours, start=head.first + start, vocabulary=head.num_ids)
    found.logits += gold_logits(columns, found.gold).float()


def _take_items(term: ColumnTerm, softmax: OnlineSoftmax, sums: Sums) -> None:
    difference = None if sums.difference is None else _by_item(term, sums.difference)
    softmax.take(_by_item(term, sums.maximum), _by_item(term, sums.total), difference)


def _by_item(term: ColumnTerm, numbers: Tensor) -> Tensor:
    """Return [pairs] of [rows]."""
    pairs = term.rows.link(term.loss.teacher).pairs
    return numbers if pairs is None else numbers[pairs[0]]


def _pair(softmax: LogSumExp) -> tuple[Tensor, Tensor]:
    return softmax.maximum, softmax.log_sum


def _cut(inputs: Any, rows: slice) -> Any:
    """Return the same structure of only some rows."""
    if inputs is None or isinstance(inputs, Tensor):
        return inputs[rows] if inputs is not None and inputs.dim() else inputs
    parts = [_cut(part, rows) for part in inputs]
    return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)


def _padded(columns: int) -> int:
    return -(-columns // STATISTICS_BLOCK) * STATISTICS_BLOCK


def _parts(columns: int, width: dict[str, int], device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of each part of columns."""
    step = width["cuda" if kind_of(device) == "cuda" else "cpu"]
    for start in range(0, columns, step):
        yield start, min(start + step, columns)
