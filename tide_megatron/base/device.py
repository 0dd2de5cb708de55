"""Choose the device and read which rank this process is: the one place that looks at the machine.

Environment variables choose machines, never mathematics, and only this file and `launch/` read them.
Everything above gets a `Device` and a `Ranks` as plain values. Left out: process groups
(`platform.distributed`) and the attention kernel (`models.attention`), which depends on the model as well.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import Literal

import torch

from tide_megatron.base.errors import ConfigError, nearest

Wanted = Literal["auto", "cpu", "cuda"]

# (rank, local rank, world size, address, port) under torchrun, then under srun.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")
_LOCALHOST, _DEFAULT_PORT = "127.0.0.1", 29500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """Hold the place of this process among the processes of the run.

    `local_rank` counts within one machine and picks the GPU; `address` and `port` are where rank 0 listens.
    """

    rank: int
    local_rank: int
    world_size: int
    address: str = _LOCALHOST
    port: int = _DEFAULT_PORT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Where this process computes and how it talks: chosen once, logged once, handed down."""

    type: Literal["cpu", "cuda"]
    index: int
    backend: Literal["gloo", "nccl"]
    threads: int

    @property
    def torch_device(self) -> torch.device:
        """Return the device in torch's words."""
        return torch.device("cpu") if self.type == "cpu" else torch.device("cuda", self.index)

    def facts(self) -> dict[str, str | int]:
        """Describe device and software for the log and for `tide doctor`."""
        name = torch.cuda.get_device_name(self.index) if self.type == "cuda" else platform.machine()
        return {
            "device": str(self.torch_device),
            "name": name,
            "backend": self.backend,
            "threads": self.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


def read_ranks() -> Ranks | None:
    """Read this process's place from torchrun's variables, or from SLURM's; None when neither started it.

    Raises:
        ConfigError: when a variable of the set is missing, not a number, or the rank is outside the world.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _ranks_from(_TORCHRUN)
    # An interactive `salloc` shell has SLURM_NTASKS too; only a step that srun started has a step id.
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        return _ranks_from(_SLURM)
    return None


def _ranks_from(names: tuple[str, str, str, str, str]) -> Ranks:
    rank, local_rank, world_size = (_number(name) for name in names[:3])
    port = _number(names[4]) if names[4] in os.environ else _DEFAULT_PORT
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]}={rank} is outside a world of {names[2]}={world_size} ranks; "
            "start with torchrun or srun"
        )
    address = os.environ.get(names[3], _LOCALHOST)
    return Ranks(rank=rank, local_rank=local_rank, world_size=world_size, address=address, port=port)


def _number(name: str) -> int:
    text = os.environ.get(name)
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"environment variable {name}={text!r} is not a number; start the run with torchrun or srun, "
            "which set RANK, LOCAL_RANK and WORLD_SIZE"
        ) from None


def choose_device(wanted: Wanted = "auto") -> Device:
    """Choose device, backend and thread count for this process.

    Args:
        wanted: `auto` takes CUDA where it works; `cpu` and `cuda` insist.

    Raises:
        ConfigError: for an unknown word, or for `cuda` on a machine without it.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: {wanted!r} is unknown; {nearest(str(wanted), ('auto', 'cpu', 'cuda'))}")
    ranks = read_ranks()
    local_rank = ranks.local_rank if ranks else 0
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device: 'cuda' was asked for but torch finds no usable GPU; use 'cpu' or 'auto'")
    if has_cuda and wanted != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
                "start at most one process per GPU"
            )
        return Device(type="cuda", index=local_rank, backend="nccl", threads=_threads(ranks))
    return Device(type="cpu", index=0, backend="gloo", threads=_threads(ranks))


def _threads(ranks: Ranks | None) -> int:
    """Return OMP_NUM_THREADS where set, else this machine's cores shared among its processes."""
    if "OMP_NUM_THREADS" in os.environ:
        return max(1, _number("OMP_NUM_THREADS"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or (ranks.world_size if ranks else 1))
    return max(1, len(os.sched_getaffinity(0)) // local_size)
