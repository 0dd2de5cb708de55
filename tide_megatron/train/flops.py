"""What a step needs of this rank's samples, in floating-point operations: the numerator of MFU.

The student is read forward and backward, three times a forward pass, its head too; every teacher forward, its
head once. What is done twice (pads, replicas of a cut mixture's tokens, logits made again) counts once. All
numbers are on the host already: what is masked was listed, lengths came with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.diffusion.batch import Noised
from tide_megatron.models.architecture import body_flops, head_flops
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.cost import Cost
from tide_megatron.train.student import Student

TRAINED = 3
"""Products of a trained matrix for one of a frozen one: its output, its input's gradient, its own."""


def own_cost(student: Student, teachers: Mapping[str, Teacher], noised: Sequence[Noised]) -> Cost:
    """Say what a step needs of this rank, and its memory so far. Not a collective; asks no device."""
    needed = float(needed_flops(student, teachers, noised))
    return Cost(flops=needed, peak_memory_bytes=peak_memory_bytes())


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
    context, lengths = teacher.sight.reads(reading.host_lengths)
    return body_flops(architecture, context, lengths, rows) + head_flops(architecture, rows)
