"""Who this process is among the ranks; also true where there is only one and no torch.distributed."""

from __future__ import annotations

import torch.distributed as dist


def own_rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1
