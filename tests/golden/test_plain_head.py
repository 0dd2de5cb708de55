"""The frozen plain way gives the recorded numbers, from nothing but what the files hold.

Logits are masked rows under an identity head. What was masked is read off the recorded inputs, so that
neither our noiser nor our views have a part in it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench.plain_head import ChunkLikelihoods, Microbatch, Model, MovingTarget, plain_head_loss
from goldens.row import LOSS_TOLERANCE, Golden, error_of
from goldens.steps import TableModel
from tide_megatron.diffusion.batch import IGNORED

STEP_TAGS = [f"taid_{views}_{order}" for views in ("std", "demo") for order in ("xt_x0", "x0_xt")]
CROSS_TAGS = [
    f"reverse_alm_{views}_{kind}" for views in ("std", "demo") for kind in ("token", "sequence", "batch")
]


def case_of(golden, tag):
    return next(case for case in golden.cases() if case["tag"] == tag)


def share_of(case, time):
    """Lambda by the formula of the spec, with the defaults that the files leave out."""
    progress = case["step" if "step" in case else "global_step"] / case["max_steps"]
    first, last = case.get("lambda_init", 0.1), case.get("lambda_max", 0.9)
    grown = progress if case.get("lambda_decay") == "linear" else (1 - math.cos(math.pi * progress)) / 2
    trained = first + (last - first) * grown
    axes = case.get("axis_mode", "both")
    return {"both": trained * (1 - time), "training_only": torch.full_like(time, trained)}.get(
        axes, last * (1 - time)
    )


def timestep_weight(kind, time):
    return torch.exp(-((time - 0.5) ** 2) / (2 * 0.15**2)) if kind == "midrange" else torch.ones_like(time)


def model_of(logits):
    return Model(hidden=logits, weight=torch.eye(logits.shape[-1]))


def batch_of(golden, tag, kind="token", weighted=True):
    """Read ids, masked positions and cross-entropy's weights, and the noise levels."""
    ids, labels = golden.read("in_input_ids"), golden.read("in_labels")
    shown = golden.read(f"{tag}_student_input_ids")[:, : ids.shape[1]]
    maskable = labels != IGNORED
    masked = maskable & (shown == golden.read("student_mask_id"))
    time = 1e-3 + (1 - 1e-3) * golden.read(f"{tag}_u0")
    weight = 1 / (time + 1e-6) if weighted else torch.ones_like(time)
    divisor = {
        "token": maskable.sum().clamp_min(1).expand(len(ids)),
        "sequence": maskable.sum(1).clamp_min(1) * len(ids),
        "batch": torch.tensor(len(ids)).expand(len(ids)),
    }[kind]
    token_weight = (weight / divisor)[:, None].expand(ids.shape)
    return Microbatch(ids=ids, masked=masked, token_weight=token_weight), time


def answer_of(golden, tag, length, first=0):
    """Read the teacher's logits; of two passes, each position's from the one that hid it."""
    teacher = TableModel(golden, "teacher")
    answer = None
    for key in golden.keys(f"{tag}_teacher._input_ids"):
        ids = golden.read(key)
        logits = teacher.logits(ids)[:, first : first + length]
        is_hidden = (ids[:, first : first + length] == teacher.mask_id)[..., None]
        answer = logits if answer is None else torch.where(is_hidden, logits, answer)
    return model_of(answer)


def check(golden, tag, batch, answer, term):
    leaf = TableModel(golden, "student").logits(golden.read(f"{tag}_student_input_ids")).requires_grad_(True)
    objective = plain_head_loss(model_of(leaf), answer, batch, term)
    objective.backward()
    assert error_of(objective, golden.read(f"{tag}_loss")) <= LOSS_TOLERANCE
    assert error_of(leaf.grad, golden.read(f"{tag}_student_grad")) <= LOSS_TOLERANCE


