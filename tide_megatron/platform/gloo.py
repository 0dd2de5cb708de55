"""Two collectives of megatron-core that gloo has for equal shares only, for shares of any size.

Ranks that cut the same experts (expert tensor parallelism) exchange as many tokens as the router happened to
send each of them. NCCL gathers and scatters such lists; gloo refuses. Groups of other backends, and calls
without a list of sizes, go through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def allow_uneven_shares() -> None:
    """Replace megatron-core's gather and reduce-scatter along the first axis, on gloo with given sizes."""
    from megatron.core.tensor_parallel import mappings

    mappings._gather_along_first_dim = _instead(mappings._gather_along_first_dim, gather_shares)
    mappings._reduce_scatter_along_first_dim = _instead(
        mappings._reduce_scatter_along_first_dim, reduce_shares
    )


def gather_shares(own: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Return the shares of all ranks behind each other, [sum of sizes, ...].

    Args:
        own: [sizes[rank], ...].
        group: all its ranks call it.
        sizes: first axis of each rank's share, the same list on all ranks.
    """
    room = own.new_zeros(max(sizes), *own.shape[1:])
    room[: len(own)] = own
    rooms = [torch.empty_like(room) for _ in sizes]
    dist.all_gather(rooms, room, group=group)
    return torch.cat([room[:size] for room, size in zip(rooms, sizes, strict=True)])


def reduce_shares(whole: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Return this rank's share of the sum over ranks, [sizes[rank], ...].

    Args:
        whole: [sum of sizes, ...] on every rank; not touched.
        group: all its ranks call it.
        sizes: first axis of each rank's share, the same list on all ranks.
    """
    total = whole.clone()
    dist.all_reduce(total, group=group)
    return torch.split(total, list(sizes))[group.rank()].clone()


def _instead(
    stock: Callable[..., Tensor], ours: Callable[[Tensor, ProcessGroup, Sequence[int]], Tensor]
) -> Callable[..., Tensor]:
    """Call ours where sizes are given to a gloo group of several ranks, else megatron-core's own."""

    def share(
        tensor: Tensor,
        group: ProcessGroup,
        sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if sizes is None or group.size() == 1 or dist.get_backend(group) != "gloo":
            return stock(tensor, group, sizes, use_global_buffer)
        return ours(tensor, group, sizes)

    return share
