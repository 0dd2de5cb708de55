"""Saving: copy in a moment, write in the background, agree between steps that it is done.

A save has four parts. *Begin*, while training waits: each rank copies what it will write (at the first save
the ranks plan together who writes what; it stays so). *Write*, in a thread of each rank: files, digests,
fsync. *Gather*, while training waits, once all ranks have written: where everything lies. *Complete*, in a
thread of rank 0: table of contents, metadata, digests, rename, `latest`. No thread calls a collective: all
ranks agree before a step whether every one of them is done.

A folder appears under its final name only when it is whole and on the disk, and `latest` moves only after
that, so a kill at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tide_megatron.platform

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from tide_megatron.base.clock import Clock
from tide_megatron.base.disk import disk_words
from tide_megatron.base.errors import CheckpointError, TideError, causes, last_line
from tide_megatron.base.files import PARTIAL, Digests, commit_folder, write_digests
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.lease import Lease
from tide_megatron.checkpoint.metadata import CheckpointMetadata, RunIdentity
from tide_megatron.checkpoint.planner import ShardPlanner, Staging
from tide_megatron.checkpoint.retention import Checkpoints, name_of, point_latest, remove_expired
from tide_megatron.checkpoint.sharded_state import SHARDING, ShardedState, optimizer_steps
from tide_megatron.checkpoint.writer import DigestingWriter, write_common
from tide_megatron.parallel.collectives import all_agree, fail_together, gather_objects, is_first, own_share

log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class SaveTimes:
    """What one save cost on this rank, in seconds."""

    begin: float = 0.0
    """Training waited: planning and copying."""
    write: float = 0.0
    """Writing, digests and fsync."""
    wait: float = 0.0
    """Training waited for the writing to end: always, where it is not asynchronous; else because another save
    came, or the run's end."""
    gather: float = 0.0
    """Training waited: where everything lies."""
    complete: float = 0.0
    """Table of contents, metadata, digests and rename (rank 0)."""

    @property
    def stall(self) -> float:
        """How long training stood still."""
        return self.begin + self.wait + self.gather

    @property
    def seconds(self) -> float:
        """How long it took from beginning to end."""
        return self.begin + self.write + self.gather + self.complete


