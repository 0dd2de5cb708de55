"""The head loss of a run: all terms, over heads cut by vocabulary; built once, called once a microbatch.

Every rank of a vocabulary group has ALL the group's hidden rows and its own columns of every head. The result
of a call is this rank's SHARE, and the shares of all ranks add up: of a loss over columns what its columns
give for all items, of one over likelihoods the items of its own samples.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.device_kind import kind_of
from tide_megatron.base.memory import free_bytes
from tide_megatron.base.phases import Phases
from tide_megatron.head.budget import BUDGET_MIB, MIB, HeadShape, kept_heads, row_bytes, settle_budget
from tide_megatron.head.compiler import PassCompiler
from tide_megatron.head.fused import fused_head_loss
from tide_megatron.head.gather import GatheredRows, gather_microbatches
from tide_megatron.head.inputs import HeadInput, HeadResult, Microbatch
from tide_megatron.head.options import HeadOptions
from tide_megatron.head.plain import plain_head_loss
from tide_megatron.head.slabs import rows_within
from tide_megatron.head.tiles import Workspace, fixed_bytes
from tide_megatron.losses.base import Loss
from tide_megatron.losses.rows import Rows
from tide_megatron.parallel.collectives import gather_vectors
from tide_megatron.parallel.exchange import gather_rows
from tide_megatron.parallel.vocab_group import VocabGroup

log = logging.getLogger(__name__)


class HeadLoss:
    """The terms of a run, and how they are evaluated; all ranks of a vocabulary group use it together."""

    def __init__(
        self,
        losses: Mapping[str, Loss],
        group: VocabGroup | None = None,
        options: HeadOptions | None = None,
        *,
        budget_bytes: int | None = None,
        phases: Phases | None = None,
    ) -> None:
        """Take the terms.

        Args:
            losses: by name.
            group: who owns which ids; None: one rank owns all.
            options: form, precision, compilation.
            budget_bytes: of a slab, equal on all ranks; None: `options.budget_mib`, or the device's default.
            phases: the run's timer; None: one that nobody reads.
        """
        self.losses = losses
        self.group = VocabGroup() if group is None else group
        self.options = HeadOptions() if options is None else options
        self.phases = Phases() if phases is None else phases
        self._budget_bytes = budget_bytes
        self._workspace = Workspace()
        self.compiler = PassCompiler()
        """What compiles the passes over a slab, where they are compiled."""

    @classmethod
    def build(
        cls,
        losses: Mapping[str, Loss],
        group: VocabGroup,
        options: HeadOptions,
        heads: Mapping[str, HeadShape],
        device: Device,
        phases: Phases,
    ) -> HeadLoss:
        """Choose how a run's head loss is computed, and log it. All ranks of the world call it together.

        Call it when all models are built, and before the first step: what is free then is what a slab may
        take.

        Args:
            losses: the terms by name.
            group: who owns which ids.
            options: the recipe's `head`.
            heads: of `student` and every teacher by name.
            device: of this rank.
            phases: the run's timer.

        Raises:
            ConfigError: on every rank alike, for a budget above what some rank has free.
        """
        words = ", products in fp32" if options.is_exact else ""
        if options.form == "plain":
            log.info("head loss: plain, by autograd%s", words)
            return cls(losses, group, options, phases=phases)
        words += ", compiled" if options.is_compiled(device.type) else ""
        row = row_bytes(kept_heads(losses, heads, options.is_exact), group.size)
        least_bytes = fixed_bytes(device.torch_device) + row
        free = gather_vectors([float(free_bytes(device.torch_device))])[:, 0].tolist()
        budget = settle_budget(options.budget_mib, BUDGET_MIB[device.type], least_bytes, free, device.type)
        log.info("head loss: fused, slabs of %d MiB%s", budget // MIB, words)
        return cls(losses, group, options, budget_bytes=budget, phases=phases)

    def of_term(self, name: str) -> HeadLoss:
        """Return the head loss of one term alone, in the same form and buffers; its passes are not compiled.

        For measurements now and then: a kernel of their own would take longer to compile than they do.
        """
        options = dataclasses.replace(self.options, compiled=False)
        losses = {name: self.losses[name]}
        alone = HeadLoss(losses, self.group, options, budget_bytes=self._budget_bytes, phases=self.phases)
        alone._workspace = self._workspace
        return alone

    def gather(
        self, mine: Sequence[Rows], sizes: Sequence[Sequence[Sequence[int]]], counts: Mapping[str, float]
    ) -> list[GatheredRows]:
        """Bring the masked rows of a step to all ranks of the group, which call it together.

        Args:
            mine: this rank's rows by microbatch.
            sizes: [group rank][microbatch] as `gather.row_sizes` describes them.
            counts: each term's divisor, summed over all ranks and microbatches of the step. A term whose
                count
                is 0 is absent from the results, never NaN.
        """
        with self.phases("exchange"):
            return list(gather_microbatches(mine, sizes, counts, self.group))

    def __call__(
        self, student: HeadInput, teachers: Mapping[str, HeadInput], rows: GatheredRows, clock: Clock
    ) -> HeadResult:
        """Evaluate every term on one microbatch of each rank. All ranks of the group call it together.

        They run its backward together too, also those without rows, columns or items: it is a collective
        where there is a group.

        Args:
            student: this rank's rows with the whole head, with gradient; in the fused form also `gradient`,
                an
                fp32 buffer to which the weight's gradient is added at once.
            teachers: all the group's rows of each teacher with this rank's columns of its head.
            rows: from `gather`; there may be none, then the objective is 0 with a graph.
            clock: where the run stands.

        Raises:
            TideError: rows and hidden states do not belong together.
            ConfigError: the budget does not hold one row.
        """
        student, teachers = self.shared(student, teachers, rows)
        with self.phases("head"):
            losses = {name: loss for name, loss in self.losses.items() if rows.counts[name] != 0}
            batch = Microbatch(
                student=student,
                teachers=teachers,
                rows=rows,
                losses=losses,
                clock=clock,
                group=self.group.group,
            )
            if losses:
                batch.check()
            return plain_head_loss(batch) if self.options.form == "plain" else self._fused(batch)

    def shared(
        self, student: HeadInput, teachers: Mapping[str, HeadInput], rows: GatheredRows
    ) -> tuple[HeadInput, Mapping[str, HeadInput]]:
        """Gather the student's hidden rows and keep this rank's columns of its head, both with gradient.

        All ranks of the group call it together, and where there is a gradient, run its backward.

        Args:
            student: this rank's rows with the whole head.
            teachers: all the group's rows of each teacher.
            rows: from `gather`.

        Returns:
            All the group's rows of the student, and the teachers, in the products' precision.
        """
        if self.group.group is not None:
            start, stop = self.group.columns(len(student.weight))
            with self.phases("exchange"):
                hidden = gather_rows(student.hidden, rows.sizes, self.group.group)
            student = dataclasses.replace(
                student,
                hidden=hidden,
                weight=student.weight[start:stop],
                start=start,
                vocabulary=len(student.weight),
                gradient=None if student.gradient is None else student.gradient[start:stop],
            )
        if self.options.is_exact:
            student = dataclasses.replace(student, is_exact=True)
            teachers = {name: dataclasses.replace(head, is_exact=True) for name, head in teachers.items()}
        return student, teachers

    def _fused(self, batch: Microbatch) -> HeadResult:
        device = kind_of(batch.student.hidden.device)
        budget = self._budget_bytes or (self.options.budget_mib or BUDGET_MIB[device]) * MIB
        return fused_head_loss(
            batch,
            budget_bytes=budget,
            workspace=self._workspace,
            compiler=self.compiler if self.options.is_compiled(device) else None,
        )


def check_budget(
    options: HeadOptions,
    losses: Mapping[str, Loss],
    heads: Mapping[str, HeadShape],
    ranks: int,
    device: Device,
) -> None:
    """Refuse a budget that does not hold one row, before any weight is read. Not a collective.

    Args:
        options: the recipe's `head`.
        losses: the terms by name.
        heads: of `student` and every teacher by name.
        ranks: of a vocabulary group.
        device: of this rank.

    Raises:
        ConfigError: naming `head.budget_mib`, the value and what is needed.
    """
    if options.form == "plain":
        return
    budget = (options.budget_mib or BUDGET_MIB[device.type]) * MIB
    row = row_bytes(kept_heads(losses, heads, options.is_exact), ranks)
    rows_within(budget, row, fixed_bytes(device.torch_device))
