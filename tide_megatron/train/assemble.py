"""From a recipe to the parts of a run on this rank: data, tokenizers, student, teachers.

Files are read inside `fail_together`, so a fault that one rank sees ends all of them with one message.
What cannot work (layouts, vocabularies, schedules) is refused before any weight is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import tide_megatron.platform  # noqa: F401 - before megatron

import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.data.columns import Columns
from tide_megatron.data.loader import Loader, SideReading
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.schedule import SCHEDULES
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.shared_vocabulary import SharedVocabulary
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import TideModel, build_model, check_available
from tide_megatron.models.convert import draw_weights, load_model, read_architecture
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import Options
from tide_megatron.parallel.collectives import fail_together
from tide_megatron.parallel.groups import make_groups
from tide_megatron.teachers.teacher import Sight, Teacher
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.text.vocabulary import differing_ids, require_shared
from tide_megatron.train.metrics import Phases
from tide_megatron.train.recipe import Model, Recipe, StudentModel
from tide_megatron.train.step import Run
from tide_megatron.train.student import Student

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run needs on this rank."""

    run: Run
    loader: Loader
    held_out: Loader | None
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """A model of the recipe, read but not built."""

    key: str
    choice: Model
    architecture: Architecture
    tokenizer: Tokenizer


def assemble(recipe: Recipe, device: Device) -> Parts:
    """Build data, student and teachers on this rank. All ranks call it together.

    Raises:
        TideError: on every rank alike, naming the key or file and what to do.
    """
    world = dist.get_world_size()
    with fail_together():
        plans = {"student": _read(recipe.student, "student")}
        plans |= {name: _read(model, f"teachers.{name}") for name, model in recipe.teachers.items()}
        for plan in plans.values():
            check_layout(plan.choice, plan.architecture, world, plan.key)
        tokenizer = plans["student"].tokenizer
        readers = {name: plan for name, plan in plans.items() if name != "student"}
        loader = open_loader(recipe, recipe.data.train, tokenizer, readers, is_trained_on=True)
        held_out = None
        if recipe.data.held_out:
            held_out = open_loader(recipe, recipe.data.held_out, tokenizer, readers, is_trained_on=False)
        _check_terms(recipe, plans, loader)
    student = plans.pop("student")
    trained = Student(
        _build(recipe, student, device),
        recipe.student.context,
        student.tokenizer.mask_id,
        recipe.optimizer,
    )
    teachers = {
        name: Teacher(name, _build(recipe, plan, device), _sight(recipe, name, plan))
        for name, plan in plans.items()
    }
    for name, teacher in teachers.items():
        reading = loader.sides.get(name)
        log.info(
            "teachers.%s: reads %s; %s view%s",
            name,
            f"its own tokens (side {reading.side!r} of the data)" if reading else "the student's tokens",
            recipe.teachers[name].view,
            f", {teacher.sight.forwards} forward(s)" if teacher.sight.complementary else "",
        )
    run = Run(
        student=trained,
        teachers=teachers,
        losses=recipe.terms,
        noiser=Noiser(
            seed=recipe.seed,
            schedule=SCHEDULES[recipe.noise.schedule],
            time_epsilon=recipe.noise.time_epsilon,
            whole_chunks_of=_kept_whole(recipe, loader),
        ),
        phases=Phases(device.torch_device),
        device=device.torch_device,
    )
    return Parts(run=run, loader=loader, held_out=held_out, tokenizer=tokenizer)


def open_loader(
    recipe: Recipe,
    folder: str,
    tokenizer: Tokenizer,
    readers: Mapping[str, _Plan],
    *,
    is_trained_on: bool,
) -> Loader:
    """Open a prepared data folder for this rank; refuse one that was made with another tokenizer.

    Args:
        recipe: batch, seed, student.
        folder: the data.
        tokenizer: the student's.
        readers: the teachers; each reads the side that was prepared for its tokenizer and template, if there
            is one, else the student's tokens.
        is_trained_on: whether chunks are kept whole in it; held-out tokens are hidden as drawn.
    """
    samples, accumulate = recipe.batch.accumulation(dist.get_world_size())
    with _under("data"):
        columns = Columns(Path(folder), tokenizer_digest=tokenizer.digest)
        sides = {}
        for name, plan in readers.items():
            side = columns.manifest.side_of(plan.tokenizer.digest)
            if side is not None:
                sides[name] = SideReading(side=side, block_size=_filled_blocks(plan.choice.context))
        for side in (recipe.noise.chunks_of or ()) if is_trained_on else ():
            if side not in columns.manifest.sides:
                raise ConfigError(
                    f"train: {folder} has no side {side!r}, which noise.chunks_of names; "
                    f"{nearest(side, columns.manifest.sides)}"
                )
            sides.setdefault(f"{side} chunks", SideReading(side=side))
        return Loader(
            columns=columns,
            samples=samples,
            accumulate=accumulate,
            ranks=(dist.get_rank(), dist.get_world_size()),
            seed=recipe.seed,
            block_size=_filled_blocks(recipe.student.context),
            fixed_length=recipe.data.fixed_length,
            sides=sides,
        )


