"""From a recipe to what a run needs on this rank: data, tokenizers, student, teachers, head.

Files are read inside `fail_together`, so a fault that one rank sees ends all of them with one message.
What cannot work (layouts, vocabularies, schedules) is refused before any weight is read; `tide train
--dry-run` looks through the same eyes (`examine`) and tells all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, TideError, nearest, under
from tide_megatron.base.phases import Phases
from tide_megatron.base.startup import STARTUP
from tide_megatron.checkpoint.retention import TASK_SCORE
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.budget import HeadShape
from tide_megatron.head.loss import HeadLoss, check_budget
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.models.weights import check_folder_names, read_architecture
from tide_megatron.parallel.collectives import broadcast_object, fail_together, is_first, own_share
from tide_megatron.parallel.vocab_group import make_vocab_group
from tide_megatron.tasks.in_training import TrainingTasks
from tide_megatron.text.align import differing_ids, require_shared
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.data import open_loader
from tide_megatron.train.models import (
    ModelPlan,
    build_student,
    build_teacher,
    check_layout,
    check_precision,
    head_ranks,
    head_shape,
    placed,
    read_plan,
)
from tide_megatron.train.placement import drawn, placement_table
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.same_run import model_contents
from tide_megatron.train.step import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything a run needs on this rank."""

    run: Run
    loader: Loader
    held_out: Loader | None
    tokenizer: Tokenizer
    tokenizers: Mapping[str, Tokenizer]
    """Of the teachers, by name."""
    contents: dict[str, str]
    """Key of a folder in the recipe -> digest of what lies there."""
    tasks: TrainingTasks | None = None
    """What the student is asked besides; None: nothing."""
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    """What earlier starts of the run have cost, as its checkpoint tells (`CheckpointMetadata.spent`)."""


