"""Before the first step: what all ranks must have alike is compared, and what they share is measured.

In two parts, for a run that cannot work should end before it reads weights. `compare_ranks` is first: code,
recipe, versions, data and model folders, the run folder, free disk, clocks. `measure_ranks` comes when models
and groups stand: that equal parts hold equal weights, and how fast every kind of group is. What would spoil
the run is a `ConfigError` on every rank, with all that differs and on which hosts; what is only odd is a
warning. Left out: a bad GPU or core (the run's page tells ranks by their phase times), quotas of a disk.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.base.lease import LEASE
from tide_megatron.base.read import json_of
from tide_megatron.base.stop import StopFlag
from tide_megatron.models.build import TideModel
from tide_megatron.models.fingerprint import sampled_weights
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.precision import Precision
from tide_megatron.models.shard import Shard
from tide_megatron.models.weights import read_architecture
from tide_megatron.parallel.collectives import (
    broadcast_object,
    fail_together,
    gather_objects,
    held_by_first,
    is_first,
)
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.link_speed import (
    GroupTimes,
    clock_offsets,
    group_kinds,
    time_groups,
    time_neighbours,
)
from tide_megatron.train.folder import held_folder
from tide_megatron.train.models import head_ranks
from tide_megatron.train.preflight_report import Comparison, Preflight, as_json, told
from tide_megatron.train.rank_differences import (
    HeldPart,
    clock_lines,
    content_differences,
    disk_lines,
    first_of_machines,
    named,
    noted,
    parts_of,
    recipe_difference,
    shard_differences,
    slow_lines,
    version_differences,
)
from tide_megatron.train.rank_facts import UNREADABLE, RankFacts, comparable, contents, facts_here
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree
from tide_megatron.train.sanity import check_student, check_teachers
from tide_megatron.train.setup import Setup, set_up

log = logging.getLogger(__name__)

_HEAD = "output_layer."
_SEEN_SECONDS, _LOOK_SECONDS = 5.0, 0.1
"""How long a host may take to see a file that another one wrote, and how often it looks."""


def compare_ranks(recipe: Recipe, tree: Tree, device: Device, *, resume: bool) -> Comparison:
    """Compare what all ranks must have alike. All ranks call it, while rank 0 holds the run folder.

    Args:
        recipe: validated.
        tree: its resolved values.
        device: where this rank computes.
        resume: whether the start goes on from the run folder.

    Raises:
        ConfigError: on every rank alike, with everything that differs.
    """
    begun = time.monotonic()
    with fail_together():
        own = facts_here(recipe, tree, device, resume=resume)
    facts = gather_objects(own)
    if len({one.recipe for one in facts}) > 1:
        trees = gather_objects(comparable(tree, resume=resume))
        refuse([recipe_difference(facts, trees)])  # nothing else means anything then
    refuse([*version_differences(facts), *_blind_ranks(recipe, facts)])
    found, files = contents(recipe, facts)
    needed = checkpoint_bytes(recipe, device)
    lacking, scarce = disk_lines(recipe.folder, facts, needed)
    refuse([*content_differences(facts, found, files), *lacking])
    clocks = clock_offsets(first_of_machines(facts)[1:])
    warnings = [*noted(facts), *scarce, *clock_lines(facts, clocks, recipe.preflight.clock_seconds)]
    _warn(warnings)
    return Comparison(
        facts=facts,
        contents={key: value for key, value in found[0].items() if not value.startswith(UNREADABLE)},
        checkpoint_bytes=needed,
        clocks=clocks,
        warnings=warnings,
        seconds=time.monotonic() - begun,
    )


def measure_ranks(recipe: Recipe, setup: Setup, device: Device, comparison: Comparison) -> Preflight:
    """Compare the weights that ranks hold, and measure their groups. All ranks call it before the first step.

    Raises:
        ConfigError: on every rank alike: the same part of a model holds different weights on two ranks.
    """
    begun, facts, options = time.monotonic(), comparison.facts, recipe.preflight
    models = {"student": setup.run.student.model}
    models |= {f"teachers.{name}": teacher.model for name, teacher in setup.run.teachers.items()}
    held = gather_objects({key: _held(one) for key, one in models.items()})
    refuse(list(shard_differences(facts, held)))
    world = len(facts)
    groups: Sequence[GroupTimes] = ()
    neighbours: Sequence[float] = ()
    if options.links and world > 1:
        layouts = {name: model.layout for name, model in recipe.teachers.items()}
        kinds = group_kinds(recipe.student.layout, layouts, head_ranks(recipe, world), world)
        groups = time_groups(kinds, device)
        neighbours = time_neighbours(device) if world > 2 else ()
    is_judged = device.type == "cuda" or len({one.machine for one in facts}) > 1
    slow = list(slow_lines(facts, groups, neighbours, options.slow)) if is_judged else []
    _warn(slow)
    found = Preflight(
        comparison=comparison,
        shards={key: parts_of({rank: one[key].part for rank, one in enumerate(held)}) for key in models},
        groups=groups,
        neighbours=neighbours,
        warnings=[*comparison.warnings, *slow],
        seconds=comparison.seconds + time.monotonic() - begun,
    )
    if is_first():
        log.info("%s", told(found))
    return found


def check_only(recipe: Recipe, tree: Tree, resume: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Do what `train` does before it takes the run folder, but resuming, and leave it as it was.

    A rank function; all ranks call it. Arguments and errors are those of `train`.

    Returns:
        What preflight.json would hold.
    """
    folder = Path(recipe.folder)
    with stop.ending(), held_by_first(lambda: held_folder(folder, tree, resume=resume, stop=stop)):
        compared = compare_ranks(recipe, tree, device, resume=resume)
        setup = set_up(recipe, device)
        check_student(recipe, setup)
        check_teachers(recipe, setup)
        preflight = measure_ranks(recipe, setup, device, compared)
    return as_json(preflight)


