"""A run that begins where another one stood, with the weights of its checkpoint and, if wanted, its moments.

It is a run of its own: clock, data order and schedules start at nothing, and the other run is only read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.files import damage
from tide_megatron.checkpoint.load import load_checkpoint
from tide_megatron.checkpoint.metadata import read_metadata
from tide_megatron.checkpoint.retention import chosen
from tide_megatron.parallel.collectives import (
    broadcast_object,
    fail_together,
    gather_objects,
    is_first,
    own_share,
)
from tide_megatron.train.recipe import Branch, Recipe
from tide_megatron.train.student import Student

log = logging.getLogger(__name__)

KEY = "branch"
"""Under which a run's checkpoints say where it began (`RunIdentity.contents`)."""


def branch_source(recipe: Recipe, branch: Branch) -> tuple[Path, str]:
    """Return the checkpoint that a run begins from, and what to remember of it. Not a collective.

    Raises:
        ConfigError: its optimizer state is not one that this run's optimizer reads.
        CheckpointError: there is none.
    """
    try:
        found = chosen(Path(branch.folder))
        metadata = read_metadata(found)
    except CheckpointError as fault:
        raise CheckpointError(f"branch.folder: {fault}") from None
    old = metadata.recipe.get("optimizer", {})
    for key in ("name", "distributed") if branch.optimizer else ():
        was, wanted = old.get(key), getattr(recipe.optimizer, key)
        if was != wanted:
            raise ConfigError(
                f"branch.optimizer: {found} was written with optimizer.{key}={was}, and {wanted} reads "
                f"another form; set optimizer.{key}={was}, or branch.optimizer=false to begin without moments"
            )
    return (
        found,
        f"step {metadata.clock.step} of recipe {metadata.recipe_digest} on data {metadata.data[:16]}",
    )


def begin_from(recipe: Recipe, branch: Branch, student: Student) -> str:
    """Load the weights of another run's checkpoint, and its moments if wanted. All ranks call it together.

    Returns:
        What to remember of it.

    Raises:
        TideError: on every rank: there is none, it is damaged, or of another model or optimizer.
    """
    with fail_together():
        source = branch_source(recipe, branch) if is_first() else None
    found, told = broadcast_object(source)
    faults = [fault for of_rank in gather_objects(damage(found, own_share())) for fault in of_rank]
    if faults:
        raise CheckpointError(
            f"branch.folder: {found} is not whole: {'; '.join(faults)}; choose another step-*"
        )
    groups = _hyperparameters(student.optimizer)
    try:
        load_checkpoint(found, student.model, student.optimizer if branch.optimizer else None)
    except CheckpointError as fault:
        words = str(fault).partition("; remove it")[0]
        raise CheckpointError(f"branch.folder: {words}; branch from a run of this student") from fault
    if branch.optimizer:
        _restore(student.optimizer, groups)
    else:
        student.optimizer.reload_model_params()
    log.info(
        "branched from %s (%s), %s the optimizer's moments; this run begins at step 0",
        found,
        told,
        "with" if branch.optimizer else "without",
    )
    return told


def _hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Return what the recipe says of each group of parameters, which a checkpoint would bring along."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]


def _restore(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
