"""One log for all ranks: rank 0 tells the story, the others speak up only when something is wrong.

Modules write to `logging.getLogger(__name__)` and never configure anything; `start_log` is called once per
process, by whatever starts ranks. Lines go to stderr, so that stdout stays free for what a command prints.
A terminal gets coloured lines that wrap; a file or a pipe gets one line a message, whatever its length.
Left out: metrics and progress (`train.metrics`), which are data and not prose.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

ROOT = "tide_megatron"
SHOWN = "tide_megatron.shown"
"""Logger of lines that the console has already; only a run's journal takes them."""
_LINE = "%(asctime)s %(levelname)-8s %(message)s"


class _RankFilter(logging.Filter):
    """Put the rank before the messages of every rank but the first."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = f"[rank {rank}] " if rank else ""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._prefix + record.getMessage(), ()
        return True


class _Lines(logging.Handler):
    """Writes one line a message."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter(_LINE, "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False)


class _JournalFile(logging.FileHandler):
    """A file of messages; a disk that refuses one is told once, and the file takes no more."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Fall silent."""
        if self.level <= logging.CRITICAL:
            self.setLevel(logging.CRITICAL + 1)
            fault = sys.exc_info()[1]
            logging.getLogger(__name__).warning("%s: not written any more (%s)", self.baseFilename, fault)


class Journal:
    """A file that everything is written into that this process says; what came before it is open, too."""

    def __init__(self) -> None:
        """Listen, and remember."""
        self._file: logging.Handler | None = None
        self._memory = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._loggers = [logging.getLogger(name) for name in (ROOT, SHOWN)]
        self._loggers[1].propagate = False
        self._loggers[1].setLevel(logging.INFO)
        for logger in self._loggers:
            logger.addHandler(self._memory)

    def open(self, path: Path) -> None:
        """Append to a file from now on; a disk that refuses is told once.

        Args:
            path: of the file.
        """
        try:
            self._file = _JournalFile(path, encoding="utf-8")
        except OSError as fault:
            self.close()
            logging.getLogger(__name__).warning("%s: not written (%s)", path, fault)
            return
        self._file.setFormatter(logging.Formatter(_LINE))
        self._memory.setTarget(self._file)
        for logger in self._loggers:
            logger.removeHandler(self._memory)
            logger.addHandler(self._file)
        self._memory.flush()

    def close(self) -> None:
        """Listen no more."""
        for logger in self._loggers:
            logger.removeHandler(self._memory)
            if self._file is not None:
                logger.removeHandler(self._file)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def start_log(rank: int = 0, *, verbose: bool = False, console: Console | None = None) -> logging.Logger:
    """Send our log to the terminal and return its root; a later call replaces the earlier set-up.

    Args:
        rank: 0 speaks from INFO (DEBUG when verbose); others from WARNING, with "[rank r]" in front.
        verbose: also show debug messages of rank 0.
        console: where to write; None is stderr.
    """
    logger = logging.getLogger(ROOT)
    console = console or Console(stderr=True)
    handler: logging.Handler = _Lines(console)
    if console.is_terminal:
        handler = RichHandler(
            console=console,
            show_path=False,
            markup=False,
            rich_tracebacks=False,
            log_time_format="%H:%M:%S",
            omit_repeated_times=False,
        )
    handler.addFilter(_RankFilter(rank))
    logger.handlers[:] = [handler]
    logger.propagate = False
    quiet = logging.WARNING if rank else logging.INFO
    logger.setLevel(logging.DEBUG if verbose and not rank else quiet)
    logging.getLogger("megatron").setLevel(logging.WARNING)  # else one line per buffer and bucket
    return logger
