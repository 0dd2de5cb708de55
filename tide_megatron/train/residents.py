"""The models of a run on this rank: student, teachers in their own layouts, the heads they share."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import tide_megatron.platform  # noqa: F401 - before megatron

import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.base.phases import Phases
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.head.cut import Cut
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, load_model
from tide_megatron.parallel.collectives import fail_together
from tide_megatron.parallel.groups import HeadGroup, make_across, make_groups, make_head_group
from tide_megatron.teachers.route import Route
from tide_megatron.teachers.sight import Sight
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.placement import drawn, placement_table
from tide_megatron.train.plans import ModelPlan, head_ranks, placed
from tide_megatron.train.recipe import Recipe, StudentModel
from tide_megatron.train.student import Student

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residents:
    """What lives on this rank."""

    student: Student
    teachers: Mapping[str, Teacher]
    head: HeadGroup
    cut: Cut


def build_residents(
    recipe: Recipe, plans: Mapping[str, ModelPlan], device: Device, phases: Phases
) -> Residents:
    """Build all models of a run, each with groups of its own. All ranks call it together.

    Args:
        recipe: the run.
        plans: `student` and every teacher by name, in one order on all ranks; layouts are checked.
        device: where to.
        phases: the run's timer, in which teachers book what they exchange.

    Raises:
        TideError: on every rank alike, for weights that do not fit or cannot be read.
    """
    world = dist.get_world_size()
    head = make_head_group(head_ranks(recipe, world))
    cut = Cut.of([plan.architecture.vocabulary for plan in plans.values()], head.ranks, head.place)
    picture = {name: placed(plan.choice, plan.architecture, device) for name, plan in plans.items()}
    log.info("%s", drawn(placement_table(picture, world, head.ranks)))
    student = plans["student"]
    trained = Student(
        _build(recipe, student, device),
        recipe.student.context,
        student.tokenizer.mask_id,
        recipe.optimizer,
    )
    teachers = {
        name: _teacher(recipe, name, plan, _build(recipe, plan, device, _owned(plan, cut)), head, phases)
        for name, plan in plans.items()
        if plan is not student
    }
    return Residents(student=trained, teachers=teachers, head=head, cut=cut)


def _owned(plan: ModelPlan, cut: Cut) -> tuple[int, int]:
    """Return which ids' rows of a teacher's head this rank holds."""
    return cut.columns(plan.architecture.vocabulary)


def _teacher(
    recipe: Recipe, name: str, plan: ModelPlan, model: TideModel, head: HeadGroup, phases: Phases
) -> Teacher:
    """Join a teacher's model with how it sees and how its rows travel. All ranks call it together."""
    route = Route(
        layout=plan.choice.layout,
        replica=model.groups.mp,
        across=make_across(plan.choice.layout, head.ranks),
        place=head.place,
    )
    sight = _sight(recipe, name, plan)
    layout, experts = plan.choice.layout, plan.architecture.num_experts
    if layout.tensor > 1 and experts:
        log.info(
            "%s: each token passes its experts %d times (frozen models have no sequence parallelism); "
            "pipeline or expert ranks instead of tensor ranks would not cost that",
            plan.key,
            layout.tensor,
        )
    shared = recipe.teachers[name].shared_schedule
    return Teacher(name, model, sight, route, shared_schedule=shared, phases=phases)


def _sight(recipe: Recipe, name: str, plan: ModelPlan) -> Sight:
    """Say how a teacher sees a microbatch."""
    choice = recipe.teachers[name]
    is_split = choice.view == "complementary"
    return Sight(
        context=choice.context,
        mask_id=plan.tokenizer.mask_id,
        complementary=Complementary(seed=recipe.seed, share=choice.shown_share) if is_split else None,
        forwards=2 if choice.forwards == "two" else 1,
    )


def _build(recipe: Recipe, plan: ModelPlan, device: Device, head: tuple[int, int] | None = None) -> TideModel:
    """Build one model and fill it from its folder or from the seed. All ranks call it together.

    Args:
        recipe: the run.
        plan: the model.
        device: where to.
        head: which ids' rows of its output head this rank holds; None: all.
    """
    choice = plan.choice
    is_student = isinstance(choice, StudentModel)
    options = ModelOptions(
        device=device,
        layout=choice.layout,
        precision=Precision.on(choice.precision, device),
        trainable=is_student,
        attention=recipe.attention,
        head=head,
        recompute=choice.recompute if isinstance(choice, StudentModel) else False,
        router_bias_rate=choice.router_bias_rate if isinstance(choice, StudentModel) else 0.0,
    )
    model = build_model(plan.architecture, make_groups(choice.layout), options)
    with fail_together():
        if choice.initial == "random":
            report = draw_weights(model, recipe.seed)
        else:
            report = load_model(model, Path(choice.folder), verify=choice.verify)
    log.info(
        "%s: %s, %s, layout %s, context %s, %d parameters on this rank, %d bytes read",
        plan.key,
        plan.architecture.model_type,
        options.precision.name,
        choice.layout,
        choice.context.kind,
        report.parameters,
        report.bytes_read,
    )
    return model
