"""Run checks, each in a process of its own with a time limit of its own; a part has one too.

A check that hangs, dies or breaks the GPU's context takes nothing else along. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_check.checks import Check
from gpu_check.rows import NotMeasured, Place, Row

PRELOADED = ("tide_megatron.platform", "tide_megatron.train.loop", "gpu_check.assets")
"""What a rehearsal's checks find imported already; beside CUDA every process starts from nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a part is run."""

    place: Place
    """`scratch` is the folder for all; each check gets one of its own in it."""
    logs: Path
    jobs: int
    """Checks at a time."""
    deadline: float
    """time.monotonic() at which the part is over."""
    is_ahead: bool = False
    """One check at a time, but the next one's process imports what it needs meanwhile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A check's process, which waits for a word to begin."""

    check: Check
    process: Any
    pipe: Connection
    log: Path


def run_checks(checks: Sequence[Check], plan: Plan, tell: Callable[[Row], None]) -> list[Row]:
    """Run checks in their order, `jobs` at a time; tell each row as soon as it is known; return all."""
    rows: list[Row] = []
    if plan.is_ahead:
        upcoming = iter(checks)
        waiting = _next(upcoming, plan)
        while waiting is not None:
            current, waiting = waiting, _next(upcoming, plan)
            for row in finish(current, plan):
                rows.append(row)
                tell(row)
        return rows
    lock = threading.Lock()
    with ThreadPoolExecutor(plan.jobs) as pool:
        for done in as_completed([pool.submit(run_check, check, plan) for check in checks]):
            with lock:
                for row in done.result():
                    rows.append(row)
                    tell(row)
    return rows


def _next(checks: Iterator[Check], plan: Plan) -> Started | None:
    check = next(checks, None)
    return None if check is None else start(check, plan)


def run_check(check: Check, plan: Plan) -> list[Row]:
    """Run one check in a fresh process, and end it with all it started when its time is over."""
    return _too_late(check) if time.monotonic() >= plan.deadline else finish(start(check, plan), plan)


def _too_late(check: Check) -> list[Row]:
    over = "the time of its part was over before it began"
    return [Row(check=check.name, verdict="not measured", text=over)]


def start(check: Check, plan: Plan) -> Started:
    """Start a check's process, which imports what all checks need and then waits for `finish`."""
    scratch = plan.place.scratch / check.name.replace(" ", "-")
    scratch.mkdir(parents=True)
    place = dataclasses.replace(plan.place, scratch=scratch)
    if not check.with_engine and plan.place.device == "cuda":
        place = dataclasses.replace(place, transformer_engine=None)
    context = multiprocessing.get_context("spawn" if place.device == "cuda" else "forkserver")
    if place.device == "cpu":
        context.set_forkserver_preload(list(PRELOADED))
    mine, theirs = context.Pipe()
    log = plan.logs / f"{check.name.replace(' ', '-')}.log"
    process = context.Process(target=work, args=(check, place, theirs, log))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return Started(check=check, process=process, pipe=mine, log=log)


def finish(started: Started, plan: Plan) -> list[Row]:
    """Let a started check begin, wait for its rows, and end it."""
    check, process, log = started.check, started.process, started.log
    began = time.monotonic()
    limit = min(check.limit_seconds, plan.deadline - began)
    answer: list[Row] | None = None
    if limit <= 0:
        answer = _too_late(check)
    else:
        with contextlib.suppress(OSError):  # it may have failed already, with an answer
            started.pipe.send("begin")
        with contextlib.suppress(EOFError, OSError):
            if started.pipe.poll(limit):
                answer = started.pipe.recv()
    seconds = time.monotonic() - began
    _end(process.pid)
    process.kill()  # it may not lead its group yet
    process.join()
    if answer is None:
        how = (
            f"no answer in {limit:.0f} s"
            if seconds >= limit
            else f"it died with exit code {process.exitcode}"
        )
        answer = [Row(check=check.name, verdict="failed", text=f"{how}; {last_words(log)}")]
    return [dataclasses.replace(row, seconds=seconds) for row in answer]


def _end(group: int | None) -> None:
    """Kill a check with everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group is not None:
            os.killpg(group, signal.SIGKILL)


def last_words(log: Path) -> str:
    """Return the last lines of a log that say something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return " | ".join(said[-3:])[-600:] or "it said nothing"


def work(check: Check, place: Place, pipe: Connection, log: Path) -> None:
    """Make one check in this fresh process, send its rows, and go without teardown, which could hang."""
    os.setsid()
    file = log.open("w", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = file, file
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.scratch.parent / "compiled")  # shared by all checks
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    if check.with_engine and place.transformer_engine is not None:
        sys.path.insert(0, str(place.transformer_engine))
    try:
        import torch

        from tide_megatron.base.log import start_log

        if place.is_rehearsal:
            torch.set_num_threads(1)
        start_log(0)
        check.load()
        pipe.recv()
        rows = check.rows(place)
    except NotMeasured as reason:
        rows = [Row(check=check.name, verdict="not measured", text=str(reason))]
    except BaseException as error:
        traceback.print_exc()
        rows = [Row(check=check.name, verdict="failed", text=f"{type(error).__name__}: {str(error)[:800]}")]
    file.flush()
    pipe.send(rows)
    os._exit(0)
