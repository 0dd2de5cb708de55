"""Replay of step_aligned.npz: KL, reverse KL and TIDAL on position pairs of one vocabulary, two templates.

A pair is a chunk of one token each, numbered by its student position, which is what keys the split.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from goldens.arithmetic import swap_halves
from goldens.conversation import UNEQUAL
from goldens.distilled import TEACHER, Step
from goldens.row import Golden, Row
from goldens.steps import SHARED_OPTIONS, logit_losses
from goldens.table import TableModel, additive, checked, read_batch, read_context
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import dense_mask
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.side import Side

SCATTER = "bug 11: padded slots unhide teacher position 0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The reference's form of pairs."""

    student: Tensor
    """[samples, slots] int64 positions."""
    teacher: Tensor
    """[samples, slots] int64 positions."""
    used: Tensor
    """[samples, slots] bool: the others are padding."""

    def side(self, ids: Tensor) -> Side:
        """Turn pairs into chunks over teacher tokens `ids`."""
        sample = self.used.nonzero(as_tuple=True)[0]
        mine, theirs = self.student[self.used], self.teacher[self.used]
        return Side(
            ids=ids,
            lengths=torch.full((len(ids),), ids.shape[1]),
            spans=torch.stack([mine, mine + 1, theirs, theirs + 1], dim=1),
            sample=sample,
            number=mine,
        )

    def bug_at_work(self, noised: Noised, teacher_ids: Tensor) -> str:
        """Name the reference bug that spoils this noise's numbers; empty: none does."""
        hidden = noised.hidden.gather(1, self.student) & self.used
        same = noised.batch.ids.gather(1, self.student) == teacher_ids.gather(1, self.teacher)
        if (hidden & ~same).any():
            return UNEQUAL
        at_zero = (hidden & (self.teacher == 0)).any(dim=1)
        return SCATTER if (at_zero & ~self.used.all(dim=1)).any() else ""


def replay_aligned_steps(path: Path) -> list[Row]:
    """Replay step_aligned.npz."""
    golden = Golden(path)
    student, count = golden.read("in_align_student"), golden.read("in_n_aligned")
    slots = Slots(
        student=student,
        teacher=golden.read("in_align_teacher"),
        used=torch.arange(student.shape[1]) < count[:, None],
    )
    teacher_ids = golden.read("in_teacher_input_ids")
    side = slots.side(teacher_ids)
    context = read_context(golden, "teacher_attention_mask_xt_x0")
    step = Step(
        golden=golden,
        batch=read_batch(golden, {TEACHER: side}),
        student=TableModel.read(golden, "student"),
        teacher=TableModel.read(golden, "teacher"),
        context=context,
        teacher_context=context,
        noiser=Noiser(seed=0),
    )
    real = golden.read("in_teacher_attention_mask").bool()
    allowed = dense_mask(context, real.shape[1], real.sum(dim=1)) & real.repeat(1, 2)[:, None, :, None]
    for order, ours in (("xt_x0", allowed), ("x0_xt", swap_halves(allowed))):
        key = f"teacher_attention_mask_{order}"
        golden.compare(key, [(key, additive(ours, torch.finfo(torch.float32).min))], 0.0)
    for case in golden.cases():
        tag, noised = checked(case, SHARED_OPTIONS)["tag"], step.noised(case["tag"])
        more = [
            (f"{tag}_log_n_aligned_masked", torch.tensor(noised.link(TEACHER).num_pairs)),
            (f"{tag}_log_n_aligned_total", torch.tensor(side.num_chunks)),
        ]
        step.replay(case, logit_losses(case), more, slots.bug_at_work(noised, teacher_ids))
    return golden.rows()