@pytest.mark.parametrize("tag", STEP_TAGS)
def test_steps_with_a_moving_target(goldens, tag):
    golden = Golden(goldens / "step_shared.npz")
    case, (batch, time) = case_of(golden, tag), batch_of(golden, tag)
    length = batch.ids.shape[1]
    term = MovingTarget(
        temperature=case["kl_temperature"],
        columns=case["shared_vocab_size"],
        share=share_of(case, time),
        timestep_weight=timestep_weight(case["taid_timestep_weight"], time),
        weight=case["taid_weight"],
    )
    answer = answer_of(golden, tag, length, length if case["concat_order"] == "x0_xt" else 0)
    check(golden, tag, batch, answer, term)


@pytest.mark.parametrize("tag", CROSS_TAGS)
def test_steps_with_chunks(goldens, tag):
    golden = Golden(goldens / "step_cross.npz")
    case = case_of(golden, tag)
    batch, _ = batch_of(golden, tag, case["loss_norm_type"], case["loss_weight_type"] == "scheduler")
    members = golden.read("in_alignment_matrix_student"), golden.read("in_alignment_matrix_teacher")
    is_prompt = golden.read("in_labels") == IGNORED
    touched, refused = ((some[..., None] & members[0]).any(1) for some in (batch.masked, is_prompt))
    teacher_ids = golden.read("in_teacher_input_ids")
    term = ChunkLikelihoods(
        temperature=case["alm_temperature"],
        teacher_ids=teacher_ids,
        members=members,
        active=touched & ~refused,
    )
    check(golden, tag, batch, answer_of(golden, tag, teacher_ids.shape[1]), term)


def test_single_moving_targets(goldens):
    """All cases of taid.npz but those with entropy weights, which the reference's trainer never passes."""
    golden = Golden(goldens / "taid.npz")
    masked, time = golden.read("masked_mask"), golden.read("t")
    student, teacher = golden.read("student_logits"), golden.read("teacher_logits")
    cases = [case for case in golden.cases() if not case["entropy_weights"]]
    assert len(cases) == 48
    for case in cases:
        term = MovingTarget(
            temperature=case["temperature"],
            columns=case["shared_vocab_size"],
            share=share_of(case, time),
            timestep_weight=timestep_weight(case["timestep_weight"], time),
        )
        batch = Microbatch(ids=masked.long() * 0, masked=masked, token_weight=torch.zeros(masked.shape))
        leaf = student.clone().requires_grad_(True)
        plain_head_loss(model_of(torch.cat([leaf, leaf], 1)), model_of(teacher), batch, term).backward()
        assert error_of(leaf.grad, golden.read(f"case{case['id']}_grad")) <= LOSS_TOLERANCE, case
        value = term.loss(student, teacher, batch)
        assert error_of(value, golden.read(f"case{case['id']}_loss")) <= LOSS_TOLERANCE, case
    nothing = Microbatch(ids=masked.long(), masked=masked & False, token_weight=torch.zeros(masked.shape))
    assert term.loss(student, teacher, nothing) == golden.read("emptymask_loss") == 0


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_single_chunk_likelihoods(goldens, temperature):
    golden = Golden(goldens / "alm.npz")
    leaf, tag = golden.read("student_logits").requires_grad_(True), f"reverse_T{temperature}_now"
    ids = golden.read("student_input_ids")
    term = ChunkLikelihoods(
        temperature=temperature,
        teacher_ids=golden.read("teacher_input_ids"),
        members=(golden.read("align_student"), golden.read("align_teacher")),
        active=golden.read("chunk_mask").bool(),
    )
    batch = Microbatch(ids=ids, masked=ids > -1, token_weight=torch.zeros(ids.shape))
    value = term.loss(leaf, golden.read("teacher_logits"), batch)
    value.backward()
    assert error_of(value, golden.read(f"{tag}_loss")) <= LOSS_TOLERANCE
    assert error_of(leaf.grad, golden.read(f"{tag}_grad")) <= LOSS_TOLERANCE


def test_every_case_of_these_losses_is_read(goldens):
    """A file with further cases would have to be replayed too."""
    for name, mode, tags in (
        ("step_shared.npz", "taid", STEP_TAGS),
        ("step_cross.npz", "reverse_alm", CROSS_TAGS),
    ):
        cases = Golden(goldens / name).cases()
        assert {case["tag"] for case in cases if case["mode"] == mode} == set(tags)
    assert "reverse_T5_now_loss" in np.load(goldens / "alm.npz")
