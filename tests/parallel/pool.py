"""Persistent pools of gloo ranks: started once per pytest session and world size, by a fork server.

A test sends a module-level function and its arguments; each rank runs it and sends its result back:

    def sum_ranks(start): return int(sum_over(torch.tensor(start + dist.get_rank())))

    def test_sum(pool): assert pool(4).run(sum_ranks, 10) == [46] * 4

The function travels as (module, file, name), arguments and results are pickled. A worker starts with one
thread, the platform prepared and torch.distributed running. When a rank fails, the test fails with the rank
and its traceback; the pool is then thrown away, since its ranks may stand in different collectives, and the
next use starts a new one. What a function leaves behind (groups, models in globals) stays until the pool
ends: leave nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tide_megatron.launch.signals import release_signals
from tide_megatron.launch.supervisor import starting

START_SECONDS, GRACE_SECONDS = 180.0, 2.0


class RankFailure(AssertionError):
    """A function failed, died or hung on some rank; the message holds each rank's traceback."""


class Pool:
    """World of `world_size` gloo processes that run one function at a time, together."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
        """Call `function(*args)` on every rank and return the results in rank order.

        Raises:
            RankFailure: when a rank raised, died, or did not answer in time.
        """
        if not self._processes:
            self._start()
        call = (function.__module__, inspect.getfile(function), function.__qualname__, args)
        for pipe in self._pipes:
            pipe.send(call)
        return self._collect(timeout_seconds)

    def close(self) -> None:
        """End the workers; the next `run` starts new ones."""
        for pipe in self._pipes:
            pipe.close()  # a worker that waits for work ends at this
        for process in self._processes:
            process.join(GRACE_SECONDS)
            _end(process)
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pool_")
        store_file = f"{self._folder.name}/store"
        # As the launcher starts it, whose ranks come from the same server later.
        with starting("cpu") as context:
            for rank in range(self.world_size):
                here, there = context.Pipe()
                # Not daemonic: megatron-core's checkpoint writer starts a process of its own.
                process = context.Process(target=_work, args=(there, rank, self.world_size, store_file))
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
        self._collect(START_SECONDS)

    def _collect(self, timeout_seconds: float) -> list[Any]:
        """Wait for every rank; once one has failed, the others get only a little longer."""
        answers: dict[int, Any] = {}
        faults: dict[int, str] = {}
        deadline = time.monotonic() + timeout_seconds
        while waiting := [p for r, p in enumerate(self._pipes) if r not in answers and r not in faults]:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    self._processes[rank].join(GRACE_SECONDS)
                    ok, value = False, f"the process died, exit code {self._processes[rank].exitcode}"
                if ok:
                    answers[rank] = value
                else:
                    faults[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answers) < self.world_size:
            self._abandon(answers, faults, timeout_seconds)
        return [answers[rank] for rank in range(self.world_size)]

    def _abandon(self, answers: dict[int, Any], faults: dict[int, str], timeout_seconds: float) -> None:
        hung = [r for r in range(self.world_size) if r not in answers and r not in faults]
        for rank in hung:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)  # prints the rank's stack to stderr
        time.sleep(0.2 if hung else 0.0)
        for process in self._processes:
            _end(process)
        self.close()
        told = [f"--- rank {rank} failed:\n{fault}" for rank, fault in sorted(faults.items())]
        if hung:
            why = (
                "after another rank failed" if faults else f"within {timeout_seconds:g} s (stacks on stderr)"
            )
            told.append(f"--- ranks {hung} did not answer {why}")
        raise RankFailure("\n".join(told))


class Pools:
    """The pools of a session, by world size."""

    def __init__(self) -> None:
        self._by_size: dict[int, Pool] = {}

    def __call__(self, world_size: int) -> Pool:
        """Return the pool of this many ranks; its processes start at its first `run`."""
        return self._by_size.setdefault(world_size, Pool(world_size))

    def close(self) -> None:
        """End all pools."""
        for pool in self._by_size.values():
            pool.close()


def _work(pipe: Connection, rank: int, world_size: int, store_file: str) -> None:
    """Run what the parent sends until it closes the pipe: the body of a worker process."""
    os.setsid()  # Ctrl-C stays the parent's, and one kill ends the rank with all that it started
    faulthandler.register(signal.SIGUSR1)
    release_signals()
    try:
        _join_world(rank, world_size, store_file)
        pipe.send((True, None))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            module, file, name, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            answer = (True, _find(module, file, name)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception:  # the result does not pickle
            pipe.send((False, traceback.format_exc()))
    os.killpg(0, signal.SIGKILL)  # no orderly farewell: other ranks may be gone, and gloo would wait for them


def _end(process: Any) -> None:
    """Kill a worker and what it started: megatron-core's checkpoint writer leaves a server behind."""
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _join_world(rank: int, world_size: int, store_file: str) -> None:
    from tide_megatron.platform import start_distributed

    import torch.distributed as dist

    from tide_megatron.base.device import Device, Ranks

    start_distributed(
        Device(type="cpu", index=0, backend="gloo", threads=1),
        Ranks(rank=rank, local_rank=rank, world_size=world_size),
        store=dist.FileStore(store_file, world_size),
    )


def _find(module: str, file: str, names: str) -> Callable[..., Any]:
    """Import the function: our package by name, a test module from its file under the name pytest gave it."""
    if module not in sys.modules and not module.startswith("tide_megatron."):
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec, f"{file} cannot be imported"
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module])
        except BaseException:
            del sys.modules[module]
            raise
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found