@dataclasses.dataclass(kw_only=True)
class Examination:
    """What a recipe names, read as far as it can be, and every fault of it."""

    faults: list[TideError] = dataclasses.field(default_factory=list)
    plans: dict[str, ModelPlan] = dataclasses.field(default_factory=dict)
    """`student` and the teachers by name."""
    ranks: int = 1
    """Of a vocabulary group."""
    data: dict[str, Loader] = dataclasses.field(default_factory=dict)
    """`train` and `held_out`."""
    shapes: dict[str, HeadShape] = dataclasses.field(default_factory=dict)
    tasks: TrainingTasks | None = None
    """What the student is asked besides; None: nothing, or it could not be read."""

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keep a fault, so that others are found, too."""
        try:
            yield
        except TideError as fault:
            self.faults.append(fault)

    def refuse_faults(self) -> None:
        """Raise the faults together, if there are any.

        Raises:
            TideError: the only fault, or one that names them all.
        """
        told = {str(fault): fault for fault in self.faults}
        if len(told) == 1:
            raise next(iter(told.values()))
        if told:
            raise ConfigError(f"{len(told)} faults:\n" + "\n".join(f"- {line}" for line in told))


def examine(recipe: Recipe, device: Device, place: tuple[int, int], *, headers: bool = False) -> Examination:
    """Read what a recipe names but no weights, and find all that a start would refuse. Not a collective.

    Args:
        recipe: validated.
        device: that it is to run on.
        place: (this rank, ranks).
        headers: also compare the names and shapes of all weights, which loading them does anyway.
    """
    found, world, fitting = Examination(), place[1], 0
    for name, model in {"student": recipe.student, **recipe.teachers}.items():
        key = name if model is recipe.student else f"teachers.{name}"
        with found.noting():
            folder = Path(model.folder)
            architecture = read_architecture(folder)
            with found.noting():
                check_layout(model, architecture, world, key)
                fitting += 1
            with found.noting():
                found.plans[name] = plan = read_plan(model, key)
                check_precision(plan, device)
                found.shapes[name] = head_shape(plan, device)
            if headers and model.initial == "folder":
                check_folder_names(folder, architecture)
    with found.noting():
        if fitting == 1 + len(recipe.teachers):
            found.ranks = head_ranks(recipe, world)
    with found.noting():
        recipe.batch.accumulation(world)
    _examine_data(recipe, place, found)
    with found.noting():
        if recipe.evaluation.asks and "student" in found.plans:
            plan = found.plans["student"]
            found.tasks = TrainingTasks(recipe.evaluation, plan.tokenizer, plan.architecture.max_positions)
    with found.noting():
        _check_best(recipe)
    if len(found.plans) > len(recipe.teachers) and "train" in found.data:
        _check_terms(recipe, found)
        with found.noting():
            if len(found.shapes) == len(found.plans):
                check_budget(recipe.head, recipe.terms, found.shapes, found.ranks, device)
    return found


def _examine_data(recipe: Recipe, place: tuple[int, int], found: Examination) -> None:
    """Open the data for its readers, or by itself where they or the batch cannot be."""
    is_fine = "student" in found.plans and _can_be_cut(recipe, place[1])
    parts = {"train": recipe.data.folders}
    if recipe.data.held_out:
        parts["held_out"] = {"data.held_out": recipe.data.held_out}
    for part, folders in parts.items():
        with found.noting():
            if is_fine:
                tokenizer, is_trained_on = found.plans["student"].tokenizer, part == "train"
                found.data[part] = open_loader(
                    recipe, folders, tokenizer, found.plans, place, is_trained_on=is_trained_on
                )
            else:
                for folder in folders.values():
                    PreparedData(Path(folder))


def _can_be_cut(recipe: Recipe, world: int) -> bool:
    try:
        recipe.batch.accumulation(world)
    except ConfigError:
        return False
    return True


def set_up(recipe: Recipe, device: Device) -> Setup:
    """Open the data and build student, teachers and head on this rank. All ranks call it together.

    Raises:
        TideError: on every rank alike, naming the key or file and what to do.
    """
    with fail_together(), STARTUP("data"):
        found = examine(recipe, device, own_share())
        if found.faults:
            raise found.faults[0]  # a dry run tells them all
        contents = model_contents(found.plans) if is_first() else None
    contents = broadcast_object(contents)
    plans, ranks, world = found.plans, found.ranks, dist.get_world_size()
    readers = {name: plan for name, plan in plans.items() if name != "student"}
    loader, held_out, shapes = found.data["train"], found.data.get("held_out"), found.shapes
    if held_out:
        contents["data.held_out"] = held_out.columns.digest
    phases = Phases(device.torch_device)
    with STARTUP("groups"):
        group = make_vocab_group([plan.architecture.vocabulary for plan in plans.values()], ranks)
    picture = {name: placed(plan.choice, plan.architecture, device) for name, plan in plans.items()}
    log.info("%s", drawn(placement_table(picture, world, ranks)))
    student = build_student(recipe, plans["student"], device)
    teachers = {
        name: build_teacher(recipe, name, plan, device, group, phases) for name, plan in readers.items()
    }
    for name, teacher in teachers.items():
        reading = loader.sides.get(name)
        log.info(
            "teachers.%s: reads %s%s; %s view%s",
            name,
            f"its own tokens (side {reading.side!r} of the data)" if reading else "the student's tokens",
            f" of {', '.join(loader.taught[name])} only" if name in loader.taught else "",
            recipe.teachers[name].view,
            f", {teacher.view_builder.forwards} forward(s)" if teacher.view_builder.complementary else "",
        )
    run = Run(
        student=student,
        teachers=teachers,
        head=HeadLoss.build(recipe.terms, group, recipe.head, shapes, device, phases),
        noiser=Noiser(
            seed=recipe.seed,
            options=recipe.noise,
            whole_chunks_of=_kept_whole(recipe, loader),
        ),
        phases=phases,
        device=device.torch_device,
    )
    return Setup(
        run=run,
        loader=loader,
        held_out=held_out,
        tokenizer=plans["student"].tokenizer,
        tokenizers={name: plan.tokenizer for name, plan in readers.items()},
        contents=contents,
        tasks=found.tasks,
    )


def _kept_whole(recipe: Recipe, loader: Loader) -> tuple[str, ...]:
    """Return the sides of a batch whose chunks are masked whole."""
    if recipe.noise.chunk_hiding == "as_drawn":
        return ()
    chosen = recipe.noise.chunks_of
    if chosen is None:
        return tuple(name for name in loader.sides if name in recipe.teachers)
    return tuple(f"{side} chunks" for side in chosen)


def _check_terms(recipe: Recipe, found: Examination) -> None:
    """Note losses that do not fit the noise schedule or the vocabularies."""
    student = found.plans["student"]
    ours = student.architecture.vocabulary
    for name, loss in recipe.terms.items():
        teacher = None if loss.teacher is None else found.plans[loss.teacher]
        theirs = None if teacher is None else teacher.architecture.vocabulary
        with found.noting():
            with under(f"losses.{name}"):
                loss.check(recipe.noise.schedule, ours, theirs)
            if teacher is None or theirs is None:
                continue
            known = max(student.tokenizer.vocabulary_size, teacher.tokenizer.vocabulary_size)
            if isinstance(loss, ColumnLoss):
                limit = min(loss.columns(ours, theirs), known)
                require_shared(student.tokenizer, teacher.tokenizer, limit, f"losses.{name}")
            elif loss.teacher not in found.data["train"].sides:
                _check_own_tokens(name, str(loss.teacher), student, teacher, min(ours, theirs, known))


def _check_own_tokens(term: str, name: str, student: ModelPlan, teacher: ModelPlan, limit: int) -> None:
    """Refuse a chunk loss whose teacher would read another tokenizer's ids."""
    if differing_ids(student.tokenizer, teacher.tokenizer, limit):
        raise ConfigError(
            f"losses.{term}: teacher {name!r} has another vocabulary than the student, and data.train was "
            "not prepared for it; run `tide prepare` again with "
            f"--teacher {name}={teacher.choice.folder}"
        )


def _check_best(recipe: Recipe) -> None:
    """Refuse to keep the best checkpoint by the score of a task that is not asked.

    Raises:
        ConfigError: naming the tasks that are.
    """
    by, asked = recipe.checkpoints.keep_best, recipe.evaluation.tasks
    if by.startswith(TASK_SCORE) and by.removeprefix(TASK_SCORE) not in asked:
        known = [f"{TASK_SCORE}{name}" for name in asked]
        told = nearest(by, known) if known else "set evaluation.tasks, too"
        raise ConfigError(f"checkpoints.keep_best: {by!r} is no score of this run; {told}")
