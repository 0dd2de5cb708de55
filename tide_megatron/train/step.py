"""One training step, on a page.

The contracts that keep it short: counts are known before the forward pass and enter as coefficients, so
nothing divides later; every rank makes the same number of teacher and student passes whatever is hidden;
losses and head never learn a teacher's layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Batch, Noised
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.plain import head_loss
from tide_megatron.losses.rows import Loss, rows_of
from tide_megatron.parallel.collectives import sum_over
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.metrics import Phases
from tide_megatron.train.optimizer import Update
from tide_megatron.train.student import Student


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts a step is made of."""

    student: Student
    teachers: Mapping[str, Teacher]
    losses: Mapping[str, Loss]
    noiser: Noiser
    phases: Phases
    device: torch.device


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, the same on every rank."""

    terms: dict[str, float]
    """Mean of each loss over its own count, before its weight."""
    items: dict[str, float]
    """What each loss averaged over: rows, pairs or chunks of all ranks; 0: there was nothing to compare."""
    objective: float
    update: Update
    tokens: int
    """Tokens of clean text that were read, without pads, over all ranks."""
    hidden: int
    """Rows that were predicted, over all ranks."""


# ---------------------------------------------------------------------------------------------------
def train_step(run: Run, batches: Sequence[Batch], clock: Clock) -> StepResult:
    """Hide tokens, ask the teachers, answer as the student, compare, update. All ranks call it together.

    Args:
        run: student, teachers, losses.
        batches: this rank's microbatches of one update.
        clock: where the run stands; the caller advances it.
    """
    with run.phases("data"):
        noised = [run.noiser(batch.to(run.device)) for batch in batches]
        counts, tokens, hidden = count(run, noised)
    run.student.clear()
    sums: dict[str, Tensor] = {}
    for example in noised:
        with run.phases("teacher"):
            answers = {name: teacher.answer(example) for name, teacher in run.teachers.items()}
        with run.phases("student"):
            student = run.student.rows(run.student.view(example))
        with run.phases("head"):
            loss = head_loss(student, answers, run.losses, rows_of(example), counts, clock)
        with run.phases("backward"):
            run.student.release(loss.objective)
        for name, value in loss.sums.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    with run.phases("optimizer"):
        terms = total(run, sums)
        objective = sum(run.losses[name].weight * value for name, value in terms.items())
        update = run.student.update(clock, finite=math.isfinite(objective))
    items = {name: float(value) for name, value in counts.items()}
    return StepResult(
        terms=terms, items=items, objective=objective, update=update, tokens=tokens, hidden=hidden
    )


# ---------------------------------------------------------------------------------------------------


def count(run: Run, noised: Sequence[Noised]) -> tuple[dict[str, Tensor], int, int]:
    """Sum every loss's divisor over microbatches and ranks in ONE collective. All ranks call it together.

    Returns:
        (divisor of each loss, fp64 scalar), clean tokens, hidden rows.
    """
    names = list(run.losses)
    mine = [[run.losses[name].count(example).double() for example in noised] for name in names]
    mine.append([example.batch.lengths.sum().double() for example in noised])
    mine.append([example.hidden.sum().double() for example in noised])
    packed = torch.stack([torch.stack([value.to(run.device) for value in row]).sum() for row in mine])
    sum_over(packed, run.student.groups.dp)
    *counts, tokens, hidden = packed.unbind()
    return dict(zip(names, counts, strict=True)), int(tokens), int(hidden)


def total(run: Run, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Add up the ranks' shares of each term; a term nobody had is absent. All ranks call it together."""
    names = list(run.losses)
    packed = torch.zeros(2, len(names), dtype=torch.float64, device=run.device)
    for index, name in enumerate(names):
        if name in sums:
            packed[:, index] = torch.stack([sums[name].double(), torch.ones_like(sums[name]).double()])
    sum_over(packed, run.student.groups.dp)
    values, seen = packed.tolist()
    return {name: value for name, value, ranks in zip(names, values, seen, strict=True) if ranks}
