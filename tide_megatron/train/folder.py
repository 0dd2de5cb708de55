"""The run folder: whose it is, and what stands in it.

recipe.yaml     the resolved recipe
run.log         what the log and the console said, over all starts
metrics.jsonl   what was measured, one record a line
checkpoints/    step-* and `latest`
model/          the student in Hugging Face form, written at the end
starts.jsonl    every start and how it ended
replies/        what the student replied to tasks and prompts, a file each time it was asked
status.html     what the run does, for a browser; status.json for programs
preflight.json  what ranks compared and measured before the first step
last_step       how many updates were applied, to the moment
agreement.jsonl how far the student was from each teacher, one evaluation a line
result.json     held-out scores and costs, written at the end
stopped.json    instead of it: why and where the run was stopped; gone when it goes on
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.files import discard, write_text
from tide_megatron.base.lease import LEASE, Lease, leased
from tide_megatron.base.read import json_of, text_of
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.retention import listed
from tide_megatron.evaluate.model_folder import MODEL, RECIPE
from tide_megatron.models.hf.config import CONFIG_FILE
from tide_megatron.train.last_step import LAST_STEP
from tide_megatron.train.resolve import Tree
from tide_megatron.train.same_run import moved, refuse_other

CHECKPOINTS, RESULT, STOPPED, LOG = "checkpoints", "result.json", "stopped.json", "run.log"
STARTS, STATUS, PAGE = "starts.jsonl", "status.json", "status.html"
PREFLIGHT, REPLIES, AGREEMENT = "preflight.json", "replies", "agreement.jsonl"
_OURS = (
    *(CHECKPOINTS, MODEL, RESULT, STOPPED, "metrics.jsonl", "tensorboard", "wandb", LOG, LAST_STEP),
    *(STARTS, STATUS, PAGE, PREFLIGHT, REPLIES, AGREEMENT, RECIPE),
)
_OTHER = "choose another folder="


def check_folder(folder: Path, tree: Tree, *, resume: bool) -> None:
    """Refuse a folder this run may not use, before anything is read or written (only rank 0 calls it).

    Args:
        folder: the run folder; it need not exist.
        tree: the resolved recipe.
        resume: go on from what is there; False will discard what earlier runs of ours left in it.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        ConfigError: it cannot be made, or holds files of somebody else under our names.
    """
    with disk_faults(folder, ConfigError):
        there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"folder: {folder} cannot be used: {there} cannot be written to as a folder; {_OTHER}"
        )
    written = folder / RECIPE
    if written.is_file():
        if resume:
            _check_recipe(written, tree)
        return
    foreign = [name for name in _OURS if (folder / name).exists()]
    if foreign:
        raise ConfigError(
            f"folder: {folder} holds {', '.join(foreign)} but no {RECIPE}, so it is not a run's and would be "
            f"overwritten; {_OTHER}"
        )


@contextlib.contextmanager
def held_folder(folder: Path, tree: Tree, *, resume: bool, stop: StopFlag) -> Iterator[Lease]:
    """Check a run folder and keep every other run out of it while the block runs (only rank 0 enters it).

    A folder that was made for it goes again unless something was put there.

    Args:
        folder: the run folder.
        tree: the resolved recipe.
        resume: see `check_folder`.
        stop: ends a watch over a run that may be dead; it is raised when another start takes the folder over.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        ConfigError: another process trains there, or it cannot be used.
    """
    check_folder(folder, tree, resume=resume)
    with leased(folder / LEASE, f"folder: {folder}", ConfigError, stop=stop) as lease:
        lease.on_loss = stop.request
        check_folder(folder, tree, resume=resume)  # a run that held it until now may have changed it
        yield lease


def claim_folder(folder: Path, tree: Tree, *, resume: bool) -> None:
    """Make or take a checked run folder (only rank 0 calls it, once everything else is known to work).

    The recipe of a run that is gone on with stays until `write_recipe`.

    Args:
        folder: the run folder.
        tree: the resolved recipe.
        resume: go on from what is there; False discards what earlier runs of ours left in it.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    with disk_faults(folder, ConfigError, f", or {_OTHER}"):
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in _OURS:  # the recipe last: it marks the rest as ours
                discard(folder / name)
        discard(folder / STOPPED)
        if not (folder / RECIPE).is_file():
            write_recipe(folder, tree)


def write_recipe(folder: Path, tree: Tree) -> None:
    """Write the resolved recipe into a claimed folder (only rank 0 calls it).

    Raises:
        ConfigError: the disk refuses.
    """
    with disk_faults(folder, ConfigError, f", or {_OTHER}"):
        write_text(folder / RECIPE, yaml.safe_dump(tree, sort_keys=False))


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json in one rename (only rank 0 calls it)."""
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def write_stopped(folder: Path, clock: Mapping[str, int], reason: str) -> None:
    """Write stopped.json in one rename, once the run is saved (only rank 0 calls it).

    torchrun takes every exit code but 0 for a failure, so under it this file alone tells a run that was
    stopped from one that has finished.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_text(folder / STOPPED, json.dumps({"reason": reason, "at": now, "clock": clock}, indent=1) + "\n")


def _check_recipe(written: Path, tree: Tree) -> None:
    """Compare the recipe a folder was claimed for with the one that asks for it now."""
    folder = written.parent
    try:
        old = yaml.safe_load(text_of(written))
        # A checkpoint remembers what lay at the old paths; without one nothing does, and nothing is lost.
        refuse_other(f"folder: {folder} holds the run of", old, tree, paths=not listed(folder / CHECKPOINTS))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"folder: {folder} holds the run of another recipe:\n  {RECIPE} cannot be read as one\n"
            "use another folder=, or --fresh to discard the old run"
        ) from None


def finished_result(folder: Path, tree: Tree) -> dict[str, Any] | None:
    """Return the result of a run that has nothing left to do, None of any other.

    Args:
        folder: the run folder; that its run is this one's is known.
        tree: the resolved recipe.
    """
    try:
        result = json_of(folder / RESULT)
        is_over = result["finished"] and result["clock"]["step"] >= tree["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(result) if is_over and (folder / MODEL / CONFIG_FILE).is_file() else None


def has_same_paths(folder: Path, tree: Tree) -> bool:
    """Say whether a run folder's recipe names the same folders; of another run's recipe False, too."""
    try:
        return not moved(yaml.safe_load(text_of(folder / RECIPE)), tree)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError):
        return False
