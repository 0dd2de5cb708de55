"""What `tide train --dry-run` prints: the resolved recipe, its digest, and how it lands on the ranks."""

from __future__ import annotations

from pathlib import Path

import rich
from omegaconf import OmegaConf
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from tide_megatron.models.convert import read_architecture
from tide_megatron.train.assemble import check_layout
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
    table = Table("model", "architecture", "context", "layout", box=None)
    for name, model in {"student": recipe.student, **recipe.teachers}.items():
        architecture = read_architecture(Path(model.folder))
        layout = model.layout
        where = "student" if model is recipe.student else f"teachers.{name}"
        check_layout(model, architecture, world, where)
        cuts = [
            f"{axis} {getattr(layout, axis)}" for axis in ("tensor", "pipeline", "expert", "expert_tensor")
        ]
        cuts = [cut for cut in cuts if not cut.endswith(" 1")] or ["whole"]
        place = f"{', '.join(cuts)}; {layout.num_replicas(world)} replica(s)"
        table.add_row(
            name, architecture.model_type, f"{model.context.kind} {model.context.block_size}", place
        )
    console = Console(stderr=True)
    console.print(f"\ndigest {digest(tree)}, {world} rank(s)", highlight=False)
    split = f"{world} rank(s) x {microbatches} microbatch(es) x {samples}"
    console.print(f"{recipe.batch.samples} samples an update = {split}", highlight=False)
    console.print(table)
