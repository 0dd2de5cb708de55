"""What steps cost, and what it is held against: operations, memory, devices and their peak.

The numerator of MFU: the student is read forward and backward, three times a forward pass, its head too;
every teacher forward, its head once. What is done twice (pads, replicas of a cut mixture's tokens, logits
made again) counts once. All numbers are on the host already: what is masked was listed, lengths came with the
batch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.peak import peak_flops
from tide_megatron.diffusion.batch import Noised
from tide_megatron.models.architecture import body_flops, head_flops
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.student import Student

log = logging.getLogger(__name__)


TRAINED = 3
"""Products of a trained matrix for one of a frozen one: its output, its input's gradient, its own."""


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


def needed_flops(student: Student, teachers: Mapping[str, Teacher], noised: Sequence[Noised]) -> int:
    """Count what this rank's microbatches need of all models. Not a collective; asks no device.

    A rank counts its own samples in full, whichever ranks work on them, so the ranks' numbers add up.
    """
    total = 0
    architecture = student.model.architecture
    for example in noised:
        rows = len(example.row_index[0])
        body = body_flops(architecture, student.context, example.batch.host_lengths, rows)
        total += TRAINED * (body + head_flops(architecture, rows))
        for name, teacher in teachers.items():
            total += _teacher_flops(teacher, example, name)
    return total


def _teacher_flops(teacher: Teacher, noised: Noised, name: str) -> int:
    reading, architecture = noised.reading(name), teacher.model.architecture
    rows = len(reading.index[0])
    context, lengths = teacher.view_builder.reads(reading.host_lengths)
    return body_flops(architecture, context, lengths, rows) + head_flops(architecture, rows)
