"""From a recipe to what a run needs on this rank: data, tokenizers, student, teachers, head.

Files are read inside `fail_together`, so a fault that one rank sees ends all of them with one message.
What cannot work (layouts, vocabularies, schedules) is refused before any weight is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.phases import Phases
from tide_megatron.data.columns import PreparedData
from tide_megatron.data.loader import Loader, SideReading
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.loss import HeadLoss, check_budget
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.parallel.collectives import broadcast_object, fail_together, is_first
from tide_megatron.parallel.vocab_group import make_vocab_group
from tide_megatron.text.align import differing_ids, require_shared
from tide_megatron.text.tokenizer import Tokenizer
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
    under,
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
    contents: dict[str, str]
    """Key of a folder in the recipe -> digest of what lies there."""


def set_up(recipe: Recipe, device: Device) -> Setup:
    """Open the data and build student, teachers and head on this rank. All ranks call it together.

    Raises:
        TideError: on every rank alike, naming the key or file and what to do.
    """
    world = dist.get_world_size()
    with fail_together():
        plans = {"student": read_plan(recipe.student, "student")}
        plans |= {name: read_plan(model, f"teachers.{name}") for name, model in recipe.teachers.items()}
        for plan in plans.values():
            check_layout(plan.choice, plan.architecture, world, plan.key)
            check_precision(plan, device)
        ranks = head_ranks(recipe, world)
        tokenizer = plans["student"].tokenizer
        readers = {name: plan for name, plan in plans.items() if name != "student"}
        loader = open_loader(recipe, recipe.data.train, tokenizer, readers, is_trained_on=True)
        held_out = None
        if recipe.data.held_out:
            held_out = open_loader(recipe, recipe.data.held_out, tokenizer, readers, is_trained_on=False)
        loader = _with_vocabularies(loader, plans)
        held_out = held_out and _with_vocabularies(held_out, plans)
        _check_terms(recipe, plans, loader)
        shapes = {name: head_shape(plan, device) for name, plan in plans.items()}
        check_budget(recipe.head, recipe.terms, shapes, ranks, device)
        contents = model_contents(plans) if is_first() else None
    contents = broadcast_object(contents)
    if held_out:
        contents["data.held_out"] = held_out.columns.manifest.digest
    phases = Phases(device.torch_device)
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
            "teachers.%s: reads %s; %s view%s",
            name,
            f"its own tokens (side {reading.side!r} of the data)" if reading else "the student's tokens",
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
    return Setup(run=run, loader=loader, held_out=held_out, tokenizer=tokenizer, contents=contents)


def open_loader(
    recipe: Recipe,
    folder: str,
    tokenizer: Tokenizer,
    readers: Mapping[str, ModelPlan],
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
        is_trained_on: whether chunks are kept whole in it; held-out tokens are masked as drawn.
    """
    samples, accumulate = recipe.batch.accumulation(dist.get_world_size())
    with under("data"):
        columns = PreparedData(Path(folder), tokenizer_digest=tokenizer.digest)
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
            shard=recipe.student.layout.data_shard(dist.get_rank(), dist.get_world_size()),
            seed=recipe.seed,
            block_size=_filled_blocks(recipe.student.context),
            fixed_length=recipe.data.fixed_length,
            sides=sides,
        )


def _with_vocabularies(loader: Loader, plans: Mapping[str, ModelPlan]) -> Loader:
    """Return the loader that knows how many ids each model that reads from it has rows for."""
    known = {name: (plan.architecture.vocabulary, plan.key) for name, plan in plans.items()}
    return dataclasses.replace(
        loader,
        known=min(limit for name, limit in known.items() if name not in loader.sides),
        sides={
            name: dataclasses.replace(reading, known=known.get(name))
            for name, reading in loader.sides.items()
        },
    )


def _filled_blocks(context: Context) -> int:
    """Return the block size up to which samples are filled with end tokens."""
    return 1 if context.kind == "bidirectional" else context.block_size


def _kept_whole(recipe: Recipe, loader: Loader) -> tuple[str, ...]:
    """Return the sides of a batch whose chunks are masked whole."""
    if recipe.noise.chunk_hiding == "as_drawn":
        return ()
    chosen = recipe.noise.chunks_of
    if chosen is None:
        return tuple(name for name in loader.sides if name in recipe.teachers)
    return tuple(f"{side} chunks" for side in chosen)


def _check_terms(recipe: Recipe, plans: Mapping[str, ModelPlan], loader: Loader) -> None:
    """Refuse losses that do not fit the noise schedule or the vocabularies."""
    student = plans["student"]
    ours = student.architecture.vocabulary
    for name, loss in recipe.terms.items():
        teacher = None if loss.teacher is None else plans[loss.teacher]
        theirs = None if teacher is None else teacher.architecture.vocabulary
        with under(f"losses.{name}"):
            loss.check(recipe.noise.schedule, ours, theirs)
        if teacher is None or theirs is None:
            continue
        known = max(student.tokenizer.vocabulary_size, teacher.tokenizer.vocabulary_size)
        if isinstance(loss, ColumnLoss):
            limit = min(loss.columns(ours, theirs), known)
            require_shared(student.tokenizer, teacher.tokenizer, limit, f"losses.{name}")
        elif loss.teacher not in loader.sides:
            _check_own_tokens(name, str(loss.teacher), student, teacher, min(ours, theirs, known))


def _check_own_tokens(term: str, name: str, student: ModelPlan, teacher: ModelPlan, limit: int) -> None:
    """Refuse a chunk loss whose teacher would read another tokenizer's ids."""
    if differing_ids(student.tokenizer, teacher.tokenizer, limit):
        raise ConfigError(
            f"losses.{term}: teacher {name!r} has another vocabulary than the student, and data.train was "
            "not prepared for it; run `tide prepare` again with "
            f"--teacher {name}={teacher.choice.folder}"
        )
