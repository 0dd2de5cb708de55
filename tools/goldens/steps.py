"""Replays of whole steps of table models: masking, both models' inputs, loss, logged terms, gradient.

A table model is logits[i] = E[id_i] + P[i] + mean_j C[id_j]: it attends to nothing but its own mean, so masks
and positions are compared apart from it; it sees pads like any other token, and the order of the halves. What
one forward over complementary views keeps apart by its mask is kept apart here: each pass reads what the mask
would let it see. Such a case is played in both of our forms, one forward and two, against the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from goldens.chunks import Matrices
from goldens.engine import (
    EVERYBODY,
    Batch,
    Clock,
    Context,
    Loss,
    Noised,
    TeacherTokens,
    View,
    block_diffusion,
    chunk_terms,
    dense_mask,
    evaluate,
    logit_terms,
    make_batch,
    make_side,
    noise,
    num_pairs,
    padded_mask,
    plain_term,
    student_view,
    swap_halves,
    teacher_views,
    trained_share,
)
from goldens.row import Case, Golden, Row

LOWEST = torch.finfo(torch.float32).min


class TableModel:
    """A model that is three tables, and its mask token."""

    def __init__(self, golden: Golden, side: str) -> None:
        """Read the tables of `student` or `teacher`: [vocabulary or longest, vocabulary]."""
        self.of_token, self.of_position, self.of_mean = (golden.read(f"{side}_{letter}") for letter in "EPC")
        self.mask_id = int(golden.read(f"{side}_mask_id"))

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits [samples, length, vocabulary]."""
        mean = self.of_mean[ids].mean(dim=1, keepdim=True)
        return self.of_token[ids] + self.of_position[: ids.shape[1]] + mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What the cases of a file with a teacher have in common."""

    golden: Golden
    batch: Batch
    student: TableModel
    teacher: TableModel
    context: Context
    """The student's."""
    teacher_context: Context
    by_chunk: bool = False
    """Whether chunks are masked whole."""

    def noised(self, tag: str) -> Noised:
        """Mask tokens by the stored uniforms."""
        draws = self.golden.read(f"{tag}_u0"), self.golden.read(f"{tag}_u1")
        return noise(self.batch, draws, by_chunk=self.by_chunk)

    def replay(self, case: Case, losses: Mapping[str, Loss], more: Mapping[str, Tensor]) -> None:
        """Compare everything a case holds; `more` are further logged numbers by key."""
        tag, noised = case["tag"], self.noised(case["tag"])
        view = student_view(noised, self.context, self.student.mask_id)
        # With nothing masked the reference has one pass.
        forms = {1: ", one forward", 2: ", two passes"} if noised.masked.any() else {0: ""}
        for forwards, form in (forms if case["demo"] else {0: ""}).items():
            answer, inputs = self._answer(case, noised, forwards)
            shown = {f"{tag}_teacher{number}_input_ids": ids for number, ids in enumerate(inputs)}
            shown = {f"{tag}_student_input_ids": view.ids, **shown}
            self.golden.compare(f"{tag}{form}: ids", shown, tolerance=0.0)
            leaf = self.student.logits(view.ids).requires_grad_(True)
            clock = Clock(step=case["global_step"], total_steps=case["max_steps"])
            parts = evaluate(leaf.flatten(0, 1)[view.rows], answer, losses, noised, clock)
            parts.objective.backward()
            assert leaf.grad is not None, "the objective depends on the logits"
            numbers = {f"{tag}_{key}": parts.objective for key in ("loss", "log_loss")}
            # Composites and everything aligned are logged with their weights by the reference.
            weighted = "+" in case["mode"] or "_aligned" in case["mode"]
            for name, loss in losses.items():
                logged = parts.sums.get(name, torch.zeros(()))
                numbers[f"{tag}_log_{name}_loss"] = logged * (loss.weight if weighted else 1.0)
            self.golden.compare(f"{tag}{form}", {**numbers, f"{tag}_student_grad": leaf.grad, **more})

    def _answer(self, case: Case, noised: Noised, forwards: int) -> tuple[Tensor, list[Tensor]]:
        """Return the teacher's rows of logits, and what it read in each pass (halves in the case's order)."""
        draws = self.golden.read(f"{case['tag']}_u2") if forwards else None
        views, is_second = teacher_views(noised, self.teacher_context, self.teacher.mask_id, draws, forwards)
        clean_first = case.get("concat_order") == "x0_xt"
        read = [self._read(view, len(noised.batch.ids), clean_first) for view in views]
        rows = read[0][1]
        if len(read) > 1:
            rows = torch.empty(len(is_second), rows.shape[-1])
            rows[~is_second], rows[is_second] = read[0][1], read[1][1]
        return rows, [ids for inputs, _ in read for ids in inputs]

    def _read(self, view: View, samples: int, clean_first: bool) -> tuple[list[Tensor], Tensor]:
        """Return what each pass of a view reads, and the logits at its rows, [rows, vocabulary]."""
        parts = view.ids.split(view.length, dim=1)
        noisy, clean = parts[: view.context.noised_parts], parts[view.context.noised_parts :]
        passes = [passed for part in noisy for passed in part.split(samples)]
        inputs = [torch.cat([*clean, ids] if clean_first else [ids, *clean], dim=1) for ids in passes]
        first = view.length if clean and clean_first else 0
        logits = [self.teacher.logits(ids)[:, first : first + view.length] for ids in inputs]
        if clean:  # side by side, as in the view; nobody asks the clean part
            whole = torch.cat([*logits, torch.full_like(logits[0], torch.nan)], dim=1)
        else:  # one below the other
            whole = torch.cat(logits)
        return inputs, whole.flatten(0, 1)[view.rows]


