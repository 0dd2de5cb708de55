"""Saving: copy in a moment, write in the background, finish together at the start of a later step.

A save has three parts. *Begin*, while training waits: the ranks plan together and each copies what it will
write. *Write*, in a thread of each rank: files, digests, fsync; no collective. *Finish*, while training
waits, once all ranks have written: table of contents, facts, digests, rename, `latest`. A folder appears
under its final name only when it is whole and on the disk, and `latest` moves only after that, so a kill at
any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from pathlib import Path
from typing import Any

from tide_megatron.base.clock import Clock
from tide_megatron.base.digests import Digests
from tide_megatron.checkpoint.facts import Facts, Origin
from tide_megatron.checkpoint.finish import begin_folder, complete_folder, disk
from tide_megatron.checkpoint.names import name_of
from tide_megatron.checkpoint.piece_file import Entry, write_pieces
from tide_megatron.checkpoint.pieces import Piece, Staging
from tide_megatron.checkpoint.ranks import num_ranks, own_rank
from tide_megatron.checkpoint.request import Request
from tide_megatron.checkpoint.state import SHARDING, live_storages, optimizer_steps, saving_state
from tide_megatron.parallel.collectives import all_agree, fail_together

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


@dataclasses.dataclass(kw_only=True)
class Times:
    """What one save cost on this rank, in seconds."""

    begin: float = 0.0
    """Training waited: planning and copying; all of the writing, too, where it is not asynchronous."""
    write: float = 0.0
    """Writing, digests and fsync."""
    wait: float = 0.0
    """Training waited for the writing to end: another save came, or the run's end."""
    finish: float = 0.0
    """Training waited: table of contents and rename."""

    @property
    def stall(self) -> float:
        """How long training stood still."""
        return self.begin + self.wait + self.finish


class _Save:
    """One save under way on this rank."""

    def __init__(self, partial: Path, facts: Facts, request: Request, pieces: list[Piece]) -> None:
        self.partial, self.facts, self.request = partial, facts, request
        self.pieces = pieces
        self.entries: list[Entry] = []
        self.digests: Digests = {}
        self.fault: Exception | None = None
        self.times = Times()
        self.thread: threading.Thread | None = None

    def write(self) -> None:
        """Write all that is this rank's; a fault is kept for the finish."""
        started = time.monotonic()
        try:
            with disk(self.partial):
                self.digests = self.request.write()
                if self.pieces:
                    path = self.partial / f"optimizer_{own_rank():05d}.distcp"
                    self.entries, self.digests[path.name] = write_pieces(path, self.pieces)
        except Exception as fault:
            self.fault = fault
        self.times.write = time.monotonic() - started


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
        self._staging = Staging()
        self._save: _Save | None = None
        self.times: list[Times] = []
        """What the finished saves cost, in their order."""

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._save is not None

    def begin(self, clock: Clock, metrics: dict[str, float]) -> None:
        """Save the state as it is now, as `step-N`; an earlier save that is not finished is waited for.

        Args:
            clock: where the run stands.
            metrics: what the last step measured.

        Raises:
            CheckpointError: on every rank, when the disk refuses; older checkpoints stay as they are.
        """
        if self.is_saving:
            log.info("step %d: the last checkpoint is not written yet; waiting for it", clock.step)
            self.wait()
        started = time.monotonic()
        partial = begin_folder(self.folder, name_of(clock))
        state, pieces = saving_state(self._model, self._optimizer)
        facts = Facts.now(clock, self._origin, optimizer_steps(self._optimizer), metrics, num_ranks())
        with disk(partial):
            request = Request(state, partial, SHARDING)
        if self._keeping.asynchronous:
            request.copy(live_storages(self._model, self._optimizer))
            pieces = self._staging.copy(pieces)
        self._save = save = _Save(partial, facts, request, pieces)
        if self._keeping.asynchronous:
            save.thread = threading.Thread(target=save.write, name="checkpoint", daemon=True)
            save.thread.start()
        else:
            save.write()
        save.times.begin = time.monotonic() - started
        if not self._keeping.asynchronous:
            self._finish(save)

    def poll(self) -> None:
        """Finish the save under way if all ranks have written; between any two steps.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        save = self._save
        if save is not None and all_agree(save.thread is None or not save.thread.is_alive()):
            self._finish(save)

    def wait(self) -> None:
        """Finish the save under way, however long it takes; at the run's end.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        save = self._save
        if save is not None:
            started = time.monotonic()
            if save.thread is not None:
                save.thread.join()
            save.times.wait = time.monotonic() - started
            self._finish(save)

    def _finish(self, save: _Save) -> None:
        """Give the checkpoint its name."""
        self._save = None
        started = time.monotonic()
        with fail_together():
            if save.fault is not None:
                raise save.fault
        with disk(save.partial):
            save.request.finish()
        keeping = self._keeping
        final = complete_folder(
            save.partial, save.facts, save.entries, save.digests, keeping.keep, keeping.keep_every
        )
        save.times.finish = time.monotonic() - started
        self.times.append(save.times)
        log.info(
            "%s: training waited %.2f s, written in %.2f s", final.name, save.times.stall, save.times.write
        )
