"""Is it the same run? What a run folder or checkpoint says of its run, held against what wants to go on.

Recipes are compared in their mathematics. Paths are not part of it: what lay there is, so moved folders are
known again by their contents, which checkpoints remember since release 0.2; of an older one's models only the
path is known. `steps` may be raised: the run goes on, under schedules that reach over more steps.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.options import places, without_places
from tide_megatron.models.fingerprint import fingerprint
from tide_megatron.train.models import ModelPlan
from tide_megatron.train.optimizer import learning_rate
from tide_megatron.train.recipe import Recipe, StudentModel
from tide_megatron.train.resolve import Tree, difference, mathematics

log = logging.getLogger(__name__)

_ADVICE = "use another folder=, the old values, or --fresh to discard the old run"


def model_contents(plans: Mapping[str, ModelPlan]) -> dict[str, str]:
    """Return a digest of what lies in each model's folder, by the folder's key in the recipe.

    The weights of a student, and of whatever is drawn from the seed, do not count: a checkpoint has the
    former, the folder does not have the latter.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    contents = {}
    for plan in plans.values():
        has_weights = not isinstance(plan.choice, StudentModel) and plan.choice.initial == "folder"
        model = fingerprint(Path(plan.choice.folder), weights=has_weights)
        contents[f"{plan.key}.folder"] = f"{model} {plan.tokenizer.digest[:16]}"
    return contents


def other_mathematics(old: Tree, new: Tree) -> list[str]:
    """List the keys that make two resolved recipes different runs; paths and raised steps do not.

    Raises:
        KeyError, TypeError, AttributeError: the old one is no recipe.
    """
    left, right = (without_places(mathematics(tree), Recipe) for tree in (old, new))
    if left["steps"] < right["steps"]:
        del left["steps"], right["steps"]
    return difference(left, right)


def moved(old: Tree, new: Tree) -> dict[str, tuple[str | None, str | None]]:
    """Return the paths that differ between two recipes: key -> (old, new)."""
    left, right = places(old, Recipe), places(new, Recipe)
    return {
        key: (left.get(key), right.get(key))
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    }


def refuse_other(who: str, old: Tree, new: Tree, *, paths: bool) -> None:
    """Refuse to go on with the run of another recipe.

    Args:
        who: begins the message.
        old: what it was started with.
        new: what wants to go on.
        paths: refuse other paths, too: nothing tells what lay there.

    Raises:
        CheckpointError: with all keys that differ.
        KeyError, TypeError, AttributeError: the old one is no recipe.
    """
    lines, others = other_mathematics(old, new), moved(old, new)
    if lines or (paths and others):
        lines += [f"{key}: {was!r} -> {now!r}" for key, (was, now) in others.items()]
        listed = "\n  ".join(sorted(lines))
        raise CheckpointError(f"{who} another recipe:\n  {listed}\n{_ADVICE}")


def check_contents(who: str, old: Tree, new: Tree, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse model folders that were moved and hold something else; say so where one was changed in place.

    Args:
        who: begins messages.
        old: the recipe that it was started with.
        new: the recipe that wants to go on.
        was: `RunIdentity.contents` of then; empty in checkpoints of old releases.
        now: those of now.

    Raises:
        CheckpointError: naming the key and both paths.
    """
    others = moved(old, new)
    for key, value in sorted(now.items()):
        is_same = was.get(key) == value
        if key == "data.held_out":
            if key in was and not is_same:
                log.warning("%s: is other data than before; scores of before and after do not compare", key)
        elif key in others and not is_same:
            before, after = others[key]
            if key in was:
                reason = "holds another model or tokenizer"
            else:
                reason = (
                    "cannot be compared with it, for the checkpoint is of an older release, which did not "
                    f"note what lay there; put a link at {before}, go on, and the next checkpoint knows it"
                )
            raise CheckpointError(f"{who}: {key} was {before}, and {after} {reason}\n{_ADVICE}")
        elif key in others:
            log.info("%s was moved from %s; it holds the same", key, others[key][0])
        elif key in was and not is_same:
            log.warning("%s: holds another model or tokenizer than when the run was started", key)


def with_steps(clock: Clock, recipe: Recipe) -> Clock:
    """Return a checkpoint's clock for as many steps as the recipe has; say what raised steps change."""
    longer = dataclasses.replace(clock, total_steps=recipe.steps)
    if longer != clock:
        log.warning(
            "steps: raised from %d to %d; from step %d on the schedules are those of a run of %d steps: %s",
            clock.total_steps,
            longer.total_steps,
            clock.step,
            longer.total_steps,
            ", ".join(_jumps(recipe, clock, longer)) or "nothing depends on them",
        )
    return longer


def _jumps(recipe: Recipe, old: Clock, new: Clock) -> list[str]:
    """Say which values depend on the number of steps, as they were and as they will be."""
    pairs = {"learning rate": tuple(learning_rate(recipe.optimizer, clock) for clock in (old, new))}
    for name, loss in recipe.terms.items():
        was, now = loss.metrics(old), loss.metrics(new)
        pairs |= {f"losses.{name} {kind}": (was[kind], now[kind]) for kind in now}
    return [f"{name} {was:.3g} -> {now:.3g}" for name, (was, now) in pairs.items() if was != now]
