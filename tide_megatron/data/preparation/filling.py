"""Fills a folder with the columns of all records, in an order and with commits that any start goes on from.

Where it goes on, the sources are read again from their beginning, and the records that a commit saw are
digested and skipped: what stands before the place must be what stood there. That costs a hundredth of
encoding, and needs no format, filter or decompressor to know how to begin in the middle.
"""

from __future__ import annotations

import collections
import hashlib
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from tide_megatron.base.errors import RecordError
from tide_megatron.base.lease import Lease
from tide_megatron.base.unfinished import Unfinished
from tide_megatron.data.columns import ColumnWriter
from tide_megatron.data.manifest import Manifest
from tide_megatron.data.preparation.completion import sealed
from tide_megatron.data.preparation.encoding import encoded
from tide_megatron.data.preparation.identity import Plan
from tide_megatron.data.preparation.origins import ORIGINS_FILE, Origins
from tide_megatron.data.preparation.parallel_encoder import ParallelEncoder
from tide_megatron.data.preparation.part import write_part
from tide_megatron.data.preparation.progress import ProgressLine
from tide_megatron.data.preparation.rejects import Rejects
from tide_megatron.data.preparation.tally import Tally
from tide_megatron.data.sources.opening import ChatSource
from tide_megatron.data.sources.source import Line

COMMIT_SECONDS = 10.0
"""How much work a kill may cost."""


class RecordsChanged(Exception):
    """The records that a commit saw are others now."""


class Filling:
    """One start's work on the columns; a context manager, which closes the files.

    Args:
        work: where it is done.
        plan: what is to be done.
        processes: that encode.
        lease: on the target, which is looked at before anything is said to be certain.
        state: what is certain already; None: nothing.

    Raises:
        DamagedWork: a file is not what the state says.
        OSError: the disk refuses.
    """

    def __init__(
        self,
        work: Unfinished,
        plan: Plan,
        processes: ParallelEncoder,
        lease: Lease,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._work, self._plan, self._processes, self._lease = work, plan, processes, lease
        self._sources, self._identity = plan.sources(), plan.identity()
        self._can_go_on = all(source.can_be_read_again for source in self._sources)
        known, found = (state["files"], state) if state else ({}, {})
        numbers = work.data if plan.part else work.spool  # of records, which put parts together
        self._writer = ColumnWriter(work.data, plan.encoder.columns, work.spool, known)
        self._origins = Origins(numbers, found.get("words", ()), known.get(ORIGINS_FILE))
        self._rejects = Rejects(work.data, numbers, plan.on_bad, found.get("rejects"), known)
        self._tally = Tally.read(found["tally"]) if found else Tally.of(plan.encoder.sides)
        self._start, self._prefix = int(found.get("records", 0)), str(found.get("prefix", ""))
        self._done = self._start
        """Number behind the last record that is in the columns."""
        self._seen, self._hash = 0, hashlib.sha256()
        """All records that were read, and their digest."""
        self._ahead: collections.deque[tuple[int, bytes]] = collections.deque()
        """Number and digest of every record that is being encoded."""
        self._described: list[dict[str, Any]] = []
        self._due = time.monotonic() + COMMIT_SECONDS

    def __enter__(self) -> Filling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; what was not finished is as the last commit saw it."""
        for part in (self._writer, self._origins, self._rejects):
            part.abandon()

    def read(self, name: str) -> None:
        """Read and encode all sources.

        Args:
            name: of what is made, for the progress.

        Raises:
            RecordsChanged: what a commit saw is not there any more.
            DataError: bad records, or a source that cannot be read.
        """
        with ProgressLine(name, self._sources) as progress:
            for number, source in enumerate(self._sources):
                first = self._seen
                for line, (found, said) in encoded(source, self._lines(source), self._processes):
                    record, digest = self._ahead.popleft()
                    if isinstance(found, RecordError):
                        self._rejects.add(found, record, source.name, source.at(line), line)
                    elif self._rejects.is_fatal:
                        continue
                    elif isinstance(found, str):
                        self._tally.skip(found, record)
                    else:
                        self._writer.add(found.row)
                        self._origins.add(record, number, said)
                        self._tally.add(found)
                    self._done, self._prefix = record + 1, digest.hex()
                    if time.monotonic() >= self._due:
                        self._commit()
                    progress.show(self._done)
                self._described.append(dict(source.describe(self._seen - first)))
        if self._seen < self._start:
            raise RecordsChanged(f"there are {self._seen} records now, {self._start} were read before")
        self._rejects.raise_if_fatal(self._seen)
        if self._work.is_kept:
            self._commit()

    def finish(self) -> Manifest:
        """Write what is known at the end only; return the manifest (not written yet).

        Raises:
            DataError: no samples, or a side without chunks.
        """
        self._rejects.close()
        return sealed(
            self._plan.description(),
            self._writer,
            self._origins,
            self._tally,
            rejected=self._rejects.counts,
            sources=self._described,
            places=[source.place for source in self._sources],
        )

    def finish_part(self) -> None:
        """Write what the part says about itself, for those who put the parts together."""
        self._rejects.close()
        self._origins.close()
        columns, files = self._writer.finish()
        write_part(
            self._work.data,
            {
                "identity": self._identity,
                "samples": self._writer.samples,
                "records": self._seen,
                "sources": self._described,
                "tally": self._tally.values(),
                "words": self._origins.words,
                "kinds": self._rejects.kinds(),
                "columns": columns,
                "files": files,
            },
        )

    def _lines(self, source: ChatSource) -> Iterator[Line]:
        """Yield the lines of a source that are to be encoded; the others are only digested."""
        self._hash.update(f"\n{source.name}\n".encode(errors="surrogateescape"))
        for number, line in source.lines():
            record = self._seen
            self._seen += 1
            self._hash.update(b"%d " % number + (line if isinstance(line, bytes) else str(line).encode()))
            if self._seen == self._start and self._hash.hexdigest() != self._prefix:
                raise RecordsChanged(f"the first {self._start} records are others now")
            if record < self._start or not (self._plan.part is None or self._plan.part.takes(record)):
                continue
            self._ahead.append((record, self._hash.digest()))
            yield number, line

    def _commit(self) -> None:
        """Make certain what was done so far."""
        if self._can_go_on and not self._rejects.is_fatal:
            self._lease.check()
            files = self._writer.sync() | self._origins.sync() | self._rejects.sync()
            self._work.commit(
                {
                    "identity": self._identity,
                    "records": self._done,
                    "prefix": self._prefix,
                    "tally": self._tally.values(),
                    "words": self._origins.words,
                    "rejects": self._rejects.state(),
                    "files": files,
                }
            )
        self._due = time.monotonic() + COMMIT_SECONDS