class Saver:
    """Writes a run's checkpoints; one save is under way at a time. Every method is collective."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        optimizer: Any,
        run: RunIdentity,
        options: Checkpoints,
        lease: Lease | None = None,
    ) -> None:
        """Prepare to save.

        Args:
            folder: the run's checkpoint folder.
            model: the student, with its process groups.
            optimizer: megatron's.
            run: recipe and data.
            options: how, and which stay.
            lease: on the run's folder; without it nothing is given its name. None: nobody holds one.
        """
        self._lease = lease
        self.folder = folder
        self._optimizer, self._run, self._options = optimizer, run, options
        self._state = ShardedState(model, optimizer)
        self._staging = Staging()
        self._plan: tuple[SavePlan, Metadata] | None = None
        """What this rank writes, and the table of contents without places; the same at every save."""
        # One thread for all saves: to start another, training would wait for the interpreter.
        self._background = ThreadPoolExecutor(1, "checkpoint") if options.asynchronous else None
        self._save: Save | None = None
        self._saved_step = 0
        """Of the newest save, under way or done."""
        self.times: list[SaveTimes] = []
        """What the finished saves cost, in their order."""

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._save is not None

    def begin(
        self, clock: Clock, metrics: dict[str, float], spent: Mapping[str, float] | None = None
    ) -> None:
        """Save the state as it is now, as `step-N`; an earlier save that is not finished is waited for.

        Args:
            clock: where the run stands.
            metrics: what the last step measured.
            spent: what the run has cost so far (`CheckpointMetadata.spent`).

        Raises:
            CheckpointError: on every rank, when the disk refuses; older checkpoints stay as they are.
        """
        self.wait()
        started, self._saved_step = time.monotonic(), clock.step
        if self._plan is None:
            self._plan = self._plan_together()
        shards, partial = self._state.shards, self.folder / f"{name_of(clock)}{PARTIAL}"
        common = self._state.common()
        with fail_together(), saying_which_disk(partial):
            if is_first():
                if self._lease is not None:
                    self._lease.check()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_common(partial, common, SHARDING)
        if self._background:
            shards = self._staging.copy(shards)
        steps, (_, ranks) = optimizer_steps(self._optimizer), own_share()
        self._save = save = Save(
            partial,
            CheckpointMetadata.now(self._run, clock, steps, metrics, ranks, spent),
            ShardPlanner(shards, self._state.objects),
            *self._plan,
        )
        if self._background:
            save.start(save.write, self._background)
        save.times.begin = time.monotonic() - started
        if not self._background:
            save.start(save.write, None)
            self.wait()
            save.times.wait = save.times.write + save.times.complete

    def before_step(self, clock: Clock) -> None:
        """Take the save under way a part further, or wait for it where training would get too far ahead.

        Args:
            clock: where the run stands.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        if self._options.every and clock.step - self._saved_step >= self._options.most_ahead:
            self.wait()
        else:
            self.poll()

    def poll(self) -> None:
        """Take the save under way a part further if all ranks are done with the last; between any two steps.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        if self._save is not None and all_agree(not self._save.is_busy):
            self._advance(self._save)

    def wait(self) -> None:
        """Finish the save under way, however long it takes; before another one, and at the run's end.

        Raises:
            CheckpointError: on every rank, when writing failed on some.
        """
        save = self._save
        if save is not None and save.is_busy:
            log.info("%s is not written yet; waiting for it", save.partial.name)
        while save is not None and self._save is save:
            started = time.monotonic()
            save.join()
            save.times.wait += time.monotonic() - started
            self._advance(save)

    def _plan_together(self) -> tuple[SavePlan, Metadata]:
        """Agree on who writes what, into which file, and what the table of contents will say of it."""
        self._state.describe()
        planner, (rank, _) = ShardPlanner(self._state.shards, self._state.objects), own_share()
        plans, table = planner.create_global_plan(gather_objects(planner.create_local_plan()))
        return DigestingWriter(self.folder).prepare_global_plan(plans)[rank], table

    def _advance(self, save: Save) -> None:
        """Begin the next part of a save that no rank is busy with, or be done with it."""
        self._save = None  # a fault ends it
        started = time.monotonic()
        with fail_together():
            if save.fault is not None:
                raise save.fault
        if save.is_gathered:
            self.times.append(save.times)
            HEARTBEAT.has_saved = True
            log.info(
                "%s: training waited %.2f s, written in %.2f s", save.name, save.times.stall, save.times.write
            )
            return
        save.gather()
        save.times.gather = time.monotonic() - started
        if is_first():
            save.start(lambda: save.complete(self._options, self._lease), self._background)
        self._save = save


class Save:
    """One save under way on this rank: what its threads do, and what it cost.

    Nothing here but `gather` is a collective; a fault in a thread is kept until all ranks look at it
    together.
    """

    def __init__(
        self,
        partial: Path,
        metadata: CheckpointMetadata,
        planner: ShardPlanner,
        plan: SavePlan,
        table: Metadata,
    ) -> None:
        """Take what is to be written.

        Args:
            partial: the folder that was made for it.
            metadata: what state.json will say.
            planner: hands out the shards.
            plan: what this rank writes.
            table: of contents, without places.
        """
        self.partial = partial
        self.times = SaveTimes()
        self.fault: Exception | None = None
        self.is_gathered = False
        self._metadata, self._planner, self._plan, self._table = metadata, planner, plan, table
        self._writer = DigestingWriter(partial)
        self._results: list[list[WriteResult]] = []
        self._digests: Digests = {}
        self._future: Future[None] | None = None

    @property
    def name(self) -> str:
        """The checkpoint's final name."""
        return self.partial.name.removesuffix(PARTIAL)

    @property
    def is_busy(self) -> bool:
        """Whether a thread of this rank works on it."""
        return self._future is not None and not self._future.done()

    def start(self, part: Callable[[], None], background: ThreadPoolExecutor | None) -> None:
        """Do a part, in the background or (None) at once; what it raises becomes `fault`."""

        def guarded() -> None:
            try:
                with saying_which_disk(self.partial):
                    part()
            except Exception as fault:
                self.fault = fault

        if background is None:
            guarded()
        else:
            self._future = background.submit(guarded)

    def join(self) -> None:
        """Wait for this rank's thread."""
        if self._future is not None:
            self._future.result()

    def write(self) -> None:
        """Write all that is this rank's."""
        started = time.monotonic()
        self._results = [self._writer.write_data(self._plan, self._planner).wait()]
        self.times.write = time.monotonic() - started

    def gather(self) -> None:
        """Tell all ranks what lies where. Collective."""
        gathered = gather_objects((self._results, self._writer.digests))
        self._results = [results for of_rank, _ in gathered for results in of_rank]
        self._digests = {name: value for _, known in gathered for name, value in known.items()}
        self.is_gathered = True

    def complete(self, options: Checkpoints, lease: Lease | None) -> None:
        """Give the checkpoint its name, and take away those that are not to stay (rank 0)."""
        started = time.monotonic()
        self._writer.finish(self._table, self._results)
        self._metadata.write(self.partial)
        write_digests(self.partial, self._digests)
        if lease is not None:
            lease.check()
        commit_folder(self.partial, self.partial.with_name(self.name))
        point_latest(self.partial.parent, self.name)
        remove_expired(self.partial.parent, options)
        self.times.complete = time.monotonic() - started


@contextlib.contextmanager
def saying_which_disk(partial: Path) -> Iterator[None]:
    """Say in one line that writing failed, whatever a library raised."""
    try:
        yield
    except TideError:
        raise
    except Exception as fault:
        # A library that was writing complains of its own unfinished file, and hides why.
        disk = next((cause for cause in causes(fault) if isinstance(cause, OSError)), None)
        words = disk_words(disk, partial) if disk else f"{partial}: cannot be written ({last_line(fault)})"
        raise CheckpointError(f"{words}; the run goes on from its last whole checkpoint") from fault
