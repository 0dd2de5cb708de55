"""How much memory a device has left for this process."""

from __future__ import annotations

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
