"""The models of a run: read and checked before any weight is, then built, each with groups of its own."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import tide_megatron.platform

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, DataError, under
from tide_megatron.base.phases import Phases
from tide_megatron.base.startup import STARTUP
from tide_megatron.diffusion.views import Complementary
from tide_megatron.evaluate.model_folder import context_differences
from tide_megatron.head.budget import HeadShape
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import TideModel, build_model, check_available, check_widths
from tide_megatron.models.engine import Engine
from tide_megatron.models.fp8 import SCALINGS
from tide_megatron.models.fp8_engine import check_fp8, choose_engine
from tide_megatron.models.precision import Fp8Options, Precision, numbers
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, load_model, read_architecture
from tide_megatron.parallel.collectives import fail_together, is_first
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import VocabGroup, make_across, vocab_group_size
from tide_megatron.teachers.exchange import Route
from tide_megatron.teachers.teacher import Teacher, ViewBuilder
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.placement import Placed
from tide_megatron.train.recipe import Model, Recipe, StudentModel, TeacherModel
from tide_megatron.train.student import Student

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model of the recipe as far as its config.json tells: built without weights in it, by a plan."""

    key: str
    choice: Model
    architecture: Architecture
    mask_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan(ModelShape):
    """A model of the recipe, read but not built."""

    tokenizer: Tokenizer


def read_plan(choice: Model, key: str) -> ModelPlan:
    """Read a model's config and tokenizer, and check that the vocabulary has a row for every id.

    A context that is another than the folder was trained in is warned of: a teacher may be read in one on
    purpose.

    Raises:
        TideError: naming the key or file. A teacher whose mask token is not in its vocabulary is refused: it
            was never trained with it.
    """
    folder = Path(choice.folder)
    architecture = read_architecture(folder)
    try:
        with under(key):
            tokenizer = Tokenizer.load(
                folder,
                mask=choice.mask,
                add_mask=isinstance(choice, StudentModel) and choice.add_mask,
                template=choice.template,
                chat_template_kwargs=choice.chat_template_kwargs,
            )
    except DataError as fault:
        raise DataError(f"{key}: {fault}") from None
    if tokenizer.vocabulary_size > architecture.vocabulary:
        remedy = f"set {key}.mask to a token the model knows"
        if tokenizer.mask_was_added:
            remedy += f", or give it a row for the mask token: tide model add-mask {folder}"
        raise ConfigError(
            f"{key}.folder: the tokenizer in {folder} has {tokenizer.vocabulary_size} ids (mask token "
            f"{tokenizer.special_tokens['mask_token']!r} is id {tokenizer.mask_id}), the model only "
            f"{architecture.vocabulary} rows; {remedy}"
        )
    for difference in context_differences(folder, choice.context):
        if is_first():
            log.warning("%s.%s (%s): check that this is meant", key, difference, folder)
    return ModelPlan(
        key=key,
        choice=choice,
        architecture=architecture,
        mask_id=tokenizer.mask_id,
        tokenizer=tokenizer,
    )


def check_layout(choice: Model, architecture: Architecture, world: int, key: str) -> None:
    """Refuse a layout that cannot be, naming the key of the model it belongs to."""
    with under(key):
        choice.layout.check(
            world,
            heads=architecture.heads,
            groups=architecture.query_groups,
            experts=architecture.num_experts,
            layers=architecture.layers,
        )
        check_available(choice.layout, trainable=isinstance(choice, StudentModel))
        check_widths(architecture, choice.layout)


def head_ranks(recipe: Recipe, world: int) -> int:
    """Return how many ranks share the vocabulary heads of a run; the teachers' layouts are checked.

    Raises:
        ConfigError: `head.ranks` does not fit.
    """
    return vocab_group_size([model.layout for model in recipe.teachers.values()], world, recipe.head.ranks)


def check_precision(plan: ModelShape, device: Device) -> None:
    """Refuse a number format or engine that the device does not have, naming the key of its model."""
    choice = plan.choice
    with under(plan.key):
        engine, fp8 = _engine(choice, device), _fp8(choice)
        if fp8 is not None:
            check_fp8(fp8, engine, device, plan.architecture, choice.layout)


def _engine(choice: Model, device: Device) -> Engine:
    """Say what computes a model's layers."""
    return choose_engine(choice.engine, _fp8(choice), Precision.on(choice.precision, device), device)


def _fp8(choice: Model) -> Fp8Options | None:
    """Say how a model's matrices are held; None: in its precision."""
    return choice.fp8 if isinstance(choice, TeacherModel) else None


def computed(choice: Model, device: Device) -> str:
    """Say in what numbers, and by whose layers, a model is computed.

    Raises:
        ConfigError: it cannot be; without the model's key.
    """
    precision = Precision.on(choice.precision, device)
    return f"{numbers(precision, _fp8(choice))}, {_engine(choice, device).name}"


def head_shape(plan: ModelShape, device: Device) -> HeadShape:
    """Say what a model's logits take."""
    return HeadShape(plan.architecture.vocabulary, Precision.on(plan.choice.precision, device).dtype)


