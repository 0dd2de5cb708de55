"""Where a recipe meets its data: folders opened for this rank, alone or as a blend, and who reads what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from tide_megatron.base.errors import ConfigError, nearest, under
from tide_megatron.data.blend import BlendedData
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader, SideReading
from tide_megatron.diffusion.mask import Context
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.models import ModelPlan
from tide_megatron.train.recipe import Recipe


def open_loader(
    recipe: Recipe,
    folders: Mapping[str, str],
    tokenizer: Tokenizer,
    plans: Mapping[str, ModelPlan],
    place: tuple[int, int],
    *,
    is_trained_on: bool,
) -> Loader:
    """Open prepared data for this rank; refuse what was made with another tokenizer. Not a collective.

    Args:
        recipe: batch, seed, student.
        folders: the data by recipe key; several are a blend.
        tokenizer: the student's.
        plans: the student and the teachers; each teacher reads the side that was prepared for its tokenizer
            and template, if there is one, else the student's tokens.
        place: (this rank, ranks).
        is_trained_on: whether chunks are kept whole in it; held-out tokens are masked as drawn.
    """
    samples, accumulate = recipe.batch.accumulation(place[1])
    with under("data"):
        columns = _opened(recipe, folders, tokenizer)
        sides = {}
        readers = {name: plan for name, plan in plans.items() if name != "student"}
        for name, plan in readers.items():
            side = columns.side_of(plan.tokenizer.digest)
            if side is None:
                _check_mask_of_side(columns, name, plan)
            else:
                _check_taught_have_side(columns, side, recipe, name)
                sides[name] = SideReading(side=side, block_size=_filled_blocks(plan.choice.context))
        for side in (recipe.noise.chunks_of or ()) if is_trained_on else ():
            if side not in columns.sides:
                raise ConfigError(
                    f"train: {columns.name} has no side {side!r}, which noise.chunks_of names; "
                    f"{nearest(side, columns.sides)}"
                )
            sides.setdefault(f"{side} chunks", SideReading(side=side))
        loader = Loader(
            columns=columns,
            samples=samples,
            accumulate=accumulate,
            shard=recipe.student.layout.data_shard(*place),
            deal=recipe.batch.deal,
            seed=recipe.seed,
            block_size=_filled_blocks(recipe.student.context),
            fixed_length=recipe.data.fixed_length,
            sides=sides,
        )
    if is_trained_on:
        taught = _taught(recipe, columns)
        with under("batch"):
            loader = dataclasses.replace(loader, tokens=recipe.batch.tokens, taught=taught)
    return _with_vocabularies(loader, plans)


def _opened(recipe: Recipe, folders: Mapping[str, str], tokenizer: Tokenizer) -> PreparedData | BlendedData:
    """Open one folder, or several as a blend, which may read none of them too often."""
    opened = {key: PreparedData(Path(folder), tokenizer=tokenizer) for key, folder in folders.items()}
    if folders != recipe.data.folders or not recipe.data.blend:
        (columns,) = opened.values()
        return columns
    with under("blend"):
        sources = recipe.data.blend
        blend = BlendedData(
            {name: (sources[name], data) for name, data in zip(sources, opened.values(), strict=True)},
            recipe.seed,
        )
        blend.check_epochs(recipe.steps * recipe.batch.samples)
    return blend


def _check_mask_of_side(columns: PreparedData | BlendedData, name: str, plan: ModelPlan) -> None:
    """Refuse data whose side of a teacher's name has this teacher's tokens and another mask token.

    Otherwise the teacher would be taken for one that reads the student's tokens.
    """
    side = columns.sides.get(name)
    differences = side.tokenizer.differences(plan.tokenizer) if side else []
    if len(differences) == 1 and differences[0].startswith("its mask token"):
        raise ConfigError(
            f"{columns.name}: side {name!r}: {differences[0]}; prepare the data again with --teacher "
            f"{name}={plan.choice.folder}, or set {plan.key}.mask to the token that it was prepared with"
        )


def _taught(recipe: Recipe, columns: PreparedData | BlendedData) -> dict[str, tuple[str, ...]]:
    """Return the sources that each teacher teaches, for those that do not teach all."""
    known = columns.source_names
    found = {}
    for name, teacher in recipe.teachers.items():
        for source in teacher.sources or ():
            if source not in known:
                raise ConfigError(
                    f"teachers.{name}.sources: {columns.name} has no source {source!r}; "
                    f"{nearest(source, known)}"
                )
        if teacher.sources is not None:
            found[name] = teacher.sources
    return found


def _check_taught_have_side(
    columns: PreparedData | BlendedData, side: str, recipe: Recipe, name: str
) -> None:
    """Refuse a blend in which a source that a teacher teaches has none of its tokens."""
    lacking = columns.without(side) if isinstance(columns, BlendedData) else []
    taught = recipe.teachers[name].sources
    for source in lacking:
        if taught is None or source in taught:
            raise ConfigError(
                f"blend.{source}: has no tokens of teacher {name!r}, which other sources have; prepare it "
                f"again with --teacher {name}={recipe.teachers[name].folder}, or name those that it teaches "
                f"in teachers.{name}.sources"
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
