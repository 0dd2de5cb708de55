"""How far a preparation is: a bar on a terminal, else a line in the log now and then, with rate and rest.

Shares are of the sources' bytes as they lie on disk, compressed ones as well: how much is in them nobody
knows before. Rates and the time left count from where this start began to encode, not from what it skipped.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from types import TracebackType

import rich
import rich.progress

from tide_megatron.base.units import in_bytes, in_time
from tide_megatron.data.sources.source import Source

logger = logging.getLogger(__name__)
EVERY_SECONDS = 30.0


class ProgressLine:
    """Tells people how far it is; a context manager.

    Args:
        name: what is being made.
        sources: what is read; a pipe does not say how long it is.
    """

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self._name, self._sources = name, sources
        sizes = [source.total_bytes for source in sources]
        known = [size for size in sizes if size is not None]
        self._total = sum(known) if len(known) == len(sizes) else None
        self._began: tuple[float, int, int] | None = None
        self._said = time.monotonic()
        columns = (
            *rich.progress.Progress.get_default_columns(),
            rich.progress.DownloadColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
        )
        is_watched = rich.get_console().is_terminal
        self._bar = rich.progress.Progress(*columns, transient=True, disable=not is_watched)
        self._task = self._bar.add_task(name, total=self._total, rate="")

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away; a disk or terminal that refuses it is nobody's fault."""
        with contextlib.suppress(OSError):
            self._bar.stop()

    def show(self, records: int) -> None:
        """Tell how far it is, if it is time to.

        Args:
            records: that are done.
        """
        now, done = time.monotonic(), sum(source.read_bytes for source in self._sources)
        if self._began is None:
            self._began = now, records, done
        is_due = now - self._said >= EVERY_SECONDS
        if self._bar.disable and not is_due:
            return
        began, first, skipped = self._began
        seconds = max(now - began, 1e-6)
        rate = f"{(records - first) / seconds:.0f} records/s, {in_bytes((done - skipped) / seconds)}/s"
        self._bar.update(self._task, completed=done, rate=rate)
        if not is_due or not self._bar.disable:
            return
        self._said = now
        rest = ""
        if self._total is not None and done > skipped:
            left = (self._total - done) * seconds / (done - skipped)
            rest = f", {done / max(1, self._total):.0%} of the bytes, {in_time(max(0.0, left))} left"
        logger.info("%s: %d records, %s%s", self._name, records, rate, rest)
