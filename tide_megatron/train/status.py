"""What a run does, for whoever looks: `status.json` and `status.html` while it goes, and one reading of all.

The first rank writes both files with every record of its metrics, every few seconds at most, and when the run
ends. A run that was killed leaves them as they were, so `read_status` also looks at the lease, the starts and
the checkpoints, and says what became of it. No host but the one that asks is needed for that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tide_megatron.base.clock import Clock, Pace
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import write_text
from tide_megatron.base.lease import LEASE, holder_of
from tide_megatron.base.phases import PHASES
from tide_megatron.base.read import json_of
from tide_megatron.base.units import now
from tide_megatron.checkpoint.retention import listed
from tide_megatron.evaluate.model_folder import RECIPE
from tide_megatron.train.folder import CHECKPOINTS, PAGE, STATUS
from tide_megatron.train.history import Start, read_history
from tide_megatron.train.sinks import FILE_NAME, Record
from tide_megatron.train.status_page import render

EVERY_SECONDS = 10.0
"""So often are the files written, at most."""
MOST_POINTS = 400
"""Of a curve; more are thinned out."""
CURVES = {"loss": "train", "nll_per_byte": "evaluate"}
"""Value -> kind of the records that have it."""

State = Literal["training", "finished", "stopped", "failed", "lost", "not started"]


@dataclasses.dataclass(kw_only=True)
class Curve:
    """Points (step, value) of a run of any length; every second one goes when there are too many."""

    points: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, step: int, value: float) -> None:
        """Take a point, the newest."""
        if math.isfinite(value) and self.seen % self.stride == 0:
            self.points.append((step, value))
            if len(self.points) > MOST_POINTS:
                self.points, self.stride = self.points[::2], 2 * self.stride
        self.seen += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What a run said of itself last."""

    at: str
    """When, ISO 8601."""
    step: int
    steps: int
    skipped: int = 0
    eta_seconds: float | None = None
    train: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Values of its last training record (docs/metrics.md)."""
    scores: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Held-out scores, and `step`, of which."""
    curves: Mapping[str, Sequence[Sequence[float]]] = dataclasses.field(default_factory=dict)
    phases: Sequence[str] = PHASES
    rank_seconds: Sequence[Sequence[float]] = ()
    """Of each rank, in the last record's time: seconds by phase."""
    hosts: Sequence[str] = ()
    """Of each rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What is known of a run, from its folder alone."""

    folder: str
    state: State
    why: str = ""
    """Who stopped it, or what failed."""
    told: Told | None = None
    silent_seconds: float | None = None
    """How long it has said nothing."""
    holder: str = ""
    """Who holds its lease."""
    checkpoint: str = ""
    """The newest one's name; whether it is whole is not looked at."""
    checkpoint_seconds: float | None = None
    """Its age."""
    starts: Sequence[Start] = ()

    def values(self) -> dict[str, Any]:
        """Return it for JSON."""
        return dataclasses.asdict(self)


def read_status(folder: Path) -> RunStatus:
    """Look at a run folder, from any host that sees it.

    Raises:
        CheckpointError: it is no run's, or not readable.
    """
    if not (folder / RECIPE).is_file():
        raise CheckpointError(f"{folder}: no run's folder ({RECIPE} is missing)")
    try:
        return _status(folder)
    except OSError as fault:
        raise CheckpointError(f"{folder}: cannot be read ({fault})") from None


def _status(folder: Path, told: Told | None = None, *, is_own: bool = False) -> RunStatus:
    """Look at a run folder; `is_own`: as the run itself, whose lease says nothing once its end is written."""
    holder, starts, saved = holder_of(folder / LEASE), read_history(folder), listed(folder / CHECKPOINTS)
    has_ended = is_own and bool(starts) and starts[-1].end is not None
    state, why = _state(starts, is_held=holder is not None and not has_ended)
    return RunStatus(
        folder=str(folder),
        state=state,
        why=why,
        told=told or _read_told(folder),
        silent_seconds=_age(folder / STATUS),
        holder=holder.described() if holder else "",
        checkpoint=saved[-1].name if saved else "",
        checkpoint_seconds=_age(saved[-1]) if saved else None,
        starts=starts,
    )


def _state(starts: Sequence[Start], *, is_held: bool) -> tuple[State, str]:
    """Say what became of the last start."""
    last = starts[-1] if starts else None
    if is_held:
        is_begun = last is not None and last.end is None
        return ("training", "") if is_begun else ("training", "it starts: models and data are being read")
    if last is None:
        return "not started", ""
    if last.end is None:
        return "lost", "it ended without a word: it was killed, or its machine was lost"
    return last.end, last.why


def write_status(folder: Path, told: Told | None = None) -> None:
    """Write both files as the run is now (only the first rank calls it).

    Raises:
        OSError: the disk refuses.
    """
    values = _status(folder, told, is_own=True).values()
    if told is not None:
        write_text(folder / STATUS, json.dumps(values["told"]) + "\n", is_durable=False)
    write_text(folder / PAGE, render(values), is_durable=False)


class StatusPage:
    """The sink that keeps both files (`train.sinks.Sink`)."""

    def __init__(self, folder: Path, clock: Clock, hosts: Sequence[str] = ()) -> None:
        """Go on with the curves that metrics.jsonl has up to the clock."""
        self._folder, self._hosts = folder, hosts
        self._pace = Pace(clock)
        self._curves = {name: Curve() for name in CURVES}
        self._told: Told | None = None
        self._scores: dict[str, float | None] = {}
        self._written = -math.inf
        for line in (folder / FILE_NAME).read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            self._add(said.get("kind", ""), said.get("step", 0), said)

    def write(self, record: Record) -> None:
        """Take a record; write, if that was some seconds ago."""
        clock, values = record.clock, record.values
        self._add(record.kind, clock.step, values)
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if record.kind == "evaluate":
            self._scores = {"step": clock.step, **plain}
        before = self._told
        is_train = record.kind == "train"
        self._told = Told(
            at=now(),
            step=clock.step,
            steps=clock.total_steps,
            skipped=clock.skipped,
            eta_seconds=self._pace.seconds_left(clock),
            train=plain if is_train else before.train if before else {},
            scores=self._scores,
            curves={name: curve.points for name, curve in self._curves.items()},
            rank_seconds=record.rank_seconds if is_train else before.rank_seconds if before else (),
            hosts=self._hosts,
        )
        if time.monotonic() - self._written > EVERY_SECONDS:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()

    def _flush(self) -> None:
        if self._told is not None:
            write_status(self._folder, self._told)
            self._written = time.monotonic()

    def _add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, of_kind in CURVES.items():
            if kind == of_kind and isinstance(values.get(name), float | int):
                self._curves[name].add(step, values[name])


def _read_told(folder: Path) -> Told | None:
    """Return status.json; None where there is none, or another release's."""
    try:
        said = json_of(folder / STATUS)
        names = {field.name for field in dataclasses.fields(Told)}
        return Told(**{name: value for name, value in said.items() if name in names})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None


def _age(file: Path) -> float | None:
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return None
