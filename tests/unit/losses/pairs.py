"""Small logits of a student and a teacher for the tests of single formulas."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.base import Loss
from tide_megatron.losses.rows import Rows

CLOCK = Clock(step=37, total_steps=100)


def pair(rows: int = 5, vocabularies: tuple[int, int] = (9, 9), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return student logits with gradient and teacher logits, [rows, vocabulary] fp32."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, size, generator=generator) * 3 for size in vocabularies)
    return student.requires_grad_(True), teacher


def rows_for(student: Tensor, seed: int = 1) -> Rows:
    """Describe rows of three samples at different noise levels."""
    generator = torch.Generator().manual_seed(seed)
    count = len(student)
    return Rows(
        gold=torch.randint(student.shape[1], (count,), generator=generator),
        sample=torch.arange(count) % 3,
        time=torch.tensor([0.2, 0.55, 0.9]),
        maskable=torch.full((3,), count),
    )


def has_teacher(kind: type[Loss]) -> bool:
    """Say whether losses of a kind listen to a teacher."""
    return any(field.name == "teacher" for field in dataclasses.fields(kind))
