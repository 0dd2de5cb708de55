"""Saving: copy in a moment, write in the background, agree between steps that it is done.

A save has four parts. *Begin*, while training waits: the ranks plan together and each copies what it will
write. *Write*, in a thread of each rank: files, digests, fsync. *Gather*, while training waits, once all
ranks have written: where everything lies. *Complete*, in a thread of rank 0: facts, digests, rename,
`latest`. No thread calls a collective: all ranks agree before a step whether every one of them is done.

A folder appears under its final name only when it is whole and on the disk, and `latest` moves only after
that, so a kill at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tide_megatron.base.clock import Clock
from tide_megatron.checkpoint.facts import Facts, Origin
from tide_megatron.checkpoint.finish import begin_folder, disk
from tide_megatron.checkpoint.names import name_of
from tide_megatron.checkpoint.pieces import Staging
from tide_megatron.checkpoint.request import Request
from tide_megatron.checkpoint.state import SHARDING, SavingState, live_storages, optimizer_steps
from tide_megatron.checkpoint.task import Task, Times
from tide_megatron.parallel.collectives import all_agree, fail_together, is_first, own_share

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeping:
    """How checkpoints are written and which stay."""

    keep: int = 2
    """How many of the newest stay."""
    keep_every: int = 0
    """Those whose step is a multiple of it stay for good; 0: none."""
    asynchronous: bool = True
    """Write while training goes on; False: training waits for the disk, and nothing is copied."""


class Saver:
    """Writes a run's checkpoints; one save is under way at a time. Every method is collective."""

    def __init__(self, folder: Path, model: Any, optimizer: Any, origin: Origin, keeping: Keeping) -> None:
        """Prepare to save.

        Args:
            folder: the run's checkpoint folder.
            model: the student, with its process groups.
            optimizer: megatron's.
            origin: recipe and data.
            keeping: how and how many.
        """
        self.folder = folder
        self._model, self._optimizer = model, optimizer
        self._origin, self._keeping = origin, keeping
        self._state = SavingState(model, optimizer)
        self._staging = Staging()
        # One thread for all saves: to start another, training would wait for the interpreter.
        self._background = ThreadPoolExecutor(1, "checkpoint") if keeping.asynchronous else None
        self._task: Task | None = None
        self.times: list[Times] = []
        """What the finished saves cost, in their order."""

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._task is not None

    def begin(self, clock: Clock, metrics: dict[str, float]) -> None:
        """Save the state as it is now, as `step-N`; an earlier save that is not finished is waited for.

        Args:
            clock: where the run stands.
            metrics: what the last step measured.

        Raises:
            CheckpointError: on every rank, when the disk refuses; older checkpoints stay as they are.
        """
        self.wait()
        started = time.monotonic()
        partial = begin_folder(self.folder, name_of(clock))
        state, pieces = self._state.now()
        facts = Facts.now(clock, self._origin, optimizer_steps(self._optimizer), metrics, own_share()[1])
        with disk(partial):
            request = Request(state, partial, SHARDING, is_checked=not self.times)  # it stays so
        if self._background:
            request.copy(live_storages(self._model, self._optimizer))
            pieces = self._staging.copy(pieces)
        self._task = task = Task(partial, facts, request, pieces)
        if self._background:
            task.start(task.write, self._background)
        task.times.begin = time.monotonic() - started
        if not self._background:
            task.start(task.write, None)
            self.wait()
            task.times.wait = task.times.write + task.times.complete

    def poll(self) -> None:
        """Take the save under way a part further if all ranks are done with the last; between any two steps.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        if self._task is not None and all_agree(not self._task.is_busy):
            self._advance(self._task)

    def wait(self) -> None:
        """Finish the save under way, however long it takes; before another one, and at the run's end.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        task = self._task
        if task is not None and task.is_busy:
            log.info("%s is not written yet; waiting for it", task.partial.name)
        while task is not None and self._task is task:
            started = time.monotonic()
            task.join()
            task.times.wait += time.monotonic() - started
            self._advance(task)

    def _advance(self, task: Task) -> None:
        """Begin the next part of a save that no rank is busy with, or be done with it."""
        self._task = None  # a fault ends it
        started = time.monotonic()
        with fail_together():
            if task.fault is not None:
                raise task.fault
        if task.is_gathered:
            self.times.append(task.times)
            log.info(
                "%s: training waited %.2f s, written in %.2f s", task.name, task.times.stall, task.times.write
            )
            return
        task.gather()
        keeping = self._keeping
        task.times.gather = time.monotonic() - started
        if is_first():
            task.start(lambda: task.complete(keeping.keep, keeping.keep_every), self._background)
        self._task = task