def replay_plain_steps(path: Path) -> list[Row]:
    """Replay step_bd3lm.npz: cross-entropy alone under every schedule, weight, divisor and shift."""
    golden = Golden(path)
    model, batch = (
        TableModel(golden, "student"),
        make_batch(golden.read("in_input_ids"), golden.read("in_labels")),
    )
    shown = torch.empty(0)
    for case in golden.cases():
        tag, schedule = case["tag"], case["scheduler"]
        noised = noise(batch, (golden.read(f"{tag}_u0"), golden.read(f"{tag}_u1")), schedule)
        view = student_view(noised, block_diffusion(case["block_size"]), model.mask_id)
        losses = {"ce": plain_term(case["loss_weight_type"], case["loss_norm_type"], schedule)}
        leaf = model.logits(view.ids).requires_grad_(True)
        seen = torch.cat([leaf[:, :1], leaf[:, :-1]], dim=1) if case["right_shift_logits"] else leaf
        parts = evaluate(seen.flatten(0, 1)[view.rows], None, losses, noised, Clock())
        parts.objective.backward()
        assert leaf.grad is not None, "the objective depends on the logits"
        golden.compare(tag, {f"{tag}_loss": parts.objective, f"{tag}_grad": leaf.grad})
        shown = view.ids
    golden.compare_exactly("student_input_ids", shown)  # of the last case
    return golden.rows()


def replay_shared_steps(path: Path) -> list[Row]:
    """Replay step_shared.npz: CE with KL, reverse KL, TIDAL and TIDAL + KL, plain and complementary views."""
    golden = Golden(path)
    context = _block_context(golden, "student_attention_mask")
    step = _step(golden, None, context, context)
    mask = dense_mask(context, step.batch.ids.shape[1])
    golden.compare_exactly("student_attention_mask", mask)
    _compare_teacher_masks(golden, mask)
    for case in golden.cases():
        step.replay(case, logit_terms(case), {})
    return golden.rows()


