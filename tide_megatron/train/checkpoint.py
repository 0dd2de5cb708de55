"""Checkpoints of a run: written beside, made durable, then renamed; read back bit for bit.

Weights and optimizer state go through megatron-core's `dist_checkpointing` (torch_dist, fully reshardable),
everything else (clock, recipe, versions) through one `state.json` of plain values in the same folder. A
folder appears under its final name only when it is whole, and `latest` moves only after that, so a kill at
any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tide_megatron.platform  # noqa: F401 - before megatron

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.parallel.collectives import fail_together, is_first
from tide_megatron.train.resolve import Tree, difference, digest, mathematics
from tide_megatron.train.student import Student

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The one optimizer format both supported megatron-core lines can save, load and reshard."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a checkpoint belongs to."""

    recipe: Tree
    """The resolved recipe."""
    data: str
    """Digest of the training data's manifest."""


def save_checkpoint(folder: Path, student: Student, clock: Clock, origin: Origin, keep: int) -> Path:
    """Write `folder/step-N`, then point `latest` at it. All ranks call it together.

    Args:
        folder: the run's checkpoint folder.
        student: model and optimizer.
        clock: where the run stands.
        origin: recipe and data.
        keep: how many of the newest checkpoints stay.

    Returns:
        The finished checkpoint's folder.

    Raises:
        CheckpointError: on every rank, when the disk refuses; older checkpoints stay as they are.
    """
    final = folder / f"step-{clock.step:08d}-{clock.consumed:012d}"
    partial = folder / f"{final.name}.partial"
    with fail_together(), _disk(partial):
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with _disk(partial):
        state = _state(student, is_loading=False)
        dist_checkpointing.save(state, str(partial), content_metadata=dict(SHARDING))
    with fail_together(), _disk(partial):
        if is_first():
            _finish(partial, final, clock, origin)
            for old in sorted(folder.glob("step-*[0-9]"))[:-keep]:
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
    return final


def _finish(partial: Path, final: Path, clock: Clock, origin: Origin) -> None:
    """Complete a checkpoint on rank 0: facts, durability, name, `latest`."""
    facts = {
        "clock": dataclasses.asdict(clock),
        "recipe": origin.recipe,
        "data": origin.data,
        "megatron_core": version("megatron-core"),
    }
    (partial / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    _make_durable(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _point_latest(final.parent, final.name)


@contextlib.contextmanager
def _disk(partial: Path) -> Iterator[None]:
    """Say in one line that writing failed, whatever a library raised."""
    try:
        yield
    except (Exception, CheckpointException) as fault:
        raise CheckpointError(
            f"{partial}: cannot be written ({_last_line(fault)}); make room or choose another folder=, then "
            "start again: the run goes on from its last whole checkpoint"
        ) from fault


def find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint `latest` points at, or None when the run has none yet.

    Raises:
        CheckpointError: when `latest` names a folder that is not there or not whole.
    """
    latest = folder / "latest"
    if not latest.exists():
        return None
    found = folder / latest.read_text(encoding="utf-8").strip()
    for name in ("state.json", "metadata.json"):
        if not (found / name).is_file():
            raise CheckpointError(
                f"{latest} names {found.name}, but {found / name} is missing; write the name of a whole "
                f"checkpoint into {latest}, or start a new run folder"
            )
    return found


def read_facts(found: Path, origin: Origin) -> Clock:
    """Return the clock of a checkpoint after checking that it belongs to this recipe.

    Args:
        found: a checkpoint folder.
        origin: recipe and data that want to go on from it.

    Raises:
        CheckpointError: another recipe (all differing keys are named) or other data, or a newer megatron-core
            wrote it.
    """
    try:
        facts = json.loads((found / "state.json").read_text(encoding="utf-8"))
        clock, old, wrote = Clock(**facts["clock"]), facts["recipe"], str(facts["megatron_core"])
        data, is_same = facts["data"], digest(old) == digest(origin.recipe)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            f"{found / 'state.json'}: not readable ({fault}); choose another checkpoint"
        ) from None
    if not is_same:
        changed = "\n  ".join(difference(mathematics(old), mathematics(origin.recipe)))
        raise CheckpointError(
            f"{found} belongs to another recipe:\n  {changed}\n"
            "use another folder=, the old values, or --fresh to discard the old run"
        )
    if data != origin.data:
        where = origin.recipe["data"]["train"]
        raise CheckpointError(
            f"{found}: data.train {where} was prepared anew since, so the position in it means "
            "nothing; use the old data, or another folder= or --fresh to start over"
        )
    here = version("megatron-core")
    if _line(wrote) > _line(here):
        raise CheckpointError(
            f"{found} was written by megatron-core {wrote}; {here} cannot read it: install {wrote} or newer"
        )
    return clock


def load_checkpoint(found: Path, student: Student) -> None:
    """Load weights and optimizer state into a freshly built student. All ranks call it together.

    Raises:
        CheckpointError: when shards are missing, truncated or shaped for another model.
    """
    try:
        loaded = dist_checkpointing.load(_state(student, is_loading=True), str(found))
        student.model.load_state_dict(loaded["model"])
        student.optimizer.load_state_dict(loaded["optimizer"])
    except (Exception, CheckpointException) as fault:
        # Whatever the libraries raise means: these bytes do not fit. torch's class is no Exception.
        raise CheckpointError(
            f"{found}: cannot be loaded ({_last_line(fault)}); it is damaged or of another "
            f"model; point {found.parent / 'latest'} at an older checkpoint"
        ) from fault


def _state(student: Student, *, is_loading: bool) -> dict[str, Any]:
    """Return the sharded state of model and optimizer; the same metadata serves saving and loading."""
    metadata = {**SHARDING, "dp_cp_group": student.groups.dp_cp}
    weights = student.model.sharded_state_dict(metadata=metadata)
    optimizer = student.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": optimizer}


def _last_line(fault: BaseException) -> str:
    """Return the last words of a library's complaint, which may hold whole tracebacks of other ranks."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[-1]}" if lines else type(fault).__name__


def _line(name: str) -> tuple[int, ...]:
    """Return (major, minor) of a version string."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in name.split(".")[:2])


def _point_latest(folder: Path, name: str) -> None:
    """Replace `latest` in one rename."""
    partial = folder / "latest.partial"
    partial.write_text(name + "\n", encoding="utf-8")
    _sync(partial)
    partial.rename(folder / "latest")
    _sync(folder)


def _make_durable(folder: Path) -> None:
    """Flush every file of a folder, and the folder itself, to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
