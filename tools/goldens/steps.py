"""Replays of whole loss computations: noise, view, forward of a table model, head loss, gradient.

The table models of the goldens are the only thing built here: logits[i] = E[id_i] + P[i] + mean_j
C[id_j]. The noiser gets the stored uniforms, the view and the losses are ours, and an identity head
turns logits into hidden rows. Options that the files leave out have our defaults, which are the paper's.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens.arithmetic import swap_halves
from goldens.row import LOSS_TOLERANCE, Golden, Row
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.schedule import SCHEDULES
from tide_megatron.diffusion.views import View, plain_view
from tide_megatron.head.plain import HeadInput, HeadLoss, head_loss
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableModel:
    """A model that is three tables; it attends to nothing but its own mean."""

    of_token: Tensor
    """[vocabulary, vocabulary]: E."""
    of_position: Tensor
    """[longest, vocabulary]: P, by place in the whole input, whatever the positions say."""
    of_mean: Tensor
    """[vocabulary, vocabulary]: C."""

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits [samples, length, vocabulary]."""
        mean = self.of_mean[ids].mean(dim=1, keepdim=True)
        return self.of_token[ids] + self.of_position[: ids.shape[1]] + mean


def replay_plain_steps(path: Path) -> list[Row]:
    """Replay step_bd3lm.npz: cross-entropy alone under every schedule, weight, divisor and shift."""
    golden = Golden(path)
    model, mask_id = _table_model(golden, "student"), int(golden.read("student_mask_id"))
    batch = _batch(golden)
    shown = torch.empty(0)
    for case in golden.cases():
        tag = _checked(case, PLAIN_OPTIONS)["tag"]
        noiser = Noiser(seed=0, schedule=SCHEDULES[case["scheduler"]])
        noised = noiser(batch, (golden.read(f"{tag}_u0"), golden.read(f"{tag}_u1")))
        context = Context(kind="block_diffusion", block_size=case["block_size"])
        view = plain_view(noised, context, mask_id)
        loss = CrossEntropy(
            timestep_weight=case["loss_weight_type"],
            normalization=case["loss_norm_type"],
            schedule=case["scheduler"],
        )
        leaf = model.logits(view.ids).requires_grad_(True)
        seen = torch.cat([leaf[:, :1], leaf[:, :-1]], dim=1) if case["right_shift_logits"] else leaf
        parts = head_loss(
            _rows(seen, view),
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
    """Replay step_shared.npz: CE with KL, reverse KL, TIDAL and TIDAL + KL; complementary views wait."""
    golden = Golden(path)
    batch = _batch(golden)
    context = Context(kind="block_diffusion", block_size=_block_size(golden))
    mask = dense_mask(context, batch.ids.shape[1])
    golden.compare("student_attention_mask", [("student_attention_mask", mask)], 0.0)
    for order, ours in (("xt_x0", mask), ("x0_xt", swap_halves(mask))):
        key = f"teacher_attention_mask_{order}"
        additive = torch.zeros_like(golden.read(key)).masked_fill(~ours, torch.finfo(torch.float32).min)
        golden.compare(key, [(key, additive)], 0.0)
    student, teacher = _table_model(golden, "student"), _table_model(golden, "teacher")
    for case in golden.cases():
        tag = _checked(case, SHARED_OPTIONS)["tag"]
        if case["demo"]:
            golden.put_off(tag, golden.keys(re.escape(tag) + "_.*"), "complementary views: issue 3")
        else:
            _replay_shared_case(golden, case, batch, context, (student, teacher))
    return golden.rows()


def _replay_shared_case(
    golden: Golden,
    case: dict[str, Any],
    batch: Batch,
    context: Context,
    models: tuple[TableModel, TableModel],
) -> None:
    """Replay one case without complementary views, in the order of the halves it names."""
    tag, swapped = case["tag"], case["concat_order"] == "x0_xt"
    noised = Noiser(seed=0)(batch, (golden.read(f"{tag}_u0"), golden.read(f"{tag}_u1")))
    view = plain_view(noised, context, int(golden.read("student_mask_id")))
    teacher_view = plain_view(noised, context, int(golden.read("teacher_mask_id")))
    teacher_ids = teacher_view.ids
    if swapped:  # a real model does not care; a table model has its positions counted through both halves
        teacher_ids = teacher_ids.roll(view.length, dims=1)
    leaf = models[0].logits(view.ids).requires_grad_(True)
    theirs = models[1].logits(teacher_ids)
    theirs = theirs.roll(view.length, dims=1) if swapped else theirs
    losses = _losses(case)
    parts: HeadLoss = head_loss(
        _rows(leaf, view),
        {"golden": _rows(theirs, teacher_view)},
        losses,
        rows_of(noised),
        {name: loss.count(noised) for name, loss in losses.items()},
        Clock(step=case["global_step"], total_steps=case["max_steps"]),
    )
    parts.objective.backward()
    assert leaf.grad is not None, "the objective depends on the logits"
    shown = [(f"{tag}_student_input_ids", view.ids), (f"{tag}_teacher0_input_ids", teacher_ids)]
    golden.compare(f"{tag}: ids", shown, 0.0)
    numbers = [(f"{tag}_loss", parts.objective), (f"{tag}_student_grad", leaf.grad)]
    composite = "+" in case["mode"]  # then the reference logs its terms with their weights
    for name, value in parts.sums.items():
        numbers += [(f"{tag}_log_{name}_loss", value * (losses[name].weight if composite else 1.0))]
    numbers += [(f"{tag}_log_loss", parts.objective)]
    golden.compare(tag, numbers, LOSS_TOLERANCE)


def _losses(case: dict[str, Any]) -> dict[str, Loss]:
    """Build the terms of a mode like `taid+kl`, named as the file's log keys name them."""
    common = {"temperature": case["kl_temperature"], "shared_vocab_size": case["shared_vocab_size"]}
    terms: dict[str, Loss] = {"ce": CrossEntropy()}
    for name in case["mode"].split("+"):
        if name == "kl":
            terms[name] = Kl(teacher="golden", weight=case["kl_weight"], **common)
        elif name == "reverse_kl":
            terms[name] = ReverseKl(teacher="golden", weight=case["kl_weight"], **common)
        elif name == "taid":
            weight, timestep = case["taid_weight"], case["taid_timestep_weight"]
            terms[name] = Tidal(teacher="golden", weight=weight, timestep_weight=timestep, **common)
        else:
            raise ValueError(f"unknown mode {case['mode']!r}")
    return terms


def _rows(logits: Tensor, view: View) -> HeadInput:
    """Pick the view's rows of logits, as hidden rows under an identity head."""
    return HeadInput(hidden=logits.flatten(0, 1)[view.rows], weight=torch.eye(logits.shape[-1]))


def _table_model(golden: Golden, side: str) -> TableModel:
    tables = {letter: golden.read(f"{side}_{letter}") for letter in "EPC"}
    return TableModel(of_token=tables["E"], of_position=tables["P"], of_mean=tables["C"])


def _batch(golden: Golden) -> Batch:
    ids, labels = golden.read("in_input_ids"), golden.read("in_labels")
    numbers = torch.zeros(len(ids), dtype=torch.int64)
    return Batch(sample_ids=numbers, epochs=numbers, ids=ids, labels=labels, reply_bytes=numbers)


def _block_size(golden: Golden) -> int:
    """Read the block size off the recorded mask: how far the first noised token sees."""
    return int(golden.read("student_attention_mask")[0, 0, 0].sum())


def _checked(case: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Refuse a case with an option we would silently ignore."""
    if unknown := sorted(set(case) - known):
        raise ValueError(f"case {case.get('tag')!r} has unknown options: {', '.join(unknown)}")
    return case