def replay_aligned_steps(path: Path) -> list[Row]:
    """Replay step_aligned.npz: the same losses on position pairs of one vocabulary under two templates.

    A pair is a chunk of one token each, numbered by its student position, which is what keys the split.
    """
    golden = Golden(path)
    mine, theirs = golden.read("in_align_student"), golden.read("in_align_teacher")
    used = torch.arange(mine.shape[1]) < golden.read("in_n_aligned")[:, None]  # the others are padding
    spans = torch.stack([mine, mine + 1, theirs, theirs + 1], dim=2)[used]
    side = make_side(golden.read("in_teacher_input_ids"), spans, used.nonzero(as_tuple=True)[0], mine[used])
    context = _block_context(golden, "teacher_attention_mask_xt_x0")
    step = _step(golden, side, context, context)
    _compare_teacher_masks(golden, padded_mask(context, golden.read("in_teacher_attention_mask").bool()))
    for case in golden.cases():
        tag, masked = case["tag"], torch.tensor(num_pairs(step.noised(case["tag"])))
        total = torch.tensor(side.num_chunks)
        more = {f"{tag}_log_n_aligned_masked": masked, f"{tag}_log_n_aligned_total": total}
        step.replay(case, logit_terms(case), more)
    return golden.rows()


def replay_cross_steps(path: Path) -> list[Row]:
    """Replay step_cross.npz: the CALM family with two tokenizers, chunks masked whole.

    A chunk whose teacher side was cut away stays, without teacher tokens (bug 4; data of ours has none).
    """
    golden = Golden(path)
    matrices = Matrices.read(golden, "in_alignment_matrix")
    side = make_side(golden.read("in_teacher_input_ids"), *matrices.spans())
    context = _block_context(golden, "student_attention_mask")
    step = dataclasses.replace(_step(golden, side, context, EVERYBODY), by_chunk=True)
    length = step.batch.ids.shape[1]
    golden.compare_exactly("student_attention_mask", dense_mask(context, length))
    positions = torch.arange(length).repeat(2).expand(len(step.batch.ids), -1)
    golden.compare_exactly("student_position_ids", positions)
    # Infinities have no difference: both sides are compared as what is allowed.
    allowed = padded_mask(EVERYBODY, golden.read("in_teacher_attention_mask").bool())
    same = torch.equal(_additive(allowed, -torch.inf), golden.read("teacher_attention_mask"))
    golden.add("teacher_attention_mask", "replayed" if same else "failed", note="padded queries see nothing")
    for case in golden.cases():
        losses, clock = chunk_terms(case), Clock(step=case["global_step"], total_steps=case["max_steps"])
        share = trained_share(losses[case["mode"]], clock)
        step.replay(case, losses, {} if share is None else {f"{case['tag']}_log_lambda_train": share})
    return golden.rows()


def _step(golden: Golden, side: TeacherTokens | None, context: Context, teacher_context: Context) -> Step:
    """Read both models and the samples of a file."""
    return Step(
        golden=golden,
        batch=make_batch(golden.read("in_input_ids"), golden.read("in_labels"), side),
        student=TableModel(golden, "student"),
        teacher=TableModel(golden, "teacher"),
        context=context,
        teacher_context=teacher_context,
    )


def _block_context(golden: Golden, key: str) -> Context:
    """Read the block size off a recorded mask: how far the first noised token of a whole sample sees."""
    mask = golden.read(key)[:, 0, 0]
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return block_diffusion(int(allowed.sum(dim=1).max()))


def _compare_teacher_masks(golden: Golden, allowed: Tensor) -> None:
    """Compare the additive masks of both orders of the halves."""
    for order, ours in (("xt_x0", allowed), ("x0_xt", swap_halves(allowed))):
        golden.compare_exactly(f"teacher_attention_mask_{order}", _additive(ours, LOWEST))


def _additive(allowed: Tensor, lowest: float) -> Tensor:
    """Render a bool mask as fp32: 0 where attention is allowed, else `lowest`."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
