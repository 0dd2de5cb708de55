"""Start and stop the process world: torch.distributed, Megatron's own global state, and the seeds.

megatron-core needs `initialize_model_parallel` once (a memory buffer and a few global groups that it falls
back to), so this is the one file that touches `parallel_state`. It is called with the default layout: all
ranks data-parallel, like the student. Every layout of ours travels in explicit collections
(`parallel.groups`), never through that global state.

On CUDA the world gets NCCL for GPU tensors and gloo for host values, so that small agreements cost no GPU
synchronisation; groups of some ranks get NCCL alone, unless they exchange host values too, for gloo connects
every rank with every other. All of them wait equally long for a rank that never comes. Left out: starting
processes (`launch/`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import random
import weakref
from collections.abc import Iterator, Sequence

from tide_megatron.platform.gloo import reach_from

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed import ProcessGroup

from tide_megatron.base.device import Device, Ranks, is_loopback

TIMEOUT_SECONDS = 600.0
"""How long a collective waits for a rank that never comes, where a run does not say."""
_BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _World:
    """What the groups of a world take over from it."""

    backend: str
    timeout: datetime.timedelta


# It dies with the world, so the next one never meets stale choices.
_WORLDS: weakref.WeakKeyDictionary[ProcessGroup, _World] = weakref.WeakKeyDictionary()


def start_distributed(
    device: Device,
    ranks: Ranks | None = None,
    *,
    seed: int = 0,
    timeout_seconds: float = TIMEOUT_SECONDS,
    store: Store | None = None,
    backend: str | None = None,
) -> None:
    """Join the process world, set threads and device, initialise Megatron's state, and seed every generator.

    Args:
        device: what `choose_device` chose.
        ranks: this process's place; None makes a world of one rank that needs no address or port.
        seed: the same on every rank; the noise of training does not use these generators.
        timeout_seconds: how long a collective of the world or of any group waits for a rank that never comes.
        store: a rendezvous that exists already (tests); else rank 0's address and port are used.
        backend: by what all groups talk, in torch's words (`platform.lone_world`); None: the device's.

    Every rank of the run must call it once, before any model or group is made.
    """
    torch.set_num_threads(device.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.index)
    if ranks is None:
        ranks, store = Ranks(rank=0, local_rank=0, world_size=1), store or HashStore()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    reach_from(is_local=ranks.world_size == 1 or is_loopback(ranks.address))
    dist.init_process_group(
        backend=backend or _BACKENDS[device.backend],
        init_method=None if store else f"tcp://{ranks.address}:{ranks.port}",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    world = dist.group.WORLD
    assert world is not None, "it was joined just now"
    _WORLDS[world] = _World(backend=backend or device.backend, timeout=timeout)
    with _device_groups(backend or device.backend):
        parallel_state.initialize_model_parallel(
            create_gloo_process_groups=False, distributed_timeout_minutes=timeout_seconds / 60
        )
    seed_all(seed)


@contextlib.contextmanager
def _device_groups(backend: str) -> Iterator[None]:
    """Let megatron-core make its own groups for device tensors alone: it takes the world's backends else."""
    stock = parallel_state.create_group
    chosen = subgroup_backend(backend, for_host_values=False)
    parallel_state.create_group = functools.partial(stock, backend=chosen)
    try:
        yield
    finally:
        parallel_state.create_group = stock


def subgroup_backend(backend: str, *, for_host_values: bool) -> str:
    """Say by what the ranks of a group talk, in torch's words.

    Args:
        backend: the device's (`Device.backend`), or the one that was named in its place.
        for_host_values: whether they exchange Python values or CPU tensors over the group too.
    """
    return _BACKENDS.get(backend, backend) if for_host_values else backend


def group_backend(*, for_host_values: bool) -> str:
    """Say by what a group of this world's ranks talks; see `subgroup_backend`. Not a collective."""
    world = dist.group.WORLD
    assert world is not None, "groups are made after start_distributed"
    return subgroup_backend(_WORLDS[world].backend, for_host_values=for_host_values)


def new_group(ranks: Sequence[int], *, for_host_values: bool = False) -> ProcessGroup | None:
    """Make a group of some ranks with the world's device and timeout; None for a rank outside it.

    Every rank of the world must call it, members or not.

    Args:
        ranks: of the world, ascending.
        for_host_values: as for `subgroup_backend`.
    """
    world = dist.group.WORLD
    assert world is not None, "groups are made after start_distributed"
    backend = group_backend(for_host_values=for_host_values)
    group = dist.new_group(list(ranks), timeout=_WORLDS[world].timeout, backend=backend)
    return group if isinstance(group, ProcessGroup) else None


def seed_all(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tracker alike on every rank, so that fresh weights agree."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=0, ep_rank=0, etp_rank=0)


def stop_distributed() -> None:
    """Leave the process world; safe to call when it was never joined or is left already.

    Every rank must call it, after its last collective.
    """
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
