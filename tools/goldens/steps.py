"""Replays of steps in which everybody reads the student's tokens: cross-entropy alone, and with KL and TIDAL.

Options that the files leave out have our defaults, which are the paper's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from goldens.arithmetic import swap_halves
from goldens.distilled import TEACHER, Step
from goldens.row import LOSS_TOLERANCE, Golden, Row
from goldens.table import TableModel, additive, checked, picked, read_batch, read_context
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.diffusion.noise import Noiser, NoiseOptions
from tide_megatron.diffusion.views import plain_view
from tide_megatron.head.plain import head_loss
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.rows import Loss, rows_of
from tide_megatron.losses.tidal import Tidal

PLAIN_OPTIONS = {"tag", "scheduler", "loss_weight_type", "loss_norm_type", "right_shift_logits", "block_size"}
SHARED_OPTIONS = {
    "tag",
    "mode",
    "demo",
    "concat_order",
    "shared_vocab_size",
    "taid_timestep_weight",
    "taid_weight",
    "kl_weight",
    "kl_temperature",
    "global_step",
    "max_steps",
}


def replay_plain_steps(path: Path) -> list[Row]:
    """Replay step_bd3lm.npz: cross-entropy alone under every schedule, weight, divisor and shift."""
    golden = Golden(path)
    model, batch = TableModel.read(golden, "student"), read_batch(golden)
    shown = torch.empty(0)
    for case in golden.cases():
        tag = checked(case, PLAIN_OPTIONS)["tag"]
        noiser = Noiser(seed=0, options=NoiseOptions(schedule=case["scheduler"]))
        noised = noiser(batch, (golden.read(f"{tag}_u0"), golden.read(f"{tag}_u1")))
        context = Context(kind="block_diffusion", block_size=case["block_size"])
        view = plain_view(noised, context, model.mask_id)
        loss = CrossEntropy(
            timestep_weight=case["loss_weight_type"],
            normalization=case["loss_norm_type"],
            schedule=case["scheduler"],
        )
        leaf = model.logits(view.ids).requires_grad_(True)
        seen = torch.cat([leaf[:, :1], leaf[:, :-1]], dim=1) if case["right_shift_logits"] else leaf
        parts = head_loss(
            picked(seen, view),
            {},
            {"ce": loss},
            rows_of(noised),
            {"ce": loss.count(noised)},
            Clock(),
        )
        parts.objective.backward()
        assert leaf.grad is not None, "the objective depends on the logits"
        golden.compare(tag, [(f"{tag}_loss", parts.objective), (f"{tag}_grad", leaf.grad)], LOSS_TOLERANCE)
        shown = view.ids
    golden.compare("student_input_ids", [("student_input_ids", shown)], 0.0)  # of the last case
    return golden.rows()


def replay_shared_steps(path: Path) -> list[Row]:
    """Replay step_shared.npz: CE with KL, reverse KL, TIDAL and TIDAL + KL, plain and complementary views."""
    golden = Golden(path)
    batch, context = read_batch(golden), read_context(golden, "student_attention_mask")
    mask = dense_mask(context, batch.ids.shape[1])
    golden.compare("student_attention_mask", [("student_attention_mask", mask)], 0.0)
    for order, ours in (("xt_x0", mask), ("x0_xt", swap_halves(mask))):
        key = f"teacher_attention_mask_{order}"
        golden.compare(key, [(key, additive(ours, torch.finfo(torch.float32).min))], 0.0)
    step = Step(
        golden=golden,
        batch=batch,
        student=TableModel.read(golden, "student"),
        teacher=TableModel.read(golden, "teacher"),
        context=context,
        teacher_context=context,
        noiser=Noiser(seed=0),
    )
    for case in golden.cases():
        step.replay(checked(case, SHARED_OPTIONS), logit_losses(case))
    return golden.rows()


def logit_losses(case: dict[str, Any]) -> dict[str, Loss]:
    """Build the terms of a mode like `taid+kl`, named as the file's log keys name them."""
    common = {"temperature": case["kl_temperature"], "shared_vocab_size": case["shared_vocab_size"]}
    terms: dict[str, Loss] = {"ce": CrossEntropy()}
    for name in (term.removesuffix("_aligned") for term in case["mode"].split("+")):
        if name == "kl":
            terms[name] = Kl(teacher=TEACHER, weight=case["kl_weight"], **common)
        elif name == "reverse_kl":
            terms[name] = ReverseKl(teacher=TEACHER, weight=case["kl_weight"], **common)
        elif name == "taid":
            weight, timestep = case["taid_weight"], case["taid_timestep_weight"]
            terms[name] = Tidal(teacher=TEACHER, weight=weight, timestep_weight=timestep, **common)
        else:
            raise ValueError(f"unknown mode {case['mode']!r}")
    return terms