def placed(choice: Model, architecture: Architecture, device: Device) -> Placed:
    """Say of a model what the placement picture needs."""
    return Placed(
        architecture=architecture,
        layout=choice.layout,
        dtype=Precision.on(choice.precision, device).dtype,
        fp8=_fp8(choice),
        is_student=isinstance(choice, StudentModel),
    )


def build_student(recipe: Recipe, plan: ModelShape, device: Device) -> Student:
    """Build the student with its weights, data-parallel wrapper and optimizer. All ranks call it together.

    A shape alone has no weights to fill in.

    Raises:
        TideError: on every rank alike, for weights that do not fit or cannot be read.
    """
    model = _build(recipe, plan, device)
    with STARTUP(plan.key):
        return Student(
            model,
            recipe.student.context,
            plan.mask_id,
            recipe.optimizer,
            pack=recipe.batch.pack,
        )


def build_teacher(
    recipe: Recipe, name: str, plan: ModelShape, device: Device, group: VocabGroup, phases: Phases
) -> Teacher:
    """Build a teacher: its model, how it sees a microbatch, how its rows travel. All ranks call it together.

    Args:
        recipe: the run.
        name: the teacher's.
        plan: its model; the layout is checked.
        device: where to.
        group: who owns which ids of the heads.
        phases: the run's timer, in which teachers book what they exchange.

    Raises:
        TideError: on every rank alike, for weights that do not fit or cannot be read.
    """
    model = _build(recipe, plan, device, group.columns(plan.architecture.vocabulary))
    layout, experts = plan.choice.layout, plan.architecture.num_experts
    with STARTUP("groups"):
        across = make_across(layout, group.size)
    route = Route(layout=layout, replica=model.groups.mp, across=across, rank=group.rank)
    if layout.tensor > 1 and experts:
        log.info(
            "%s: each token passes its experts %d times (frozen models have no sequence parallelism); "
            "pipeline or expert ranks instead of tensor ranks would not cost that",
            plan.key,
            layout.tensor,
        )
    return Teacher(
        name,
        model,
        _view_builder(recipe, name, plan),
        route,
        shared_schedule=recipe.teachers[name].shared_schedule,
        phases=phases,
    )


def _view_builder(recipe: Recipe, name: str, plan: ModelShape) -> ViewBuilder:
    """Say how a teacher sees a microbatch."""
    choice = recipe.teachers[name]
    is_split = choice.view == "complementary"
    return ViewBuilder(
        context=choice.context,
        mask_id=plan.mask_id,
        complementary=Complementary(seed=recipe.seed, share=choice.shown_share) if is_split else None,
        forwards=2 if choice.forwards == "two" else 1,
        pack=recipe.batch.pack,
    )


def _build(
    recipe: Recipe, plan: ModelShape, device: Device, head: tuple[int, int] | None = None
) -> TideModel:
    """Build one model; fill one that was read from its folder or the seed. All ranks call it together.

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
        engine=_engine(choice, device),
        fp8=_fp8(choice),
        trainable=is_student,
        attention=recipe.attention,
        experts=recipe.experts,
        head=head,
        recompute=choice.recompute if isinstance(choice, StudentModel) else False,
        router_bias_rate=choice.router_bias_rate if isinstance(choice, StudentModel) else 0.0,
    )
    if options.fp8 is not None:
        tell_fp8(plan.key, options.fp8, choice.layout)
    with STARTUP("groups"):
        groups = make_groups(choice.layout)
    with STARTUP(plan.key):
        model = build_model(plan.architecture, groups, options)
    if isinstance(plan, ModelPlan):
        _fill(recipe, plan, model, options)
    return model


def _fill(recipe: Recipe, plan: ModelPlan, model: TideModel, options: ModelOptions) -> None:
    """Read or draw a model's weights, and log what it is now. All ranks call it together."""
    choice = plan.choice
    with fail_together(), STARTUP(plan.key):
        if choice.initial == "random":
            report = draw_weights(model, recipe.seed)
        else:
            report = load_model(model, Path(choice.folder), verify=choice.verify, mask_id=plan.mask_id)
    log.info(
        "%s: %s, %s, %s, layout %s, context %s, %d parameters on this rank, %d bytes read",
        plan.key,
        plan.architecture.model_type,
        numbers(options.precision, options.fp8),
        options.engine,
        choice.layout,
        choice.context.kind,
        report.parameters,
        report.bytes_read,
    )


def tell_fp8(key: str, fp8: Fp8Options, layout: Layout) -> None:
    """Say on the first rank what an FP8 recipe makes a teacher's answers depend on, beside its own tokens."""
    if not is_first():
        return
    if SCALINGS[fp8.recipe].spans_rows:
        log.warning(
            "%s.fp8.recipe: %s: one scale spans all tokens of a microbatch, so an answer depends on its "
            "batchmates, about as much as FP8 moves it at all; rowwise and blockwise do not",
            key,
            fp8.recipe,
        )
    if layout.tensor > 1 or layout.expert_tensor > 1:
        log.info(
            "%s: each tensor rank finds FP8 scales of its own part, so answers differ from those of one rank "
            "within what FP8 moves them (docs/precision.md); pipeline and expert ranks change nothing",
            key,
        )
