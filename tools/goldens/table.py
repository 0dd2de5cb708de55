"""Table models, the models of the recorded steps, and what their files hold besides them.

logits[i] = E[id_i] + P[i] + mean_j C[id_j]: such a model attends to nothing but its own mean, so masks and
positions are compared apart from it, and it sees pads like any other token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goldens.row import Golden
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.side import Side
from tide_megatron.diffusion.views import View
from tide_megatron.head.inputs import HeadInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableModel:
    """A model that is three tables."""

    of_token: Tensor
    """[vocabulary, vocabulary]: E."""
    of_position: Tensor
    """[longest, vocabulary]: P, by place in the whole input, whatever the positions say."""
    of_mean: Tensor
    """[vocabulary, vocabulary]: C."""
    mask_id: int

    @classmethod
    def read(cls, golden: Golden, side: str) -> TableModel:
        """Read the tables and the mask id of `student` or `teacher`."""
        tables = {letter: golden.read(f"{side}_{letter}") for letter in "EPC"}
        mask_id = int(golden.read(f"{side}_mask_id"))
        return cls(of_token=tables["E"], of_position=tables["P"], of_mean=tables["C"], mask_id=mask_id)

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits [samples, length, vocabulary]."""
        mean = self.of_mean[ids].mean(dim=1, keepdim=True)
        return self.of_token[ids] + self.of_position[: ids.shape[1]] + mean


def read_batch(golden: Golden, sides: Mapping[str, Side] | None = None) -> Batch:
    """Read the samples of a file; their noise is injected, so sample ids do not matter."""
    ids, labels = golden.read("in_input_ids"), golden.read("in_labels")
    numbers = torch.zeros(len(ids), dtype=torch.int64)
    return Batch(
        sample_ids=numbers, epochs=numbers, ids=ids, labels=labels, reply_bytes=numbers, sides=sides or {}
    )


def read_context(golden: Golden, key: str) -> Context:
    """Read the block size off a recorded mask: how far the first noised token of a whole sample sees."""
    mask = golden.read(key)[:, 0, 0]
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return Context(kind="block_diffusion", block_size=int(allowed.sum(dim=1).max()))


def additive(allowed: Tensor, lowest: float) -> Tensor:
    """Render a bool mask as fp32: 0 where attention is allowed, else `lowest`."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, lowest)


def picked(logits: Tensor, view: View) -> HeadInput:
    """Pick the view's rows of logits, as hidden rows under an identity head."""
    return HeadInput(hidden=logits.flatten(0, 1)[view.rows], weight=torch.eye(logits.shape[-1]))


def checked(case: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Refuse a case with an option we would silently ignore."""
    if unknown := sorted(set(case) - known):
        raise ValueError(f"case {case.get('tag')!r} has unknown options: {', '.join(unknown)}")
    return case
