"""Buffers that outlive a call: fresh memory of this size costs a page fault every 4 KiB."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """One buffer for each name, as large as the largest that was asked for."""

    def __init__(self) -> None:
        """Start empty."""
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [numbers] uninitialised; the last buffer of this name is given up."""
        buffer = self._buffers.get(name)
        is_same = buffer is not None and (buffer.dtype, buffer.device) == (dtype, device)
        if buffer is None or not is_same or buffer.numel() < numbers:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(numbers, dtype=dtype, device=device)
        return buffer[:numbers]