def refuse(lines: Sequence[str]) -> None:
    """Raise what differs between ranks, if anything does; every rank has the same lines.

    Raises:
        ConfigError: with all of it.
    """
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError(
            f"{len(lines)} faults before the first step:\n" + "\n".join(f"- {line}" for line in lines)
        )


def _held(model: TideModel) -> HeldPart:
    """Say which part of a model this rank holds, and digest it; the rows of a head are cut differently."""
    body: list[Tensor] = []
    head: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (head if name.startswith(_HEAD) else body).append(parameter)
    return HeldPart(
        part=str(dataclasses.replace(model.shard, head=None)),
        digest=sampled_weights(body),
        head=str(model.shard.head),
        head_digest=sampled_weights(head),
    )


def _warn(lines: Sequence[str]) -> None:
    for line in lines if is_first() else ():
        log.warning("%s", line)


def checkpoint_bytes(recipe: Recipe, device: Device) -> int | None:
    """Predict the bytes of one checkpoint: weights, and fp32 masters and moments of AdamW. Not a collective.

    Returns:
        None where config.json cannot be read, which is told by who needs it.
    """
    try:
        architecture = read_architecture(Path(recipe.student.folder))
        dtype = Precision.on(recipe.student.precision, device).dtype
    except TideError:
        return None
    whole = Shard.of(Layout(), 0, 1, architecture.layers)
    weights = num_local_bytes(architecture, whole, dtype)
    state = 12 if recipe.optimizer.name == "adamw" else 4 * (dtype.itemsize < 4)
    return weights + weights // dtype.itemsize * state


def _blind_ranks(recipe: Recipe, facts: Sequence[RankFacts]) -> list[str]:
    """Say which ranks do not see the lease that rank 0 holds on the run folder. All ranks call it."""
    lease = Path(recipe.folder) / LEASE
    token = broadcast_object(_token(lease))
    until = time.monotonic() + _SEEN_SECONDS
    while not (is_seen := _token(lease) == token) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    blind = [rank for rank, sees in enumerate(gather_objects(is_seen)) if not sees]
    if not blind:
        return []
    return [
        f"folder: {recipe.folder}: {named(blind, facts)} do not see there what {named([0], facts)} wrote; "
        "every rank writes its part of a checkpoint into it, so choose a folder= that all hosts share"
    ]


def _token(lease: Path) -> str | None:
    """Return what names a lease, however old it looks by this host's clock; None: none is seen."""
    try:
        return str(json_of(lease)["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
