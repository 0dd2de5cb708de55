"""One training step, on a page.

The contracts that keep it short: counts are known before the forward pass and enter as coefficients, so
nothing divides later; every rank makes the same number of teacher and student passes whatever is masked;
losses and head never learn a teacher's layout.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.base.phases import Phases
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.loss import HeadLoss
from tide_megatron.head.term_gradients import TermGradients
from tide_megatron.parallel.collectives import sum_over
from tide_megatron.parallel.exchange import COMM_STATS, KINDS
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.cost import Cost
from tide_megatron.train.counts import count
from tide_megatron.train.optimizer import Update
from tide_megatron.train.step_input import StepInput
from tide_megatron.train.student import Student
from tide_megatron.train.watch import AnswerWatch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts a step is made of."""

    student: Student
    teachers: Mapping[str, Teacher]
    head: HeadLoss
    """The losses, over heads cut by vocabulary."""
    noiser: Noiser
    phases: Phases
    """The one timer of all parts."""
    device: torch.device

    def __post_init__(self) -> None:
        """Hold head and teachers to this run's timer: else what they exchange would count elsewhere."""
        parts = {"head": self.head.phases, **{name: one.phases for name, one in self.teachers.items()}}
        apart = [name for name, phases in parts.items() if phases is not self.phases]
        assert not apart, f"{apart} book their time elsewhere than the run; give all one Phases"

    def read(self, batches: Sequence[Batch]) -> StepInput:
        """Make what a step reads of this rank's microbatches. Not a collective, and it asks no device."""
        return StepInput.of(batches, self.noiser, self.student, self.teachers, self.head.losses)


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
    masked: int
    """Rows that were predicted, over all ranks."""
    cost: Cost
    """Operations that the step needed, of all ranks; the largest memory of a rank before it."""
    bytes: dict[str, int]
    """What our own collectives brought to all ranks together, by kind (`parallel.exchange`)."""
    broken: dict[str, list[int]]
    """Teachers whose answers were not finite -> sample ids; looked for only when an update was skipped."""
    gradients: dict[str, float]
    """Norms and cosines of the terms' gradients (`TermGradients.take`), where they were to be measured."""


# ---------------------------------------------------------------------------------------------------
def train_step(run: Run, given: StepInput, clock: Clock, *, measures_terms: bool = False) -> StepResult:
    """Ask the teachers, answer as the student, compare, update. All ranks call it together.

    Args:
        run: student, teachers, losses.
        given: what this rank reads of one update's microbatches (`Run.read`), on the host.
        clock: where the run stands; the caller advances it.
        measures_terms: also measure the gradient of each term; alike on every rank.

    Raises:
        TideError: on every rank, when a teacher was asked about other samples than the student.
    """
    with run.phases("data"):
        counts = count(given, run.head, run.student.shard, peak_memory_bytes())
        given = given.on(run.device)
    gathered = run.head.gather(given.rows, counts.rows, counts.divisors)
    streams = {
        name: run.teachers[name].hidden_states(request, counts.view_sizes[name])
        for name, request in given.requests.items()
    }
    run.student.clear()
    watch = AnswerWatch(run.teachers, run.head.group, counts)
    measured = TermGradients(run.head) if measures_terms else None
    sums: dict[str, Tensor] = {}
    for example, view, known in zip(given.noised, given.views, gathered, strict=True):
        with run.phases("teacher"):
            teachers = {name: next(stream) for name, stream in streams.items()}
        watch.keep(teachers, example)
        with run.phases("student"):
            student = run.student.rows(view)
        loss = run.head(student, teachers, known, clock)
        if measured is not None:
            measured.add(student, teachers, known, clock)
        with run.phases("backward"):
            run.student.release(loss.objective)
        for name, value in loss.sums.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    with run.phases("optimizer"):
        terms, moved = total(run, sums)
        objective = sum(run.head.losses[name].weight * value for name, value in terms.items())
        update = run.student.update(clock, finite=math.isfinite(objective))
    return StepResult(
        terms=terms,
        items=dict(counts.divisors),
        objective=objective,
        update=update,
        tokens=counts.tokens,
        masked=counts.masked,
        cost=counts.cost,
        bytes=moved,
        broken={} if update.applied else watch.report(),
        gradients={} if measured is None else measured.take(run.student.groups.dp),
    )


# ---------------------------------------------------------------------------------------------------


def total(run: Run, sums: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, int]]:
    """Add up the ranks' shares of each term, and what travelled. All ranks call it together.

    Returns:
        The terms; one that nobody had is absent. Bytes by kind, those of this collective not included.
    """
    names, moved = list(run.head.losses), COMM_STATS.take()
    packed = torch.zeros(2 * len(names) + len(KINDS), dtype=torch.float64, device=run.device)
    for index, name in enumerate(names):
        if name in sums:
            packed[index], packed[len(names) + index] = sums[name], 1.0
    for index, kind in enumerate(KINDS, 2 * len(names)):
        packed[index] = float(moved[kind])  # a number goes along with its kernel, where a copy is waited for
    sum_over(packed, run.student.groups.dp)
    values = packed.tolist()
    terms = {
        name: value for name, value, ranks in zip(names, values, values[len(names) :], strict=False) if ranks
    }
    return terms, {kind: int(value) for kind, value in zip(KINDS, values[2 * len(names) :], strict=True)}
