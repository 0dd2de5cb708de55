"""What a rank started by `launch/ranks.py` does: settle in, run, report, go.

The rank leads a session of its own, so that Ctrl-C of the terminal reaches only the parent (which passes it
on once), and so that the parent can end the rank together with what it started (megatron-core's checkpoint
writers) in one kill. It also watches its parent: when that is gone, however it went, the rank ends itself;
nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from tide_megatron.base.device import Wanted, read_ranks
from tide_megatron.base.errors import TideError
from tide_megatron.base.log import start_log
from tide_megatron.launch.failure import Failure
from tide_megatron.launch.here import RankFunction, is_echo, run_here
from tide_megatron.launch.signals import release_signals, watch_signals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told."""

    function: RankFunction
    args: tuple[Any, ...]
    wanted: Wanted
    world_size: int
    port: int
    """Where the parent keeps the store."""
    environment: dict[str, str]
    """The parent's variables: a rank forked from a server has the server's."""
    timeout_seconds: float
    """How long a collective waits for a rank that never comes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A rank's regular end, with the function's value (rank 0 only, it may be large)."""

    value: Any


def work(rank: int, job: Job, report: Connection) -> None:
    """Run one rank to its end and send a `Done` or a `Failure`. Called once, in a fresh process."""
    os.setsid()
    threading.Thread(target=_end_with_parent, name="watch-parent", daemon=True).start()
    os.environ.update(
        job.environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent keeps the store: no port has to be guessed
    )
    start_log(rank)
    with watch_signals() as stop:
        release_signals()
        try:
            value = run_here(
                job.function,
                job.args,
                wanted=job.wanted,
                ranks=read_ranks(),
                stop=stop,
                timeout_seconds=job.timeout_seconds,
            )
            report.send(Done(value=value if rank == 0 else None))
        except BaseException as error:
            report.send(_failure(rank, error))
            # No teardown: it could wait for ranks that are stuck, and these should notice the loss at once.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def _failure(rank: int, error: BaseException) -> Failure:
    return Failure(
        rank=rank,
        at_seconds=time.time(),
        text="".join(traceback.format_exception(error)),
        error=error if isinstance(error, TideError) else None,
        is_echo=is_echo(error),
    )


def _end_with_parent() -> None:
    """Wait for the parent's end; then end this rank and everything it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is started by multiprocessing"
    parent.join()
    os.killpg(0, signal.SIGKILL)
