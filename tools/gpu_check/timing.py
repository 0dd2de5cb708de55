"""Milliseconds and memory of a call, on a GPU by events, on a CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], device: torch.device, *, calls: int, warm: int = 2) -> float:
    """Return the mean time of a call, after some that warm up (and compile)."""
    for _ in range(warm):
        work()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return 1e3 * (time.perf_counter() - began) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / calls


def peak_gib(work: Callable[[], object], device: torch.device) -> float | None:
    """Return by how much one call lifts the allocated memory, in GiB; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
