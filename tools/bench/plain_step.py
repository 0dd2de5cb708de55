"""The plain way through a whole step, frozen: what the reference implementation does, for benches.

Complementary views are two passes of the teacher, one after the other, each over both halves of [x_t ; x_0]
where the teacher reads both; heads over every position of every pass; the second pass's logits overwrite
the first's where it was asked; then the losses of `plain_head` and one backward pass of everything (spec
sections 1, 3 and 9). Bodies, data-parallel wrapper and optimizer are ours, so that only views, heads and
losses differ.

Lighter than the reference, so that no figure rests on it: attention knows its masks (the reference builds a
dense one each step), chunk matrices, noise and the split are given, nothing is logged.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from bench.plain_head import Microbatch, Model, Term, cross_entropy
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import View, view_of_parts
from tide_megatron.models.build import TideModel
from tide_megatron.train.optimizer import Update
from tide_megatron.train.student import Student


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """One microbatch with its noise, as a collator of the reference would hand it over."""

    batch: Microbatch
    student_mask: int
    student_context: Context
    teacher_ids: Tensor
    """[samples, teacher length] int64."""
    teacher_masked: Tensor
    """[samples, teacher length] bool: hidden in one pass or the other."""
    shown: Tensor
    """[samples, teacher length] bool: shown in the first pass, hidden in the second."""
    teacher_lengths: Tensor | None
    """[samples] int64 real tokens where pads would be seen."""
    teacher_mask: int
    teacher_context: Context
    term: Term


def plain_step(student: Student, teacher: TideModel, given: Given, clock: Clock) -> tuple[float, Update]:
    """Make one update from one microbatch; return the objective, and what the update did."""
    student.clear()
    objective = plain_objective(student.model, teacher, given)
    objective.backward()  # the wrapper's hooks add every gradient to its fp32 buffer
    return float(objective.detach()), student.update(clock, finite=True)


def plain_objective(student: TideModel, teacher: TideModel, given: Given) -> Tensor:
    """Return cross-entropy plus the weighted term, an fp32 scalar with graph."""
    batch, term = given.batch, given.term
    answer = _answer(teacher, given)
    noisy = batch.ids.masked_fill(batch.masked, given.student_mask)
    hidden = _every_position(student, [noisy, batch.ids], given.student_context, None)
    logits = Model(hidden=hidden, weight=student.head_weight).logits[:, : batch.ids.shape[1]]
    return cross_entropy(logits, batch) + term.weight * term.loss(logits, answer, batch)


@torch.no_grad()
def _answer(teacher: TideModel, given: Given) -> Tensor:
    """Return the teacher's logits of all its positions, [samples, positions, vocabulary]."""
    first = _pass(teacher, given, given.teacher_masked & ~given.shown)
    second = _pass(teacher, given, given.teacher_masked & given.shown)
    noised = first[:, : given.shown.shape[1]]
    noised[given.shown] = second[:, : given.shown.shape[1]][given.shown]
    return first


def _pass(teacher: TideModel, given: Given, masked: Tensor) -> Tensor:
    """Read one view; a block-diffusion teacher's logits stay in its own format, the mixture's get fp32."""
    parts = [given.teacher_ids.masked_fill(masked, given.teacher_mask)]
    if given.teacher_context.kind == "block_diffusion":
        parts.append(given.teacher_ids)
    hidden = _every_position(teacher, parts, given.teacher_context, given.teacher_lengths)
    logits = functional.linear(hidden, teacher.head_weight)
    return logits if len(parts) == 2 else logits.float()


def _every_position(
    model: TideModel, parts: list[Tensor], context: Context, lengths: Tensor | None
) -> Tensor:
    """Return final hidden states of all positions, [samples, positions, hidden]."""
    ids = torch.cat(parts, dim=1)
    rows = torch.arange(ids.numel(), device=ids.device)
    segments = None if lengths is None else Segments.of_rows(lengths)
    view: View = view_of_parts(ids, context, segments, rows)
    return model.rows(view).unflatten(0, ids.shape)
