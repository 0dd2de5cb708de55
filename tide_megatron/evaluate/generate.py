"""Text from a model: a plain block sampler, enough to see text (fast decoding comes later).

Blocks are counted from the first token of the prompt, as in training; the block in which the prompt ends
starts with its visible tokens. Each step reads the whole sequence so far under the block-causal rule, which
gives a noised block exactly what training gave it: the clean blocks before and all of itself. A
bidirectional model gets the whole canvas as one block.

Left out: caching, guidance, temperatures, batches (prompts of different lengths would move block borders).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.denoise import commit_most_confident, transfer_counts
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.schedule import Linear
from tide_megatron.diffusion.views import View
from tide_megatron.evaluate.model_folder import open_model
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.models.build import TideModel
from tide_megatron.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to fill in a reply."""

    new_tokens: int = 256
    """Longest reply, in tokens."""
    steps: int = 256
    """Denoising steps for `new_tokens`; each block gets its share."""

    def __post_init__(self) -> None:
        """Refuse empty replies."""
        for name in ("new_tokens", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive")


def answer_prompts(
    folder: Path,
    prompts: Sequence[str],
    context: Context,
    sampler: Sampler,
    mask: str | None = None,
    arithmetic: Arithmetic | None = None,
    *,
    device: Device,
    stop: StopFlag,
) -> list[str]:
    """Load a model on this rank and answer prompts one after the other; a rank function for `run_ranks`.

    Args:
        folder: config.json, safetensors and tokenizer.json with a chat template.
        prompts: one user message each.
        context: the model's training context.
        sampler: length and steps.
        mask: the mask token that it was trained with; None: the one its folder names.
        arithmetic: see `open_model`.
        device: where to compute.
        stop: after a stop signal no further prompt is begun.

    Returns:
        The replies; fewer than prompts when stopped.
    """
    tokenizer = Tokenizer.load(folder, mask=mask)
    asked = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    model = open_model(folder, device, arithmetic)
    rows = model.architecture.vocabulary
    if tokenizer.vocabulary_size > rows:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size} ids, its model {rows} rows; give the "
            "tokenizer and mask token it was trained with"
        )
    spare = [token for token in range(rows) if not tokenizer.has(token)]
    replies: list[str] = []
    with stop.finishing("the reply under way is the last one", is_last=True):
        for ids in asked:
            if stop.requested:
                break
            reply = generate(
                model, context, ids, sampler, mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id, spare=spare
            )
            replies.append(tokenizer.decode(reply))
    return replies


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return a prompt's tokens under the chat template.

    Raises:
        DataError: the tokenizer has no chat template, or the prompt holds the mask token.
    """
    if tokenizer.chat is None:
        raise DataError(
            f"{tokenizer.name} has no chat template: add chat_template.jinja beside tokenizer.json"
        )
    text = tokenizer.chat.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = tokenizer.encode(text)
    if tokenizer.mask_id in ids:
        mask = tokenizer.special_tokens["mask_token"]
        raise DataError(
            f"prompt {prompt!r}: contains the mask token {mask}, which only stands for what is to be filled "
            "in: remove it from the prompt"
        )
    return ids


@torch.no_grad()
def generate(
    model: TideModel,
    context: Context,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    mask_id: int,
    eos_id: int,
    spare: Sequence[int] = (),
) -> list[int]:
    """Return the reply's token ids, up to but without the first end token.

    Args:
        model: any model of this package; under expert parallelism all ranks call it with the same prompt.
        context: the model's training context; its block size is the sampler's.
        prompt: token ids that stay as they are.
        sampler: length and steps.
        mask_id: the model's mask token; it is never committed.
        eos_id: a block that contains it ends the reply.
        spare: further ids that are never committed: rows of a padded vocabulary that no token has.
    """
    device = model.head_weight.device
    length = len(prompt) + sampler.new_tokens
    block = length if context.kind == "bidirectional" else context.block_size
    reading = Context(kind="block_causal", block_size=block)
    never = torch.tensor([mask_id, *spare], device=device)
    ids = torch.tensor([*prompt, *[mask_id] * sampler.new_tokens], device=device)[None]
    steps = max(1, math.ceil(sampler.steps * min(block, sampler.new_tokens) / sampler.new_tokens))
    for first in range(len(prompt) // block * block, length, block):
        end = min(first + block, length)
        hidden = torch.arange(first, end, device=device)[None] >= len(prompt)
        for count in transfer_counts(Linear(), [int(hidden.sum())], steps)[0]:
            logits = _block_logits(model, reading, ids[:, :end], first)
            logits[..., never] = -torch.inf
            ids[:, first:end], hidden = commit_most_confident(
                logits, ids[:, first:end], hidden, count[None].to(device)
            )
        reply = ids[0, len(prompt) : end].tolist()
        if eos_id in reply:
            return reply[: reply.index(eos_id)]
    return ids[0, len(prompt) :].tolist()


def _block_logits(model: TideModel, reading: Context, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Return fp32 logits [1, block, vocabulary] of the positions from `first` on."""
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device)
    view = View(
        ids=ids,
        positions=positions[None],
        context=reading,
        length=length,
        segments=None,
        rows=positions[first:],
    )
    return (model.rows(view) @ model.head_weight.T).float()[None]
