"""What `tide train --dry-run` prints: the resolved recipe, how it lands on the ranks, and all its faults."""

from __future__ import annotations

import contextlib
from pathlib import Path

import rich
from omegaconf import OmegaConf
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from tide_megatron.base.device import Device, choose_device
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.checkpoint.metadata import RunIdentity
from tide_megatron.checkpoint.retention import listed
from tide_megatron.data.blend import BlendedData
from tide_megatron.data.dataset import PreparedData
from tide_megatron.train.branch import branch_source
from tide_megatron.train.folder import CHECKPOINTS, check_folder, finished_result
from tide_megatron.train.models import computed, placed
from tide_megatron.train.placement import placement_table
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree, digest
from tide_megatron.train.same_run import model_contents, with_steps
from tide_megatron.train.saving import checked_clock
from tide_megatron.train.setup import Examination, examine


def print_summary(recipe: Recipe, tree: Tree, world: int, *, resume: bool = True) -> None:
    """Print the recipe as YAML on stdout (plain when piped: it can be run again) and the rest on stderr.

    Everything that a start would look at before it reads weights is looked at, and their headers.

    Args:
        recipe: validated.
        tree: its resolved values.
        world: ranks it is to run on.
        resume: go on from what stands in the run folder.

    Raises:
        TideError: with every fault that was found, after what could be said was printed.
    """
    text = OmegaConf.to_yaml(tree)
    if rich.get_console().is_terminal:
        rich.print(Syntax(text, "yaml", background_color="default"))
    else:
        print(text, end="")
    device = _device(recipe)
    found = examine(recipe, device, (0, world), headers=True)
    console = Console(stderr=True, soft_wrap=True)
    if not console.is_terminal:  # a pipe has no edge that rows would have to be folded at
        console = Console(stderr=True, soft_wrap=True, width=10_000)
    console.print(f"\ndigest {digest(tree)}, {world} rank(s)", highlight=False)
    with contextlib.suppress(ConfigError):  # it is among the faults
        samples, microbatches = recipe.batch.accumulation(world)
        split = f"{world} rank(s) x {microbatches} microbatch(es) x {samples}"
        if recipe.batch.tokens is not None:
            split = f"{world} rank(s) x microbatches of at most {recipe.batch.tokens} positions"
        console.print(f"{recipe.batch.samples} samples an update = {split}", highlight=False)
    if "train" in found.data:
        console.print(_reach(recipe, found.data["train"].columns), highlight=False)
    console.print(_models(recipe, found, device, world))
    console.print()
    if len(found.plans) > len(recipe.teachers):
        with contextlib.suppress(TideError):  # a layout that cannot be is among the faults
            picture = {
                name: placed(plan.choice, plan.architecture, device) for name, plan in found.plans.items()
            }
            console.print(placement_table(picture, world, found.ranks))
    with found.noting():
        console.print(_standing(recipe, tree, found, resume=resume), highlight=False)
    found.refuse_faults()
    console.print("no fault was found; weights and what teachers know are looked at when the run starts")


def _reach(recipe: Recipe, columns: PreparedData | BlendedData) -> str:
    """Say how often a run reads its data."""
    read, samples = recipe.steps * recipe.batch.samples, len(columns)
    if not isinstance(columns, BlendedData):
        return f"{recipe.steps} steps read {read} samples: {read / samples:.3g} epochs of {samples}"
    given, epochs = columns.given(read), columns.epochs(read)
    lines = [
        f"  {name}: {given[name]} ({given[name] / read:.1%}), {epochs[name]:.3g} epochs of {len(member)}"
        for name, member in columns.members.items()
    ]
    return "\n".join([f"{recipe.steps} steps read {read} samples of a blend:", *lines])


def _standing(recipe: Recipe, tree: Tree, found: Examination, *, resume: bool) -> str:
    """Say what a start would do with the run folder.

    Raises:
        TideError: refuse it.
    """
    folder = Path(recipe.folder)
    check_folder(folder, tree, resume=resume)
    checkpoints = listed(folder / CHECKPOINTS)
    if (not checkpoints or not resume) and recipe.branch is not None:
        source, told = branch_source(recipe, recipe.branch)
        return f"{folder}: the run branches from {source} ({told})"
    if not checkpoints or not resume:
        return f"{folder}: " + ("the run starts" if resume else "the run starts anew; what is there goes")
    if found.faults:
        return f"{folder}: {len(checkpoints)} checkpoint(s), not compared because of the faults"
    contents = model_contents(found.plans)
    if "held_out" in found.data:
        contents["data.held_out"] = found.data["held_out"].columns.digest
    data = found.data["train"].columns.digest
    run = RunIdentity(recipe=tree, recipe_digest=digest(tree), data=data, contents=contents)
    clock = with_steps(checked_clock(checkpoints[-1], run), recipe)
    if finished_result(folder, tree) is not None:
        return f"{folder}: already finished at step {clock.step}"
    return f"{folder}: the run goes on from step {clock.step} of {recipe.steps} ({checkpoints[-1].name})"


def _device(recipe: Recipe) -> Device:
    """Return the device that a run would take; one that is insisted on need not be here to plan for it."""
    if recipe.device == "cuda":
        return Device(type="cuda", index=0, backend="nccl", threads=1)
    return choose_device(recipe.device)


def _models(recipe: Recipe, found: Examination, device: Device, world: int) -> Table:
    """List the models: what each is, how it is computed, and how it is cut."""
    table = Table("model", "architecture", "context", "computed in", "layout", box=None)
    for name, model in {"student": recipe.student, **recipe.teachers}.items():
        layout = model.layout
        cuts = [
            f"{axis} {getattr(layout, axis)}" for axis in ("tensor", "pipeline", "expert", "expert_tensor")
        ]
        cuts = [cut for cut in cuts if not cut.endswith(" 1")] or ["whole"]
        replicas = layout.num_replicas(world)
        where = f"{', '.join(cuts)}; {replicas} replica(s)"
        context = f"{model.context.kind} {model.context.block_size}"
        kind = found.plans[name].architecture.model_type if name in found.plans else "?"
        numbers = "?"
        with contextlib.suppress(ConfigError):  # it is among the faults
            numbers = computed(model, device)
        table.add_row(name, kind, context, numbers, where)
    return table
