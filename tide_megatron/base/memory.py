"""How much memory a device has left for this process, and how much the process has held at most."""

from __future__ import annotations

import dataclasses
import resource

import psutil
import torch


@dataclasses.dataclass
class _Record:
    """What torch's allocator held at most before its own record was begun anew."""

    largest: int = 0


_RECORD = _Record()


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated on a device, in bytes, as far as anybody knows. Not a collective.

    On CUDA that is what the driver has left (other processes count) and what torch's allocator holds without
    using it; on CPU what the system calls available, which all processes of the machine share.
    """
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    left, _ = torch.cuda.mem_get_info(device)
    return left + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory_bytes() -> float:
    """Return the largest memory of this process since it started: allocated on a GPU in use, else resident.

    It asks the allocator's own record, never the device. Loading, evaluations and saves are in it, and what
    `take_peak_bytes` took.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return float(max(_RECORD.largest, torch.cuda.max_memory_allocated()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def take_peak_bytes() -> int:
    """Return the most that torch's allocator held on the GPU since the last call, and begin its record anew.

    The allocator counts on the host, when memory is asked for: nothing waits for the device.
    """
    peak: int = torch.cuda.memory.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["peak"]
    torch.cuda.memory.reset_peak_memory_stats()
    _RECORD.largest = max(_RECORD.largest, peak)
    return peak
