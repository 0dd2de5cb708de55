"""The models of a recipe, read but not built: what they are, whether their layouts can be, where they lie."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import check_available, check_widths
from tide_megatron.models.precision import Precision
from tide_megatron.models.weights import read_architecture
from tide_megatron.parallel.head_group import head_group_size
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.placement import Placed
from tide_megatron.train.recipe import Model, Recipe, StudentModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model of the recipe, read but not built."""

    key: str
    choice: Model
    architecture: Architecture
    tokenizer: Tokenizer


def read_plan(choice: Model, key: str) -> ModelPlan:
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
    return ModelPlan(key=key, choice=choice, architecture=architecture, tokenizer=tokenizer)


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
    return head_group_size([model.layout for model in recipe.teachers.values()], world, recipe.head.ranks)


def check_precision(plan: ModelPlan, device: Device) -> None:
    """Refuse a number format that the device does not have, naming the key of the model it belongs to."""
    with under(plan.key):
        Precision.on(plan.choice.precision, device)


def placed(choice: Model, architecture: Architecture, device: Device) -> Placed:
    """Say of a model what the placement picture needs."""
    return Placed(
        architecture=architecture,
        layout=choice.layout,
        bytes_per_parameter=Precision.on(choice.precision, device).dtype.itemsize,
        is_student=isinstance(choice, StudentModel),
    )


@contextlib.contextmanager
def under(key: str) -> Iterator[None]:
    """Put the key of the recipe's part before what a lower layer says of its field."""
    try:
        yield
    except ConfigError as fault:
        raise ConfigError(f"{key}.{fault}") from None
