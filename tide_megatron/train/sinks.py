"""Where records go: a JSONL file, TensorBoard event files, wandb. The console is `train/progress.py`.

A sink has `write(record)` and `close()`. TensorBoard and wandb are conveniences, so they are `guarded`: their
first failure is logged and they fall silent, the run goes on. The JSONL file is the run's own record and may
fail aloud.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tide_megatron.base.clock import Clock
from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import TideError
from tide_megatron.base.files import write_text
from tide_megatron.base.units import now
from tide_megatron.tasks.in_training import Answered

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
_GOES_ON = "; the run goes on from its last whole checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Values at one moment of a run."""

    kind: Literal["train", "evaluate", "tasks"]
    clock: Clock
    values: Mapping[str, float]
    rank_seconds: Sequence[Sequence[float]] = ()
    """Of each rank, since the record before: seconds by phase of `PHASES`. Training records only."""
    answers: Sequence[Answered] = ()
    """Replies that a person may read. Records of tasks only."""


class Sink(Protocol):
    """What takes records."""

    def write(self, record: Record) -> None:
        """Keep or show one record."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class JsonLines:
    """`metrics.jsonl` in the run folder: one flushed JSON object a line; what is not finite becomes null."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        """Open the file for appending, after dropping the records of steps later than `clock`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        if self.path.exists():
            self._drop_later(clock.consumed)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line.

        Raises:
            TideError: the disk refuses.
        """
        clock = record.clock
        facts = {
            "kind": record.kind,
            "step": clock.step,
            "consumed": clock.consumed,
            "skipped": clock.skipped,
            "time": now(),
        }
        values = {name: value if math.isfinite(value) else None for name, value in record.values.items()}
        with disk_faults(self.path, TideError, _GOES_ON):
            self._file.write(json.dumps({**facts, **values, **_replies(record)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; what a full disk has refused already is refused once more."""
        with disk_faults(self.path, TideError, _GOES_ON):
            self._file.close()

    def _drop_later(self, consumed: int) -> None:
        """Keep whole lines up to `consumed` samples; a line that a kill cut short goes too."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                is_kept = line.endswith("\n") and json.loads(line)["consumed"] <= consumed
            except (ValueError, KeyError, TypeError):
                is_kept = False
            if is_kept:
                kept.append(line)
        write_text(self.path, "".join(kept))


def _replies(record: Record) -> dict[str, Any]:
    return {"replies": [dataclasses.asdict(answer) for answer in record.answers]} if record.answers else {}


def _markdown(answers: Sequence[Answered]) -> str:
    """Return replies for TensorBoard: code blocks, which keep their lines and mark nothing up."""
    return "\n\n".join(
        f"**{answer.task} {answer.question}** {answer.why}\n\n{_indented(answer.prompt)}\n\n---\n\n"
        f"{_indented(answer.reply)}"
        for answer in answers
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


class TensorBoard:
    """Event files in `tensorboard/`; a resumed run hides what it overwrites."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        """Open a new event file."""
        from torch.utils.tensorboard import SummaryWriter

        purge = clock.step + 1 if clock.step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, record: Record) -> None:
        """Add one scalar per value."""
        for name, value in record.values.items():
            self._writer.add_scalar(f"{record.kind}/{name}", value, record.clock.step)
        if record.answers:
            self._writer.add_text("tasks/replies", _markdown(record.answers), record.clock.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """One wandb run per run folder; `wandb/run-id` in it lets a resumed run go on in the same one."""

    def __init__(
        self, folder: Path, mode: Literal["offline", "online"], project: str, recipe: Mapping[str, Any]
    ) -> None:
        """Start or resume the wandb run."""
        import wandb

        identity = folder / "wandb" / "run-id"
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        self._run = wandb.init(
            id=identity.read_text(encoding="utf-8").strip(),
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            mode=mode,
            config=dict(recipe),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        # Our own axis: wandb's counter must never go back, a resumed run's step may.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the record under its kind."""
        values = {f"{record.kind}/{name}": value for name, value in record.values.items()}
        if record.answers:
            values["tasks/replies"] = self._table(record.answers)
        self._run.log({"step": record.clock.step, "consumed": record.clock.consumed, **values})

    def _table(self, answers: Sequence[Answered]) -> Any:
        import wandb

        names = [field.name for field in dataclasses.fields(Answered)]
        rows = [[getattr(answer, name) for name in names] for answer in answers]
        return wandb.Table(columns=names, data=rows)

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()


class _Guarded:
    """A sink whose first failure is its last."""

    def __init__(self, name: str, build: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._attempt(lambda: setattr(self, "_sink", build()))

    def write(self, record: Record) -> None:
        """Pass the record on while the sink works."""
        sink = self._sink
        if sink is not None:
            self._attempt(lambda: sink.write(record))

    def close(self) -> None:
        """Close the sink if it still works."""
        sink = self._sink
        if sink is not None:
            self._attempt(sink.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._sink = None
            log.warning("%s is off for the rest of this run: %s: %s", self._name, type(error).__name__, error)


def guarded(name: str, build: Callable[[], Sink]) -> Sink:
    """Build a sink that may fail without harm: its first failure, also in `build`, is logged and ends it."""
    return _Guarded(name, build)
