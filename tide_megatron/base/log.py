"""One log for all ranks: rank 0 tells the story, the others speak up only when something is wrong.

Modules write to `logging.getLogger(__name__)` and never configure anything; `start_log` is called once per
process, by whatever starts ranks. Lines go to stderr, so that stdout stays free for what a command prints.
Left out: metrics and progress (`train.metrics`), which are data and not prose.
"""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

ROOT = "tide_megatron"


class _RankFilter(logging.Filter):
    """Put the rank before the messages of every rank but the first."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = f"[rank {rank}] " if rank else ""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._prefix + record.getMessage(), ()
        return True


def start_log(rank: int = 0, *, verbose: bool = False, console: Console | None = None) -> logging.Logger:
    """Send our log to the terminal and return its root; a later call replaces the earlier set-up.

    Args:
        rank: 0 speaks from INFO (DEBUG when verbose); others from WARNING, with "[rank r]" in front.
        verbose: also show debug messages of rank 0.
        console: where to write; None is stderr.
    """
    logger = logging.getLogger(ROOT)
    handler = RichHandler(
        console=console or Console(stderr=True),
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
