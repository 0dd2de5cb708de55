"""From a recipe and config.json files to a job that can be planned: no weights, no tokenizers, no data.

Samples are made up: all of one length, every token of them a reply that may be masked. So half of the tokens
are rows of the heads in the mean, and more than in a real run, whose prompts are never masked. A teacher with
a tokenizer of its own reads as many tokens as the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import tide_megatron.platform
from tide_megatron.platform.lone_world import PlannedDevice

import torch

from tide_megatron.base.device import Kind
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.models.weights import read_architecture
from tide_megatron.plan.one_rank import PlannedJob
from tide_megatron.plan.routing import Routing
from tide_megatron.train.models import ModelShape, check_layout, check_precision, head_ranks
from tide_megatron.train.recipe import Recipe

_FIRST_ID = 2
"""Ids from here on are read: what the first ones mean is not asked."""


def read_shapes(recipe: Recipe) -> dict[str, ModelShape]:
    """Read what each model of a recipe is, the student's first.

    Raises:
        TideError: a folder has no config.json, or it says what is not known.
    """
    return {
        name: ModelShape(
            key=name if choice is recipe.student else f"teachers.{name}",
            choice=choice,
            architecture=read_architecture(Path(choice.folder)),
            mask_id=1,
        )
        for name, choice in {"student": recipe.student, **recipe.teachers}.items()
    }


def sample_length(recipe: Recipe, shapes: Mapping[str, ModelShape], asked: int | None) -> int:
    """Return how many tokens a sample has.

    Args:
        recipe: may fix it.
        shapes: of the models that read it.
        asked: by the user; None: the recipe says it.

    Raises:
        ConfigError: nobody says it, or a model has not so many positions.
    """
    length = asked or recipe.data.fixed_length
    if length is None:
        raise ConfigError("data.fixed_length: the recipe names none; say with --length how long samples are")
    for shape in shapes.values():
        if length > shape.architecture.max_positions:
            raise ConfigError(
                f"--length: {length} tokens are more than the {shape.architecture.max_positions} positions "
                f"of {shape.key} ({shape.choice.folder}); use at most so many"
            )
    return length


def with_choices(shapes: Mapping[str, ModelShape], recipe: Recipe) -> dict[str, ModelShape]:
    """Return the same models as another recipe cuts them."""
    choices = {"student": recipe.student, **recipe.teachers}
    return {name: dataclasses.replace(shape, choice=choices[name]) for name, shape in shapes.items()}


def make_job(
    recipe: Recipe,
    shapes: Mapping[str, ModelShape],
    *,
    world: int,
    length: int,
    kind: Kind = "cuda",
    routing: Routing | None = None,
) -> PlannedJob:
    """Check a recipe's layouts for a number of ranks, and make up what they read.

    Args:
        recipe: validated.
        shapes: from `read_shapes`, cut as the recipe says.
        world: ranks.
        length: tokens of a sample.
        kind: of device.
        routing: of mixtures; None: balanced.

    Raises:
        ConfigError: a layout, a precision or the batch does not fit.
    """
    device = PlannedDevice.of(kind)
    for shape in shapes.values():
        check_layout(shape.choice, shape.architecture, world, shape.key)
        check_precision(shape, device)
    samples, microbatches = recipe.batch.accumulation(world)
    vocabulary = min(shape.architecture.vocabulary for shape in shapes.values())

    def reads(rank: int) -> Sequence[Batch]:
        first = rank * samples * microbatches
        return [
            _batch(first + number * samples, samples, length, vocabulary) for number in range(microbatches)
        ]

    job = PlannedJob(
        recipe=recipe,
        shapes=shapes,
        world=world,
        device=device,
        reads=reads,
        noiser=Noiser(seed=recipe.seed, options=recipe.noise),
        period=head_ranks(recipe, world),
    )
    return job if routing is None else dataclasses.replace(job, routing=routing)


def _batch(first: int, samples: int, length: int, vocabulary: int) -> Batch:
    """Make up a microbatch of samples from a number on."""
    generator = torch.Generator().manual_seed(first)
    ids = torch.randint(_FIRST_ID, vocabulary, (samples, length), generator=generator)
    return Batch(
        sample_ids=torch.arange(first, first + samples),
        epochs=torch.zeros(samples, dtype=torch.int64),
        ids=ids,
        labels=ids.clone(),
        reply_bytes=torch.full((samples,), length),
    )
