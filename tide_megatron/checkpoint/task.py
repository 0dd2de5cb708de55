"""One save under way on this rank: what its threads do, and what it cost.

Nothing here but `gather` is a collective; a fault in a thread is kept until all ranks look at it together.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

from tide_megatron.base.digests import Digests
from tide_megatron.checkpoint.facts import Facts
from tide_megatron.checkpoint.finish import complete_folder, disk
from tide_megatron.checkpoint.keep import keep_newest
from tide_megatron.checkpoint.names import PARTIAL
from tide_megatron.checkpoint.piece_file import Entry, write_pieces
from tide_megatron.checkpoint.pieces import Piece
from tide_megatron.checkpoint.request import Request
from tide_megatron.parallel.collectives import gather_objects, own_share


@dataclasses.dataclass(kw_only=True)
class Times:
    """What one save cost on this rank, in seconds."""

    begin: float = 0.0
    """Training waited: planning and copying."""
    write: float = 0.0
    """Writing, digests and fsync."""
    wait: float = 0.0
    """Training waited for the writing to end: always, where it is not asynchronous; else because another save
    came, or the run's end."""
    gather: float = 0.0
    """Training waited: table of contents."""
    complete: float = 0.0
    """Facts, digests and rename (rank 0)."""

    @property
    def stall(self) -> float:
        """How long training stood still."""
        return self.begin + self.wait + self.gather


class Task:
    """The parts of a save that follow its beginning."""

    def __init__(self, partial: Path, facts: Facts, request: Request, pieces: list[Piece]) -> None:
        """Take what is to be written.

        Args:
            partial: the folder that was made for it.
            facts: what state.json will say.
            request: megatron-core's part.
            pieces: this rank's pieces of weights and optimizer.
        """
        self.partial = partial
        self.times = Times()
        self.fault: Exception | None = None
        self.is_gathered = False
        self._facts, self._request, self._pieces = facts, request, pieces
        self._entries: list[Entry] = []
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

    def start(self, part: Callable[[], None], background: Executor | None) -> None:
        """Do a part, in the background or (None) at once; what it raises becomes `fault`."""

        def guarded() -> None:
            try:
                with disk(self.partial):
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
        self._digests = self._request.write()
        if self._pieces:
            path = self.partial / f"pieces_{own_share()[0]:05d}.distcp"
            self._entries, self._digests[path.name] = write_pieces(path, self._pieces)
        self._pieces = []
        self.times.write = time.monotonic() - started

    def gather(self) -> None:
        """Tell rank 0 what lies where. Collective.

        Raises:
            CheckpointError: the disk refuses the table of contents.
        """
        with disk(self.partial):
            self._request.finish()
        gathered = gather_objects((self._entries, self._digests))
        self._entries = [entry for entries, _ in gathered for entry in entries]
        self._digests = {name: value for _, known in gathered for name, value in known.items()}
        self.is_gathered = True

    def complete(self, keep: int, keep_every: int) -> None:
        """Give the checkpoint its name, and take away those that are not to stay (rank 0)."""
        started = time.monotonic()
        complete_folder(self.partial, self._facts, self._entries, self._digests)
        keep_newest(self.partial.parent, keep, keep_every)
        self.times.complete = time.monotonic() - started
