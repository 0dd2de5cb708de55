"""What steps cost, and what it is held against: operations, memory, devices and their peak."""

from __future__ import annotations

import dataclasses
import logging

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.peak import peak_flops

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step cost one rank, or all of them together."""

    flops: float
    """Needed by the mathematics (`train.flops`); of several ranks the sum."""
    peak_memory_bytes: float
    """As `peak_memory_bytes` said before the step's first forward pass; of several ranks the largest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """What a run computes on: as many devices as ranks."""

    number: int
    peak_flops: float | None
    """The most FLOP/s of one of them; None: nobody knows, and there is no MFU."""

    @classmethod
    def of(cls, device: Device, dtype: torch.dtype, number: int, *, told_tflops: float | None) -> Devices:
        """Choose what MFU is held against, and log it. Ranks on other devices are counted as rank 0's.

        Args:
            device: of this rank.
            dtype: the student's; the yardstick of all models' products.
            number: ranks.
            told_tflops: `metrics.peak_tflops`, which goes before the table.
        """
        name, word = device.name or device.described, str(dtype).removeprefix("torch.")
        if told_tflops is not None:
            log.info("MFU: against %g TFLOP/s a device (metrics.peak_tflops)", told_tflops)
            return cls(number=number, peak_flops=told_tflops * 1e12)
        found = peak_flops(name, dtype)
        if found is None:
            log.info("MFU: none, no peak is known of %s in %s; metrics.peak_tflops would tell it", name, word)
        else:
            log.info("MFU: against %g TFLOP/s a device (%s, %s, dense)", found / 1e12, name, word)
        return cls(number=number, peak_flops=found)
