"""What `tide train --dry-run` prints: the resolved recipe, its digest, and how it lands on the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import rich
from omegaconf import OmegaConf
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from tide_megatron.base.device import Device, choose_device
from tide_megatron.models.weights import read_architecture
from tide_megatron.train.models import check_layout, head_ranks, placed, under
from tide_megatron.train.placement import Placed, placement_table
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree, digest


def print_summary(recipe: Recipe, tree: Tree, world: int) -> None:
    """Print the recipe as YAML on stdout (plain when piped: it can be run again) and the rest on stderr.

    Args:
        recipe: validated.
        tree: its resolved values.
        world: ranks it is to run on.

    Raises:
        ConfigError: the batch or a layout does not fit the ranks; CheckpointError: a model folder is missing.
    """
    text = OmegaConf.to_yaml(tree)
    if rich.get_console().is_terminal:
        rich.print(Syntax(text, "yaml", background_color="default"))
    else:
        print(text, end="")
    samples, microbatches = recipe.batch.accumulation(world)
    models, ranks = place(recipe, world)
    console = Console(stderr=True)
    console.print(f"\ndigest {digest(tree)}, {world} rank(s)", highlight=False)
    split = f"{world} rank(s) x {microbatches} microbatch(es) x {samples}"
    console.print(f"{recipe.batch.samples} samples an update = {split}", highlight=False)
    console.print(_models(recipe, models, world))
    console.print()
    console.print(placement_table(models, world, ranks))


def place(recipe: Recipe, world: int) -> tuple[dict[str, Placed], int]:
    """Read what a recipe's models are, check their layouts, and say how many ranks share their heads.

    Raises:
        ConfigError: a layout or `head.ranks` does not fit; CheckpointError: a model folder is missing.
    """
    device, found = _device(recipe), {}
    for name, model in {"student": recipe.student, **recipe.teachers}.items():
        architecture = read_architecture(Path(model.folder))
        where = "student" if model is recipe.student else f"teachers.{name}"
        check_layout(model, architecture, world, where)
        with under(where):
            found[name] = placed(model, architecture, device)
    return found, head_ranks(recipe, world)


def _device(recipe: Recipe) -> Device:
    """Return the device that a run would take; one that is insisted on need not be here to plan for it."""
    if recipe.device == "cuda":
        return Device(type="cuda", index=0, backend="nccl", threads=1)
    return choose_device(recipe.device)


def _models(recipe: Recipe, models: Mapping[str, Placed], world: int) -> Table:
    """List the models with their layouts."""
    table = Table("model", "architecture", "context", "layout", box=None)
    for name, model in {"student": recipe.student, **recipe.teachers}.items():
        layout = model.layout
        cuts = [
            f"{axis} {getattr(layout, axis)}" for axis in ("tensor", "pipeline", "expert", "expert_tensor")
        ]
        cuts = [cut for cut in cuts if not cut.endswith(" 1")] or ["whole"]
        where = f"{', '.join(cuts)}; {layout.num_replicas(world)} replica(s)"
        context = f"{model.context.kind} {model.context.block_size}"
        table.add_row(name, models[name].architecture.model_type, context, where)
    return table
