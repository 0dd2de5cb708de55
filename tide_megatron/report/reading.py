"""What a run's folder tells a report, however far the run came: every missing thing is a sentence.

A run may be under way, may have been killed in the middle of a line, may be of another release. What can be
read is; the rest is said in `notes` and left out. Only a folder that is no run's is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import yaml
from numpy.typing import NDArray

from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import CheckpointError, ConfigError, TideError
from tide_megatron.base.read import json_of, text_of
from tide_megatron.evaluate.model_folder import RECIPE
from tide_megatron.train.folder import AGREEMENT, RESULT
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree, build_recipe
from tide_megatron.train.sinks import FILE_NAME
from tide_megatron.train.status import RunStatus, read_status

_PLACE = frozenset(("kind", "consumed", "skipped", "time", "step"))
"""What says where a record stands, beside its values."""
_UNSHOWN = ("items/", "bytes/", "epochs/", "learning_rate", "hidden_share")
"""Beginnings of names that no figure shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A figure over the run; only finite values."""

    steps: NDArray[numpy.int64]
    """[points]: updates applied."""
    values: NDArray[numpy.float64]
    """[points]."""

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


Figures = Mapping[str, Series]
"""Name in docs/metrics.md -> its course; no series is empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """What is known of a run."""

    name: str
    folder: Path
    status: RunStatus
    tree: Tree
    """Its recipe as it was written; empty: not readable."""
    recipe: Recipe | None
    """None: this release cannot read it."""
    train: Figures
    scores: Figures
    tasks: Figures
    """Scores of tasks while it trained, by `tasks/NAME`."""
    records: int
    """Training records that were read."""
    agreement: Sequence[Mapping[str, Any]]
    """Measurements of the teachers, oldest first."""
    result: Mapping[str, Any]
    """result.json; empty: the run has not ended."""
    notes: Sequence[str]
    """What is missing or damaged, in sentences."""

    @property
    def ranks(self) -> int | None:
        """Of its last start; None: it never started."""
        return self.status.starts[-1].ranks if self.status.starts else None

    def named(self, prefix: str) -> dict[str, Series]:
        """Return the training figures whose names begin with a prefix, without it."""
        return {
            name.removeprefix(prefix): series
            for name, series in self.train.items()
            if name.startswith(prefix)
        }


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """Read the folders of runs, each under a name of its own.

    Raises:
        CheckpointError: a folder is no run's, or cannot be read.
        ConfigError: one is named twice.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{folder}: is named twice; name each run once")
    names = [place.name for place in places]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> ReportedRun:
    """Read one run's folder.

    Raises:
        CheckpointError: it is no run's, or cannot be read.
    """
    notes: list[str] = []
    with disk_faults(folder, CheckpointError):
        status = read_status(folder)
        tree, recipe = _recipe(folder, notes)
        kinds, records = _metrics(folder, notes)
        agreement = list(_lines(folder / AGREEMENT, notes)) if (folder / AGREEMENT).is_file() else []
        result = _result(folder, notes)
    return ReportedRun(
        name=name,
        folder=folder,
        status=status,
        tree=tree,
        recipe=recipe,
        train=kinds.get("train", {}),
        scores=kinds.get("evaluate", {}),
        tasks=kinds.get("tasks", {}),
        records=records,
        agreement=[line for line in agreement if isinstance(line.get("teachers"), dict)],
        result=result,
        notes=notes,
    )


def _recipe(folder: Path, notes: list[str]) -> tuple[Tree, Recipe | None]:
    """Return the recipe as it was written, and as this release reads it."""
    try:
        tree = yaml.safe_load(text_of(folder / RECIPE))
        if not isinstance(tree, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError, yaml.YAMLError) as fault:
        notes.append(
            f"{RECIPE} is not readable ({_short(fault)}), so nothing is shown of losses and layouts."
        )
        return {}, None
    try:  # `epochs` has become `steps` already; it would be worked out anew from data that may be gone
        return tree, build_recipe({**tree, "epochs": None})[0]
    except TideError as fault:
        notes.append(f"{RECIPE} is of another release ({_short(fault)}), so lambda and layout are not shown.")
        return tree, None


def _result(folder: Path, notes: list[str]) -> Mapping[str, Any]:
    """Return result.json, where there is one."""
    try:
        found = json_of(folder / RESULT)
        if isinstance(found, dict):
            return found
        notes.append(f"{RESULT} is not readable (it is no object), so scores by sample are missing.")
    except FileNotFoundError:
        pass
    except ValueError as fault:
        notes.append(f"{RESULT} is not readable ({_short(fault)}), so scores by sample are missing.")
    return {}


def _metrics(folder: Path, notes: list[str]) -> tuple[dict[str, Figures], int]:
    """Return the figures of metrics.jsonl by kind of record, and how many training records there are."""
    file = folder / FILE_NAME
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    records = 0
    for line in _lines(file, notes) if file.is_file() else ():
        kind, step = line.get("kind"), line.get("step")
        if not isinstance(kind, str) or not isinstance(step, int):
            continue
        records += kind == "train"
        columns = found.setdefault(kind, {})
        for name, value in line.items():
            if isinstance(value, float | int) and name not in _PLACE and not name.startswith(_UNSHOWN):
                steps, values = columns.get(name) or columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    if not found:
        notes.append(f"there are no records in {FILE_NAME} yet: the first comes after the first update.")
    return {
        kind: {name: series for name, pair in columns.items() if len((series := _series(*pair)).steps)}
        for kind, columns in found.items()
    }, records


def _series(steps: list[int], values: list[float]) -> Series:
    points = numpy.array(values, dtype=numpy.float64)
    is_finite = numpy.isfinite(points)
    return Series(steps=numpy.array(steps, dtype=numpy.int64)[is_finite], values=points[is_finite])


def _lines(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line; say how many lines are none."""
    bad, is_torn = 0, False
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):
                is_torn = not line.endswith("\n")
                bad += not is_torn
                continue
            if isinstance(said, dict):
                yield said
            else:
                bad += 1
    if is_torn:
        notes.append(f"the last line of {file.name} is cut short, as a kill leaves it; it is left out.")
    if bad:
        words = "line is no JSON object" if bad == 1 else "lines are no JSON objects"
        notes.append(f"{bad} {words} in {file.name}; left out.")


def _short(fault: Exception) -> str:
    words = " ".join(str(fault).split())
    return words if len(words) <= 200 else words[:199] + "…"
