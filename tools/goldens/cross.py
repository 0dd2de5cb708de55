"""Replay of step_cross.npz: the CALM family with two tokenizers, plain and complementary views.

Chunks become a `Side` of the batch, one per column of the recorded matrices, and are hidden whole. An empty
student column is padding. A chunk whose teacher side was cut away stays, without teacher tokens (bug 4 of
spec section 9; data of ours has none). Where the reference's ranges overlap, a token may be in chunks of both
halves of the split, or a chunk may be touched by widening another only: there we differ by bug 2.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from goldens.distilled import TEACHER, Step
from goldens.matrices import Matrices
from goldens.row import Golden, Row
from goldens.table import TableModel, additive, checked, read_batch, read_context
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.losses.calm import Calm, CalmTidal, ReverseCalm, ReverseCalmTidal
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import Loss
from tide_megatron.losses.tidal import Mixture

CROSS_OPTIONS = {
    "tag",
    "mode",
    "demo",
    "loss_norm_type",
    "loss_weight_type",
    "taid_timestep_weight",
    "taid_axis_mode",
    "alm_temperature",
    "global_step",
    "max_steps",
}
OVERLAP = "bug 2: duplicate or overlapping ranges (spec 4.1, 3); our chunks are disjoint"
EVERYBODY = Context(kind="bidirectional")


def replay_cross_steps(path: Path) -> list[Row]:
    """Replay step_cross.npz."""
    golden = Golden(path)
    matrices = Matrices(
        student=golden.read("in_alignment_matrix_student"), teacher=golden.read("in_alignment_matrix_teacher")
    )
    context = read_context(golden, "student_attention_mask")
    side = matrices.side(golden.read("in_teacher_input_ids"))
    step = Step(
        golden=golden,
        batch=read_batch(golden, {TEACHER: side}),
        student=TableModel.read(golden, "student"),
        teacher=TableModel.read(golden, "teacher"),
        context=context,
        teacher_context=EVERYBODY,
        noiser=Noiser(seed=0, whole_chunks_of=(TEACHER,)),
    )
    _compare_masks(step)
    for case in golden.cases():
        losses = _losses(checked(case, CROSS_OPTIONS))
        loss = losses[case["mode"]]
        more = []
        if isinstance(loss, Mixture):  # it logs lambda_train whatever the axes are
            clock = Clock(step=case["global_step"], total_steps=case["max_steps"])
            trained = Mixture(growth=loss.growth, initial=loss.initial, maximum=loss.maximum)
            more = [(f"{case['tag']}_log_lambda_train", trained.teacher_share(torch.zeros(()), clock))]
        step.replay(case, losses, more, OVERLAP if overlap_at_work(matrices, step, case) else "")
    return golden.rows()


def _compare_masks(step: Step) -> None:
    """Compare both models' masks and the student's positions with our rendering."""
    golden, length = step.golden, step.batch.ids.shape[1]
    mask = dense_mask(step.context, length)
    golden.compare("student_attention_mask", [("student_attention_mask", mask)], 0.0)
    positions = torch.arange(length).repeat(2).expand(len(step.batch.ids), -1)
    golden.compare("student_position_ids", [("student_position_ids", positions)], 0.0)
    real = golden.read("in_teacher_attention_mask").bool()
    allowed = dense_mask(EVERYBODY, real.shape[1], real.sum(dim=1)) & real[:, None, :, None]
    ours = additive(allowed, -torch.inf)
    # Infinities have no difference: both sides are compared as what is allowed.
    same = torch.equal(ours, golden.read("teacher_attention_mask"))
    golden.add("teacher_attention_mask", "replayed" if same else "failed", note="padded queries see nothing")


def _losses(case: dict[str, Any]) -> dict[str, Loss]:
    """Build the two terms of a case, named as its log keys name them."""
    mode, common = case["mode"], {"teacher": TEACHER, "temperature": case["alm_temperature"]}
    mixed = {"axes": case["taid_axis_mode"], "timestep_weight": case["taid_timestep_weight"]}
    terms: dict[str, Loss] = {
        "ce": CrossEntropy(timestep_weight=case["loss_weight_type"], normalization=case["loss_norm_type"])
    }
    if mode in ("alm", "reverse_alm"):
        terms[mode] = (Calm if mode == "alm" else ReverseCalm)(**common)
    elif mode in ("alm_taid", "reverse_alm_taid"):
        terms[mode] = (CalmTidal if mode == "alm_taid" else ReverseCalmTidal)(**common, **mixed)
    else:
        raise ValueError(f"unknown mode {mode!r}")
    return terms


def overlap_at_work(matrices: Matrices, step: Step, case: dict[str, Any]) -> bool:
    """Say whether a case's noise lets overlapping columns disturb each other."""
    tag = case["tag"]
    widened = step.noised(tag).hidden
    drawn = dataclasses.replace(step, noiser=Noiser(seed=0)).noised(tag).hidden
    touched, later = ((hidden[..., None] & matrices.student).any(dim=1) for hidden in (drawn, widened))
    if not torch.equal(touched, later):
        return True
    if not case["demo"]:
        return False
    first = step.golden.read(f"{tag}_u2") < Complementary(seed=0).share
    halves = [((touched & half)[:, None] & matrices.teacher).any(dim=-1) for half in (first, ~first)]
    return bool((halves[0] & halves[1]).any())
