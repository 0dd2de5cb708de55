"""What ranks tell each other about their GPUs before anything else: that no two of them hold the same one.

A rank cannot know by itself. Tasks of srun may each see one GPU that is their own, or all see the same one,
and look alike; NCCL would say so at the first collective, minutes later and in its own words.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.parallel.collectives import gather_objects, own_share

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A rank's GPU."""

    identity: str
    """Equal where NCCL would find the same GPU twice."""
    capability: tuple[int, int]
    name: str


def agree_on_gpus(device: Device) -> Device:
    """Return the device with what every rank's GPU can do. All ranks of the world call it together.

    Where ranks have different GPUs, it is the weakest one's name and capability, so that all choose alike.

    Raises:
        ConfigError: on every rank, when two of them hold the same GPU.
    """
    if device.type == "cpu":
        return device
    assert device.capability is not None, "a chosen GPU has a capability"
    own = Gpu(identity=_identity(device), capability=device.capability, name=device.name)
    agreed = agreed_on(device, gather_objects(own))
    if not agreed.has_bf16:
        log.info("%s has no bf16: precision auto is fp32 in this run", agreed.described)
    return agreed


def agreed_on(device: Device, gpus: Sequence[Gpu]) -> Device:
    """Do the arithmetic of `agree_on_gpus` over the GPUs of all ranks, in their order. Not a collective."""
    for gpu in gpus:
        sharing = [rank for rank, other in enumerate(gpus) if other.identity == gpu.identity]
        if len(sharing) > 1:
            raise ConfigError(
                f"ranks {sharing} were given the same GPU, {gpu.name}, which NCCL refuses "
                '("Duplicate GPU detected"); give each its own (srun --gpus-per-task=1), start fewer ranks, '
                "or set device=cpu"
            )
    weakest = min(gpus, key=lambda gpu: gpu.capability)
    return dataclasses.replace(device, capability=weakest.capability, name=weakest.name)


def _identity(device: Device) -> str:
    """Name the GPU as NCCL tells GPUs apart; both of these variables are set to share one on purpose."""
    uuid = torch.cuda.get_device_properties(device.index).uuid
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") == "1":
        return f"rank {own_share()[0]}"
    return f"{os.environ.get('NCCL_HOSTID', '')} {uuid}"
