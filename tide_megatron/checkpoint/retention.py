"""What stands in a run's checkpoint folder: which checkpoints stay, and which one a run goes on from.

A checkpoint is called `step-STEP-SAMPLES`; what is being written, or taken away, `*.partial`; what was found
damaged `*.damaged`. A run goes on from the newest that is whole, byte for byte. What is damaged is said, set
aside, and never used; that nothing is whole is an error, not a fresh start. `latest` is for people and tools:
where it is missing or points at something else, the newest whole checkpoint wins, because a kill may fall
between the rename of a checkpoint and the move of `latest`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import DIGESTS, PARTIAL, damage, read_digests, remove_folder, write_text
from tide_megatron.base.options import Off
from tide_megatron.base.read import json_of
from tide_megatron.checkpoint.metadata import STATE
from tide_megatron.parallel.collectives import (
    broadcast_object,
    fail_together,
    gather_objects,
    is_first,
    own_share,
)

LATEST, BEST, DAMAGED = "latest", "best", ".damaged"
SCORES = "scores.json"
"""Name of a checkpoint -> its scores, of all that were evaluated."""
TASK_SCORE = "tasks/"
"""Stands before the name of a task among them."""
SCORE_WORDS = ("off", "nll_per_byte", "masked_accuracy", rf"{TASK_SCORE}[\w.-]+")
"""What `keep_best` may be."""
_NAME = re.compile(r"step-(\d{8,})-(\d{12,})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Checkpoints:
    """When to save, how, and which checkpoints stay (machine choice)."""

    every: int = Field(default=0, ge=0)
    """Updates between saves; 0: only at the end and when the run is stopped."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints whose step is a multiple of it stay for good; 0: none."""
    keep_best: Annotated[str, Field(pattern=f"^({'|'.join(SCORE_WORDS)})$"), Off] = "off"
    """Also keep the checkpoint with the best score so far, which `checkpoints/best` names: `nll_per_byte` or
    `masked_accuracy`, held out, or `tasks/NAME`, of a task. One is written after an evaluation that found a
    better score (`evaluation.every`, `evaluation.task_every`)."""
    asynchronous: bool = True
    """Write while training goes on, over a copy in main memory as large as the rank's share of weights and
    optimizer; False: training waits for the disk, and nothing is copied."""

    @property
    def most_ahead(self) -> int:
        """Updates that training applies while a save is under way, at most: then it waits for it.

        So a kill costs one interval and these, not two intervals.
        """
        return max(0, min(self.every - 1, max(1, self.every // 4)))


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Mark:
    """Where a checkpoint stands, as its name says."""

    consumed: int
    """Samples read."""
    step: int
    """Updates applied."""

    @staticmethod
    def of(path: Path) -> Mark:
        """Read a checkpoint's name, also one that was set aside."""
        found = _NAME.match(path.name)
        assert found, f"{path} is not called step-STEP-SAMPLES"
        return Mark(step=int(found[1]), consumed=int(found[2]))


def name_of(clock: Clock) -> str:
    """Return the name of the checkpoint that stands at a clock."""
    return f"step-{clock.step:08d}-{clock.consumed:012d}"


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names, oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=Mark.of)


def chosen(path: Path) -> Path:
    """Return the checkpoint that a user means by its folder, its run's, or that of its run's checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE).is_file() or (path / DIGESTS).is_file() or path.name.startswith("step-"):
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint; check the path")
        return path
    found = listed(path / "checkpoints") or listed(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint there; give a run folder or a step-* folder in it")
    return found[-1]


def point_latest(folder: Path, name: str) -> None:
    """Let `latest` name a checkpoint."""
    write_text(folder / LATEST, name + "\n")


def expired(checkpoints: Sequence[Path], keep: int, keep_every: int) -> list[Path]:
    """Return the checkpoints that may go.

    Args:
        checkpoints: all of them, oldest first.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay for good; 0: none.
    """
    old = checkpoints[: max(0, len(checkpoints) - keep)]
    return [path for path in old if not keep_every or Mark.of(path).step % keep_every]


def remove_expired(folder: Path, options: Checkpoints) -> None:
    """Remove the checkpoints of a folder that may go (rank 0)."""
    there = listed(folder)
    best = best_of(folder, options.keep_best, [path.name for path in there])
    for old in expired(there, options.keep, options.keep_every):
        if old.name != best:
            remove_folder(old)
    if best is not None:
        write_text(folder / BEST, best + "\n")


def add_score(folder: Path, clock: Clock, scores: Mapping[str, float], by: str) -> bool:
    """Note the scores of the moment at a clock (rank 0); say whether they are the best so far.

    Args:
        folder: the run's checkpoint folder.
        clock: of the evaluation.
        scores: held out, or of tasks.
        by: name of the one that counts.
    """
    name = name_of(clock)
    known = {key: value for key, value in _scores(folder).items() if Mark.of(Path(key)) < Mark.of(Path(name))}
    folder.mkdir(exist_ok=True)
    write_text(folder / SCORES, json.dumps(known | {name: dict(scores)}, indent=1) + "\n")
    return best_of(folder, by) == name


def best_of(folder: Path, by: str, among: Sequence[str] | None = None) -> str | None:
    """Return the name of the checkpoint with the best score, the later of equals; None: none has one.

    Args:
        folder: the run's checkpoint folder.
        by: name of the score.
        among: names that count; None: those of all evaluations, also where nothing was saved.
    """
    sign = -1.0 if by == "nll_per_byte" else 1.0
    ranked = [
        (sign * scores[by], Mark.of(Path(name)), name)
        for name, scores in _scores(folder).items()
        if by in scores and (among is None or name in among)
    ]
    return max(ranked)[2] if ranked else None


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    """Read what `add_score` wrote; a file that is damaged is told and counts for nothing."""
    path = folder / SCORES
    try:
        noted = json_of(path)
        return {
            name: {key: float(value) for key, value in scores.items() if math.isfinite(value)}
            for name, scores in noted.items()
            if _NAME.fullmatch(name)
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        log.warning("%s cannot be read (%s): earlier scores are forgotten", path, fault)
        return {}


def find_checkpoint(folder: Path, last_step: int | None = None) -> Path | None:
    """Return the newest whole checkpoint, or None where the run has none yet. Collective.

    Leftovers of killed saves are removed. The ranks share the reading of the files.

    Args:
        folder: the run's checkpoint folder.
        last_step: only checkpoints of this step and earlier ones count; None: all.

    Raises:
        CheckpointError: on every rank, when there are checkpoints, or a `latest`, and none is whole.
    """
    names: list[str] = []
    with fail_together():
        if is_first():
            left = _remove_leftovers(folder)
            if left:
                log.info("removed what an interrupted save left: %s", ", ".join(left))
            names = [
                path.name
                for path in reversed(listed(folder))
                if last_step is None or Mark.of(path).step <= last_step
            ]
    names = broadcast_object(names if is_first() else None)
    damaged: dict[str, list[str]] = {}
    for name in names:
        faults = _damage_together(folder / name)
        if not faults:
            with fail_together():
                if is_first():
                    _settle(folder, name, damaged)
            return folder / name
        damaged[name] = faults
    with fail_together():
        if damaged or (last_step is None and (folder / LATEST).exists()):
            raise CheckpointError(_none_whole(folder, damaged))
    return None


def _remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves left; return the names."""
    names = []
    left = [*folder.glob(f"*{PARTIAL}"), *folder.glob(".step-*.old")] if folder.is_dir() else []
    for path in sorted(left):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        names.append(path.name)
    return names


def _damage_together(path: Path) -> list[str]:
    """Say what is wrong with a checkpoint, each rank having read its share."""
    started = time.monotonic()
    seen = gather_objects(damage(path, own_share()))
    faults = list(dict.fromkeys(fault for of_rank in seen for fault in of_rank))
    if not faults:
        size = sum(bytes_ for bytes_, _ in read_digests(path).values())
        log.info("%s is whole: %.1f MB verified in %.2f s", path.name, size / 1e6, time.monotonic() - started)
    return faults


def _settle(folder: Path, name: str, damaged: dict[str, list[str]]) -> None:
    """Warn of damaged checkpoints, set them aside, and let `latest` name the one that is used (rank 0)."""
    found = Mark.of(folder / name)
    for bad, faults in damaged.items():
        lost = Mark.of(folder / bad)
        log.warning(
            "%s is damaged (%s); going on from %s: %d steps, %d samples will be trained again",
            bad,
            "; ".join(faults),
            name,
            lost.step - found.step,
            lost.consumed - found.consumed,
        )
        (folder / bad).rename(folder / f"{bad}{DAMAGED}")
    latest = folder / LATEST
    said = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if said != name:
        if said not in damaged:
            log.warning("%s names %r; going on from %s, the newest whole checkpoint", latest, said, name)
        point_latest(folder, name)


def _none_whole(folder: Path, damaged: dict[str, list[str]]) -> str:
    """Say that a run cannot go on."""
    lines = [f"\n  {name}: {'; '.join(faults)}" for name, faults in damaged.items()]
    return (
        f"{folder}: none of its checkpoints is whole{''.join(lines) or f' ({LATEST} names a missing one)'}\n"
        "put a whole one back, or start over with --fresh or another folder="
    )
