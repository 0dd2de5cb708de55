"""Start and stop the process world: torch.distributed, Megatron's own global state, and the seeds.

megatron-core needs `initialize_model_parallel` once (a memory buffer and a few global groups that it falls
back to), so this is the one file that touches `parallel_state`. It is called with the default layout: all
ranks data-parallel, like the student. Every layout of ours travels in explicit collections
(`parallel.groups`), never through that global state.

On CUDA the world gets NCCL for GPU tensors and gloo for host values, so that small agreements cost no GPU
synchronisation. Left out: starting processes (`launch/`).
"""

from __future__ import annotations

import datetime
import random

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore, Store

from tide_megatron.base.device import Device, Ranks

_BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


def start_distributed(
    device: Device,
    ranks: Ranks | None = None,
    *,
    seed: int = 0,
    timeout_seconds: float = 600.0,
    store: Store | None = None,
) -> None:
    """Join the process world, set threads and device, initialise Megatron's state, and seed every generator.

    Args:
        device: what `choose_device` chose.
        ranks: this process's place; None makes a world of one rank that needs no address or port.
        seed: the same on every rank; the noise of training does not use these generators.
        timeout_seconds: how long a collective waits for a rank that never comes.
        store: a rendezvous that exists already (tests); else rank 0's address and port are used.

    Every rank of the run must call it once, before any model or group is made.
    """
    torch.set_num_threads(device.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.index)
    if ranks is None:
        ranks, store = Ranks(rank=0, local_rank=0, world_size=1), store or HashStore()
    dist.init_process_group(
        backend=_BACKENDS[device.backend],
        init_method=None if store else f"tcp://{ranks.address}:{ranks.port}",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    seed_all(seed)


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