def _filled_blocks(context: Context) -> int:
    """Return the block size up to which samples are filled with end tokens."""
    return 1 if context.kind == "bidirectional" else context.block_size


def _kept_whole(recipe: Recipe, loader: Loader) -> tuple[str, ...]:
    """Return the sides of a batch whose chunks are hidden whole."""
    if recipe.noise.chunk_hiding == "as_drawn":
        return ()
    chosen = recipe.noise.chunks_of
    if chosen is None:
        return tuple(name for name in loader.sides if name in recipe.teachers)
    return tuple(f"{side} chunks" for side in chosen)


def _sight(recipe: Recipe, name: str, plan: _Plan) -> Sight:
    """Say how a teacher sees a microbatch."""
    choice = recipe.teachers[name]
    is_split = choice.view == "complementary"
    return Sight(
        context=choice.context,
        mask_id=plan.tokenizer.mask_id,
        complementary=Complementary(seed=recipe.seed, share=choice.shown_share) if is_split else None,
        forwards=2 if choice.forwards == "two" else 1,
    )


def check_layout(choice: Model, architecture: Architecture, world: int, key: str) -> None:
    """Refuse a layout that cannot be, naming the key of the model it belongs to."""
    with _under(key):
        choice.layout.check(
            world,
            heads=architecture.heads,
            groups=architecture.query_groups,
            experts=architecture.num_experts,
            layers=architecture.layers,
        )
        check_available(choice.layout)


@contextlib.contextmanager
def _under(key: str) -> Iterator[None]:
    """Put the key of the recipe's part before what a lower layer says of its field."""
    try:
        yield
    except ConfigError as fault:
        raise ConfigError(f"{key}.{fault}") from None


def _read(choice: Model, key: str) -> _Plan:
    """Read a model's config and tokenizer, and check that the vocabulary has a row for every id."""
    folder = Path(choice.folder)
    architecture = read_architecture(folder)
    tokenizer = Tokenizer.load(folder, mask=choice.mask)
    if tokenizer.vocabulary_size > architecture.vocabulary:
        raise ConfigError(
            f"{key}.folder: the tokenizer in {folder} has {tokenizer.vocabulary_size} ids (mask token "
            f"{choice.mask!r} is id {tokenizer.mask_id}), the model only {architecture.vocabulary} rows; "
            f"set {key}.mask to a token the model knows"
        )
    return _Plan(key=key, choice=choice, architecture=architecture, tokenizer=tokenizer)


def _check_terms(recipe: Recipe, plans: Mapping[str, _Plan], loader: Loader) -> None:
    """Refuse losses that do not fit the noise schedule or the vocabularies."""
    student = plans["student"]
    for name, loss in recipe.terms.items():
        if isinstance(loss, CrossEntropy) and loss.schedule != recipe.noise.schedule:
            raise ConfigError(
                f"losses.{name}.schedule: {loss.schedule!r} weighs another schedule than noise.schedule "
                f"{recipe.noise.schedule!r} hides by; set both alike"
            )
        if loss.teacher is None:
            continue
        teacher = plans[loss.teacher]
        limit = min(student.architecture.vocabulary, teacher.architecture.vocabulary)
        if isinstance(loss, SharedVocabulary):
            with _under(f"losses.{name}"):
                limit = loss.columns(student.architecture.vocabulary, teacher.architecture.vocabulary)
        limit = min(limit, max(student.tokenizer.vocabulary_size, teacher.tokenizer.vocabulary_size))
        if isinstance(loss, SharedVocabulary):
            require_shared(student.tokenizer, teacher.tokenizer, limit, f"losses.{name}")
        elif loss.teacher not in loader.sides:
            _check_own_tokens(name, loss.teacher, student, teacher, limit)


def _check_own_tokens(term: str, name: str, student: _Plan, teacher: _Plan, limit: int) -> None:
    """Refuse a chunk loss whose teacher would read another tokenizer's ids."""
    if differing_ids(student.tokenizer, teacher.tokenizer, limit):
        raise ConfigError(
            f"losses.{term}: teacher {name!r} has another vocabulary than the student, and data.train was "
            "not prepared for it; run `tide prepare` again with "
            f"--teacher {name}={teacher.choice.folder}"
        )


def _build(recipe: Recipe, plan: _Plan, device: Device) -> TideModel:
    """Build one model and fill it from its folder or from the seed. All ranks call it together."""
    choice = plan.choice
    is_student = isinstance(choice, StudentModel)
    options = Options(
        device=device,
        layout=choice.layout,
        precision=Precision.choose(choice.precision, device.type),
        trainable=is_student,
        attention=recipe.attention,
        router_bias_rate=choice.router_bias_rate if isinstance(choice, StudentModel) else 0.0,
    )
    model = build_model(plan.architecture, make_groups(choice.layout), options)
    with fail_together():
        if choice.initial == "random":
            report = draw_weights(model, recipe.seed)
        else:
            report = load_model(model, Path(choice.folder))
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
