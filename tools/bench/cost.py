"""What a call costs: CPU and wall seconds of works that take turns, and its high-water mark of memory.

A busy machine slows neighbours in time alike, so works are timed in turns and medians compared. Memory is a
matter of one fresh process for each measurement: allocators keep what an earlier call freed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one call."""

    cpu: float
    """Of all threads of this process, user and system."""
    wall: float


def spent(work: Callable[[], object]) -> Cost:
    """Time one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def median_costs(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """Time all works in turns, after one turn that warms up.

    Args:
        works: what is timed, by name.
        rounds: how many turns count.

    Returns:
        Medians over the turns, of CPU and of wall seconds apart.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            cost = spent(work)
            print(f"{name}, turn {turn}: {cost.cpu:.2f} CPU s, {cost.wall:.2f} s", file=sys.stderr)
            if turn:
                costs[name].append(cost)
    return {
        name: Cost(
            cpu=statistics.median(cost.cpu for cost in found),
            wall=statistics.median(cost.wall for cost in found),
        )
        for name, found in costs.items()
    }


def peak_bytes(work: Callable[[], Value]) -> tuple[int, Value]:
    """Return how far one call lifts the high-water mark above what stands before it, and its value.

    Linux only. Call it in a process of its own (`apart`).
    """
    RESET.write_text("5")  # the mark falls to what is resident now
    before = resident("VmRSS")
    value = work()
    return resident("VmHWM") - before, value


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run an importable function in a fresh process and return its value; arguments travel pickled.

    The calling script must guard its entry with `if __name__ == "__main__":`.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def machine() -> dict[str, object]:
    """Name what was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name") or platform.processor(),
        "cpu_family": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "bf16_instructions": [flag for flag in flags if "bf16" in flag],
        "torch": torch.__version__,
        "load": [round(value, 1) for value in _load()],
    }


def _load() -> tuple[float, ...]:
    """Read how many processes want a core, over 1, 5 and 15 minutes."""
    path = Path("/proc/loadavg")
    return tuple(float(word) for word in path.read_text().split()[:3]) if path.is_file() else ()


def resident(field: str) -> int:
    """Read one of this process's sizes, in bytes."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}: memory can be measured on Linux only")
