"""Run programs of a model: several at once, each in a process of its own that is gone afterwards."""

from __future__ import annotations

import concurrent.futures
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from tide_megatron.tasks.sandbox.ground import Ground, ground_here, open_process
from tide_megatron.tasks.sandbox.options import Isolation, Limits
from tide_megatron.tasks.sandbox.process import Confined

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_said: set[Ground] = set()


class Sandbox:
    """Confined processes of one kind and with the same limits."""

    def __init__(self, isolation: Isolation = "auto", limits: Limits | None = None) -> None:
        """Find what isolation works here; the log says once which, and what it does not stop.

        Args:
            isolation: see `Isolation`.
            limits: of each process.

        Raises:
            SandboxError: none works, or not the one asked for.
        """
        self.ground, self._limits = ground_here(isolation), limits or Limits()
        if self.ground not in _said:
            _said.add(self.ground)
            log = logging.getLogger(__name__)
            tell = log.warning if self.ground.kind == "none" else log.info
            tell("sandbox: %s; %s", self.ground.kind, self.ground.weakness())

    def open(self) -> Confined:
        """Start a process that waits for programs; a context manager that ends it.

        Raises:
            SandboxError: it does not start.
        """
        return open_process(self.ground, self._limits)


def at_once(work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> list[_Result]:
    """Do something with each of many, some of them at a time, each on a thread that waits for processes.

    Args:
        work: for one item; what it raises is raised here.
        items: all of them.
        workers: at a time.

    Returns:
        The results, in order.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, workers), thread_name_prefix="sandbox") as pool:
        return list(pool.map(work, items))


def workers_here() -> int:
    """Return how many programs to run at a time: this rank's share of the cores it may use."""
    from tide_megatron.base.device import node_share  # brings torch, which a sandbox does not need

    return max(1, len(os.sched_getaffinity(0)) // node_share()[1])
