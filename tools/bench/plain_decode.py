"""Block sampling the reference's way, written plainly over the same model: what `decode.py` compares with.

For every block the whole prefix is read again (as there, with logits of all its positions); at every step the
prefix's keys and values are copied and joined with the block's own in each layer, the logits of the whole
block are made, argmax and a full softmax taken of them, and the surest tokens found row by row. Rows that
have ended go on until all have.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.diffusion.denoise import transfer_counts
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.schedule import Linear
from tide_megatron.diffusion.views import View
from tide_megatron.models.attention import Dense, PassAttention
from tide_megatron.models.build import TideModel


@dataclasses.dataclass
class Joined:
    """Keys and values by layer, joined anew in every pass: `attention.Memory`."""

    past: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    keeps: bool = False

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Join what is there with this pass's."""
        if layer in self.past:
            old_key, old_value = self.past[layer]
            key, value = torch.cat([old_key, key]), torch.cat([old_value, value])
        if self.keeps:
            self.past[layer] = key, value
        return key, value


@torch.no_grad()
def decode_plainly(
    model: TideModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    block: int,
    mask_id: int,
    pad_id: int,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """Return the new tokens of all prompts, greedy and one a step, without cutting them at an end token."""
    length = -(-max(map(len, prompts)) // block) * block
    ids = torch.tensor([[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    steps = math.ceil(new_tokens / math.ceil(new_tokens / block))
    done = [False] * len(prompts)
    for first in range(length, length + new_tokens, block):
        if all(done):
            break
        end = min(first + block, length + new_tokens)
        past = Joined(keeps=True)
        _logits(model, ids, 0, block, pad_id, past)
        past.keeps = False
        ids = torch.cat([ids, torch.full((len(ids), end - first), mask_id)], dim=1)
        counts = transfer_counts(Linear(), [end - first] * len(ids), steps)
        for step in range(counts.shape[1]):
            logits = _logits(model, ids, first, block, pad_id, copy.deepcopy(past))
            token = logits.argmax(dim=-1)
            confidence = torch.softmax(logits, dim=-1).gather(-1, token[..., None])[..., 0]
            masked = ids[:, first:] == mask_id
            confidence = torch.where(masked, confidence, torch.full_like(confidence, -torch.inf))
            for row in range(len(ids)):
                chosen = torch.topk(confidence[row], int(counts[row, step].item())).indices
                ids[row, first + chosen] = token[row, chosen]
        done = [
            ended or bool(end_ids & set(row[first:end].tolist()))
            for ended, row in zip(done, ids, strict=True)
        ]
    return [row[length:].tolist() for row in ids]


def _logits(model: TideModel, ids: Tensor, first: int, block: int, pad_id: int, past: Joined) -> Tensor:
    """Return fp32 logits [rows, tokens, vocabulary] of the tokens from `first` on."""
    valid = ids != pad_id
    positions = (valid.long().cumsum(dim=1) - 1).clamp_min(0)
    slots = torch.arange(ids.shape[1])
    allowed = slots[first:, None] // block >= slots // block
    mask = allowed & valid[:, None, :] | (slots == slots[first:, None])
    fed = ids[:, first:]
    view = View(
        ids=fed,
        positions=positions[:, first:],
        context=Context(kind="block_causal", block_size=block),
        length=fed.shape[1],
        segments=None,
        rows=torch.arange(fed.numel()),
    )
    hidden = model.rows(view, PassAttention(kernel=Dense(mask=mask[:, None]), memory=past))
    return (hidden @ model.head_weight.T).float().view(*fed.shape, -1)
