"""One rank of a planned run: built by our own code on meta tensors, and stepped by our own `train_step`.

A rank needs the recipe, each model's config.json, and what every rank reads in a step. Nothing of it depends
on how many ranks there are but the layouts and the groups, so a rank of 4,096 costs what one of 8 costs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tide_megatron.platform
from tide_megatron.platform.lone_world import META, Listener, PlannedDevice, lone_world

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.budget import BUDGET_MIB, MIB
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss
from tide_megatron.models.build import TideModel
from tide_megatron.parallel.vocab_group import make_vocab_group
from tide_megatron.plan.kernels import PlannedCompiler, PlannedFlex
from tide_megatron.plan.peers import ComputedPeers
from tide_megatron.plan.recorder import Label, Peak, RecordedPhases, Recorder, Sent
from tide_megatron.plan.routing import Routing, Zipf, route
from tide_megatron.teachers.exchange import Request, Sizes
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.models import ModelShape, build_student, build_teacher, head_ranks
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.step import Run, train_step

CPU = torch.device("cpu")
Reads = Callable[[int], Sequence[Batch]]
"""Rank of the world -> the microbatches that it reads in a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """What all ranks of a planned run share."""

    recipe: Recipe
    shapes: Mapping[str, ModelShape]
    """`student` first, then the teachers by name."""
    world: int
    device: PlannedDevice
    reads: Reads
    noiser: Noiser
    period: int | None = None
    """After so many ranks what they read repeats: a multiple of the vocabulary group's; None: never."""
    routing: Routing = dataclasses.field(default_factory=Zipf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What a rank holds, and does in its second step."""

    parameters: Mapping[str, Mapping[str, int]]
    """Model -> {`parameters`, `buffers`} -> bytes."""
    held: Mapping[Label, int]
    """Bytes alive between steps."""
    peaks: Mapping[str, Peak]
    """By phase; the second step's, in which the optimizer's moments stand."""
    calls: Mapping[Sent, int]
    num_bytes: Mapping[Sent, int]
    flops: Mapping[Label, int]
    """By owner and phase."""

    @property
    def peak(self) -> tuple[str, Peak]:
        """The phase that holds most, with what it holds."""
        return max(self.peaks.items(), key=lambda entry: entry[1].num_bytes)


def record_rank(job: PlannedJob, rank: int, *, steps: int = 2) -> RankRecord:
    """Build one rank of a job and run steps; this process must be in no world.

    Raises:
        TideError: what a real run would say.
    """
    recorder, peers = Recorder(), ComputedPeers(rank)
    listener = Listener(on_call=recorder.heard, peers=peers)
    with lone_world(job.device, rank, job.world, listener):
        with recorder:
            run = build_run(job, recorder)
        for name, model in models_of(run).items():
            for layer in route(model, name, job.routing, rank):
                layer.tell = peers.expect
        period = min(job.period or job.world, job.world)
        given = [run.read(job.reads(other)) for other in range(period)]  # on the host, with real numbers
        peers.know(run, given)
        with recorder:
            for step in range(steps):
                recorder.begin()
                train_step(run, given[rank % period], Clock(total_steps=steps + 1, step=step))
                adopt_states(run, recorder)
        return RankRecord(
            parameters={name: model_bytes(model) for name, model in models_of(run).items()},
            held={label: size for label, size in recorder.live.items() if size},
            peaks=dict(recorder.peaks),
            calls=Counter(recorder.calls),
            num_bytes=Counter(recorder.num_bytes),
            flops=Counter(recorder.flops),
        )


def build_run(job: PlannedJob, recorder: Recorder) -> Run:
    """Build student, teachers and head of the rank that this process stands for."""
    recipe, shapes, device = job.recipe, job.shapes, job.device
    phases = RecordedPhases(recorder)
    vocabularies = [shape.architecture.vocabulary for shape in shapes.values()]
    with META, recorder.within(phase="build"):
        group = make_vocab_group(vocabularies, head_ranks(recipe, job.world))
        student = build_student(recipe, shapes["student"], device)
        teachers = {
            name: OwnedTeacher(build_teacher(recipe, name, shapes[name], device, group, phases), recorder)
            for name in recipe.teachers
        }
    budget = (recipe.head.budget_mib or BUDGET_MIB[device.type]) * MIB
    head = HeadLoss(recipe.terms, group, recipe.head, budget_bytes=budget, phases=phases)
    head.compiler = PlannedCompiler(recorder)
    run = Run(
        student=student,
        teachers=teachers,
        head=head,
        noiser=job.noiser,
        phases=phases,
        device=CPU,  # rows, masks and lengths stay on the host, where they are real
    )
    for name, model in models_of(run).items():
        if device.type == "cuda" and recipe.attention in ("auto", "flex"):
            model.make_kernel = PlannedFlex(name, recorder)
    adopt_models(run, recorder)
    return run


def models_of(run: Run) -> dict[str, TideModel]:
    """Return the models of a run by name, the student first."""
    return {"student": run.student.model, **{name: one.model for name, one in run.teachers.items()}}


def adopt_models(run: Run, recorder: Recorder) -> None:
    """Say of what was built what it is."""
    for part in optimizers_of(run):
        for group in part.param_groups:
            recorder.adopt(group["params"], Label("student", "masters and moments"))
    for name, model in models_of(run).items():
        recorder.adopt([*model.parameters(), *model.buffers()], Label(name, "weights"))
    gradients = [parameter.main_grad for parameter in run.student.model.parameters()]
    recorder.adopt(gradients, Label("student", "gradients"))


def adopt_states(run: Run, recorder: Recorder) -> None:
    """Say of what the optimizer made in its update what it is."""
    for part in optimizers_of(run):
        for state in part.state.values():
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            recorder.adopt(tensors, Label("student", "masters and moments"))


def optimizers_of(run: Run) -> list[Any]:
    """Return torch's optimizers inside megatron-core's."""
    whole = run.student.optimizer
    parts = getattr(whole, "chained_optimizers", [whole])
    return [part.optimizer for part in parts if part.optimizer is not None]


def model_bytes(model: TideModel) -> dict[str, int]:
    """Return the bytes of a model's parameters and buffers on this rank."""
    return {
        "parameters": sum(one.numel() * one.element_size() for one in model.parameters()),
        "buffers": sum(one.numel() * one.element_size() for one in model.buffers()),
    }


class OwnedTeacher(Teacher):
    """A teacher whose work is booked on its name."""

    def __init__(self, teacher: Teacher, recorder: Recorder) -> None:
        """Take a teacher's place.

        Args:
            teacher: as `build_teacher` made it.
            recorder: on which it is booked.
        """
        super().__init__(
            teacher.name,
            teacher.model,
            teacher.view_builder,
            teacher.route,
            shared_schedule=teacher.shared_schedule,
            phases=teacher.phases,
        )
        self._recorder = recorder

    def hidden_states(self, request: Request, sizes: Sequence[Sizes]) -> Iterator[HeadInput]:
        """Yield what `Teacher.hidden_states` yields. All ranks of the vocabulary group iterate together."""
        stream = super().hidden_states(request, sizes)
        while True:
            with self._recorder.within(owner=self.name):
                answer = next(stream, None)
            if answer is None:
                return
            yield answer
