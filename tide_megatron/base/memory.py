"""How much memory a device has left for this process, and how much the process has held at most."""

from __future__ import annotations

import resource

import psutil
import torch


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

    It asks the allocator's own record, never the device, and is never reset here: loading, evaluations and
    saves are in it.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
