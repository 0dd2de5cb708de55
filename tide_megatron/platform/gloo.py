"""gloo as megatron-core needs it: shares of any size, and one polling thread a process.

Ranks that cut the same experts (expert tensor parallelism) exchange as many tokens as the router happened to
send each of them. NCCL gathers and scatters such lists; gloo refuses. Groups of other backends, and calls
without a list of sizes, go through untouched.

torch gives every gloo group a device of its own, whose thread looks for work some 130 times a second whether
there is any or not. A run of several layouts has twenty groups a rank: on a machine with more ranks than
cores the looking alone takes a third of it. Here all groups of a process share one device.

A device listens at the address that the machine's own name leads to, which others on the network may reach.
Where all ranks are on this machine it listens at 127.0.0.1 instead.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from tide_megatron.base.device import gloo_interfaces

_LOOPBACK = "127.0.0.1"
_LIKE_GLOO = ("gloo", "lone_gloo")
"""gloo, and what stands for it in a plan (`platform.lone_world`)."""


def allow_uneven_shares() -> None:
    """Replace megatron-core's gather and reduce-scatter along the first axis, on gloo with given sizes."""
    from megatron.core.tensor_parallel import mappings

    mappings._gather_along_first_dim = _instead(mappings._gather_along_first_dim, gather_shares)
    mappings._reduce_scatter_along_first_dim = _instead(
        mappings._reduce_scatter_along_first_dim, reduce_shares
    )


@dataclasses.dataclass
class _Reach:
    """Who has to reach this process's gloo groups."""

    is_local: bool = False
    """Only processes of this machine."""


_REACH = _Reach()


def reach_from(*, is_local: bool) -> None:
    """Say who has to reach the gloo groups that are made from now on; all ranks of a world say the same.

    Args:
        is_local: all ranks are on this machine.
    """
    _REACH.is_local = is_local


def share_one_device() -> None:
    """Let all gloo groups that are made from now on share one device, hence one polling thread.

    torch has no public way to say so. Where the private one is missing, groups stay as torch makes them:
    slower and equal.
    """
    stock: Any = getattr(distributed_c10d, "ProcessGroupGloo", None)
    options: Any = getattr(stock, "_Options", None)
    if not hasattr(options, "_devices") or hasattr(stock, "shared_devices"):
        return

    class SharedDeviceGloo(stock):  # type: ignore[misc]
        """A gloo group on the process's one device."""

        shared_devices: ClassVar[dict[tuple[str, ...], list[Any]]] = {}
        """By the interfaces that they listen at; several only in a process that sees several worlds."""

        def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
            named = gloo_interfaces()
            key, known = tuple(named or [_LOOPBACK] * _REACH.is_local), SharedDeviceGloo.shared_devices
            if key not in known:
                alone = [stock.create_device(hostname=_LOOPBACK)] if _REACH.is_local else []
                devices = [stock.create_device(interface=name) for name in named] or alone
                known[key] = devices or [stock.create_default_device()]
            chosen = options()
            chosen._devices, chosen._timeout = known[key], timeout
            super().__init__(store, rank, size, chosen)

    distributed_c10d.ProcessGroupGloo = SharedDeviceGloo  # type: ignore[misc]


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
        if sizes is None or group.size() == 1 or dist.get_backend(group) not in _LIKE_GLOO:
            return stock(tensor, group, sizes, use_global_buffer)
        return ours(tensor, group, sizes)

    return share
