"""A teacher: a frozen model in its own layout that answers with final hidden rows, never with logits.

The answer travels as [rows, hidden of the teacher]; the head joins it with the teacher's output weight.
With an expert-parallel-only layout each rank forwards its own microbatch and tokens travel inside the
mixture layers, so nothing is exchanged before the head. Tensor and pipeline layouts will add collect and
deliver here without changing what `answer` returns.
"""

from __future__ import annotations

import torch

from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View, trimmed_view
from tide_megatron.head.plain import HeadInput
from tide_megatron.models.build import TideModel


class Teacher:
    """One frozen model, resident on this rank beside the student."""

    def __init__(self, name: str, model: TideModel, context: Context, mask_id: int) -> None:
        """Keep a model that was built with `trainable=False`."""
        self.name = name
        self.model = model
        self.context = context
        self.mask_id = mask_id

    def view(self, noised: Noised) -> View:
        """Build what this teacher reads: the same hidden positions under its own mask token and context."""
        return trimmed_view(noised, self.context, self.mask_id)

    @torch.no_grad()
    def answer(self, noised: Noised) -> HeadInput:
        """Return the teacher's final hidden states at the hidden rows, with its head weight.

        All ranks of the teacher's layout call it equally often, also when a microbatch has no hidden row:
        their tokens pass through each other's experts.
        """
        return HeadInput(hidden=self.model.rows(self.view(noised)), weight=self.model.head_weight)
