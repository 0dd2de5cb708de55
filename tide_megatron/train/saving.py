"""Where training meets checkpoints: what a run's belong to, going on from one, and who saves.

The format is `tide_megatron.checkpoint`'s, which knows no recipes; this file compares them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.lease import Lease
from tide_megatron.checkpoint.load import load_checkpoint
from tide_megatron.checkpoint.metadata import RunIdentity, read_metadata
from tide_megatron.checkpoint.retention import add_score, find_checkpoint, name_of, remove_expired
from tide_megatron.checkpoint.save import Saver
from tide_megatron.parallel.collectives import broadcast_object, fail_together, is_first, sum_over
from tide_megatron.train.branch import KEY, begin_from
from tide_megatron.train.folder import CHECKPOINTS
from tide_megatron.train.guard import Guard
from tide_megatron.train.last_step import lost_steps
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree, digest
from tide_megatron.train.same_run import check_contents, refuse_other, with_steps
from tide_megatron.train.setup import Setup
from tide_megatron.train.student import Student

log = logging.getLogger(__name__)


def identity_of(tree: Tree, setup: Setup) -> RunIdentity:
    """Say what this run's checkpoints belong to."""
    return RunIdentity(
        recipe=tree,
        recipe_digest=digest(tree),
        data=setup.loader.columns.digest,
        contents=setup.contents,
    )


def make_saver(recipe: Recipe, tree: Tree, setup: Setup, lease: Lease | None = None) -> Saver:
    """Build what saves this run, as long as its folder's lease (rank 0) is held."""
    student = setup.run.student
    return Saver(
        Path(recipe.folder) / CHECKPOINTS,
        student.model,
        student.optimizer,
        identity_of(tree, setup),
        recipe.checkpoints,
        lease,
    )


def start_or_resume(recipe: Recipe, tree: Tree, setup: Setup, *, resume: bool = True) -> Clock:
    """Return the newest whole checkpoint's clock, with the student loaded, or a fresh one. Collective.

    Args:
        recipe: the run.
        tree: its resolved values.
        setup: its parts.
        resume: False: what is in the run folder is not looked at.

    Raises:
        CheckpointError: on every rank, when there are checkpoints and none is whole, or it is another run's.
    """
    found = find_checkpoint(Path(recipe.folder) / CHECKPOINTS) if resume else None
    with fail_together():
        clock = checked_clock(found, identity_of(tree, setup)) if found else Clock(total_steps=recipe.steps)
    if not found and recipe.branch is not None:
        setup.contents[KEY] = begin_from(recipe, recipe.branch, setup.run.student)
    if found:
        old = read_metadata(found)
        setup.spent.update(old.spent)
        if KEY in old.contents:
            setup.contents[KEY] = old.contents[KEY]
        load_checkpoint(found, setup.run.student.model, setup.run.student.optimizer)
        clock = with_steps(clock, recipe)
        lost = lost_steps(Path(recipe.folder), clock)
        told = "" if lost is None else f" lost {lost or 'no'} step{'s' * (lost != 1)},"
        log.info(
            "resumed from step %d,%s %d samples consumed (%s)", clock.step, told, clock.consumed, found.name
        )
        if lost and recipe.checkpoints.every and lost > recipe.checkpoints.every:
            log.info(
                "more than the %d between two saves: the next was not whole yet, which may cost %d, or is "
                "damaged",
                recipe.checkpoints.every,
                recipe.checkpoints.most_ahead,
            )
    return clock


def checked_clock(found: Path, run: RunIdentity) -> Clock:
    """Return the clock of a checkpoint after checking that it belongs to this recipe.

    Args:
        found: a checkpoint folder.
        run: recipe and data that want to go on from it.

    Raises:
        CheckpointError: another recipe (all differing keys are named) or other data, or a newer megatron-core
            wrote it.
    """
    old = read_metadata(found)
    try:
        refuse_other(f"{found} belongs to", old.recipe, run.recipe, paths=False)
        check_contents(str(found), old.recipe, run.recipe, old.contents, run.contents)
    except (KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(f"{found}: its recipe is not readable ({fault}); remove it") from None
    if old.data != run.data:
        where = run.recipe["data"]["train"]
        what = f"data.train {where}" if where else "a source of data.blend, or its share,"
        raise CheckpointError(
            f"{found}: {what} was prepared anew since, so the position in it means "
            "nothing; use the old data, or another folder= or --fresh to start over"
        )
    was, wanted = (recipe["optimizer"]["distributed"] for recipe in (old.recipe, run.recipe))
    if was != wanted:  # no mathematics, but megatron-core keeps the two kinds of state in two forms
        raise CheckpointError(
            f"{found} was written with optimizer.distributed={was}, another form than {wanted} reads; "
            f"go on with optimizer.distributed={was}"
        )
    return old.clock


def go_back(recipe: Recipe, guard: Guard, clock: Clock, student: Student) -> Clock:
    """Take up the newest whole checkpoint from before what the guard saw. All ranks call it together.

    Args:
        recipe: the run; no save of it is under way.
        guard: says from when on updates were bad.
        clock: where the run stands.
        student: what is loaded into.

    Raises:
        TideError: on every rank, when there is none, or the run went back often enough.
    """
    found = None
    if guard.returns < guard.options.returns:
        found = find_checkpoint(Path(recipe.folder) / CHECKPOINTS, guard.last_good_step(clock))
    if found is None:
        raise guard.farewell(clock)
    old = read_metadata(found).clock
    load_checkpoint(found, student.model, student.optimizer)
    return guard.returned(clock, old)


def note_score(recipe: Recipe, clock: Clock, values: Mapping[str, float]) -> bool:
    """Note scores if the best checkpoint is kept by one of them; say whether it is the best so far.

    All ranks call it together, with the same scores.

    Args:
        recipe: the run.
        clock: of the evaluation.
        values: held out, and of tasks; none: nothing was scored.
    """
    by = recipe.checkpoints.keep_best
    if by not in values:
        return False
    folder, is_best = Path(recipe.folder) / CHECKPOINTS, False
    with fail_together():
        if is_first():
            is_best = add_score(folder, clock, values, by)
            if (folder / name_of(clock)).is_dir():  # the last one was saved before it was scored
                remove_expired(folder, recipe.checkpoints)
    return broadcast_object(is_best)


class Costs:
    """What a run costs, over all of its starts: `seconds`, `cpu_seconds` (of all ranks) and `starts`.

    What an earlier start did after its last checkpoint is not in it, as it is not in the run.
    """

    def __init__(self, earlier: Mapping[str, float]) -> None:
        """Begin to count, on top of what earlier starts have cost."""
        self._earlier = dict(earlier)
        self._started, self._cpu = time.monotonic(), time.process_time()

    def own(self) -> dict[str, float]:
        """Return seconds and processor seconds of this start. All ranks call it."""
        cpu_seconds = torch.tensor(time.process_time() - self._cpu, dtype=torch.float64)
        return {"seconds": time.monotonic() - self._started, "cpu_seconds": float(sum_over(cpu_seconds))}

    def total(self) -> dict[str, float]:
        """Return those of all starts. All ranks call it."""
        parts = {**self.own(), "starts": 1}
        return {name: value + self._earlier.get(name, 0.0) for name, value in parts.items()}
