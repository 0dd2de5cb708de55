"""One recorded step with a teacher: noise, both models' views, head loss, gradient.

The noiser and the complementary split get the stored uniforms; sides, views, links and losses are ours. A
case with complementary views is played in both of our forms, one forward and two passes, against the same
numbers. A table model has no mask, so what a joint forward keeps apart by its mask is kept apart here: each
pass reads what the mask would let it see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from goldens.row import LOSS_TOLERANCE, Golden
from goldens.table import TableModel, picked
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Batch, Noised
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.link import Reading
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import (
    View,
    complementary_passes,
    complementary_view,
    plain_view,
    teacher_view,
)
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.plain import head_loss
from tide_megatron.losses.rows import Loss, rows_of

TEACHER = "golden"
"""What the teacher of every file is called."""

Pairs = Iterable[tuple[str, Tensor]]
"""Keys with our values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What the cases of a file have in common."""

    golden: Golden
    batch: Batch
    student: TableModel
    teacher: TableModel
    context: Context
    """The student's."""
    teacher_context: Context
    noiser: Noiser

    def noised(self, tag: str) -> Noised:
        """Hide tokens by the stored uniforms."""
        return self.noiser(self.batch, (self.golden.read(f"{tag}_u0"), self.golden.read(f"{tag}_u1")))

    def replay(
        self, case: dict[str, Any], losses: Mapping[str, Loss], more: Pairs = (), bug: str = ""
    ) -> None:
        """Compare everything a case holds.

        Args:
            case: with `tag`, `demo`, `mode`, `global_step`, `max_steps`; `concat_order` where there is one.
            losses: its terms, named as its log keys name them.
            more: further logged numbers.
            bug: the reference bug that spoils this very case, if one does.
        """
        tag, noised = case["tag"], self.noised(case["tag"])
        demo = case["demo"] and bool(noised.hidden.any())  # with nothing hidden the reference has one pass
        for forwards in (1, 2) if demo else (0,):
            label = {0: tag, 1: f"{tag}, one forward", 2: f"{tag}, two passes"}[forwards]
            answer, inputs = self._answer(case, noised, forwards)
            view = plain_view(noised, self.context, self.student.mask_id)
            shown = [(f"{tag}_student_input_ids", view.ids)]
            shown += [(f"{tag}_teacher{number}_input_ids", ids) for number, ids in enumerate(inputs)]
            self.golden.compare(f"{label}: ids", shown, 0.0, bug)
            numbers = self._numbers(case, losses, (noised, view, answer))
            self.golden.compare(label, [*numbers, *more], LOSS_TOLERANCE, bug)

    def _numbers(
        self, case: dict[str, Any], losses: Mapping[str, Loss], played: tuple[Noised, View, HeadInput]
    ) -> list[tuple[str, Tensor]]:
        """Return loss, logged terms and gradient of one case."""
        noised, view, answer = played
        tag = case["tag"]
        leaf = self.student.logits(view.ids).requires_grad_(True)
        parts = head_loss(
            picked(leaf, view),
            {TEACHER: answer},
            losses,
            rows_of(noised),
            {name: loss.count(noised) for name, loss in losses.items()},
            Clock(step=case["global_step"], total_steps=case["max_steps"]),
        )
        parts.objective.backward()
        assert leaf.grad is not None, "the objective depends on the logits"
        # Composites and everything aligned are logged with their weights by the reference.
        composite = "+" in case["mode"] or "_aligned" in case["mode"]
        logged = [
            (
                f"{tag}_log_{name}_loss",
                parts.sums.get(name, torch.zeros(())) * (loss.weight if composite else 1.0),
            )
            for name, loss in losses.items()
        ]
        whole = [(f"{tag}_{key}", parts.objective) for key in ("loss", "log_loss")]
        return [*whole, (f"{tag}_student_grad", leaf.grad), *logged]

    def _answer(self, case: dict[str, Any], noised: Noised, forwards: int) -> tuple[HeadInput, list[Tensor]]:
        """Return the teacher's rows, and what it read in each pass, in the order of halves of the case."""
        clean_first = case.get("concat_order") == "x0_xt"
        reading = _whole(noised.reading(TEACHER))
        context, mask_id = self.teacher_context, self.teacher.mask_id
        if not forwards:
            view = teacher_view(reading, context, mask_id)
            inputs, rows = self._read(view, len(reading.ids), clean_first)
            return HeadInput(hidden=rows, weight=torch.eye(rows.shape[-1])), inputs
        draws = self.golden.read(f"{case['tag']}_u2").gather(1, reading.unit)
        shown = Complementary(seed=0).shown(noised.batch, reading, draws)
        if forwards == 1:
            view = complementary_view(reading, shown, context, mask_id)
            inputs, rows = self._read(view, len(reading.ids), clean_first)
        else:
            views = complementary_passes(reading, shown, context, mask_id)
            first, second = (self._read(view, len(reading.ids), clean_first) for view in views)
            inputs = [*first[0], *second[0]]
            is_second = shown[reading.asked]
            rows = torch.empty(len(is_second), first[1].shape[-1])
            rows[~is_second], rows[is_second] = first[1], second[1]
        return HeadInput(hidden=rows, weight=torch.eye(rows.shape[-1])), inputs

    def _read(self, view: View, samples: int, clean_first: bool) -> tuple[list[Tensor], Tensor]:
        """Return what each pass of a view reads, and the logits at its rows, [rows, vocabulary].

        A table model counts positions through both halves, so the order of the halves matters to it.
        """
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


def _whole(reading: Reading) -> Reading:
    """Call pads real: a table model sees them, so nothing may be trimmed."""
    return dataclasses.replace(
        reading, lengths=torch.full_like(reading.lengths, reading.ids.shape[1], dtype=torch.int64)
    )
