"""A short text with some tokens hidden, and what a model folder answers to it in fp32."""

from __future__ import annotations

from pathlib import Path

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View, view_of_parts
from tide_megatron.models.build import build_model
from tide_megatron.models.convert import load_model, read_architecture
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import Options
from tide_megatron.text.tokenizer import Tokenizer

TEXT = "def total(values):\n    return sum(values)  # the sum of all values, 0 where there are none\n"
MOST_TOKENS = 24
CAUSAL = Context(kind="block_causal", block_size=1)
"""Blocks of one token: what an ordinary decoder reads."""


def probe_ids(tokenizer: Tokenizer) -> Tensor:
    """Return the text's first ids with every third one hidden, [1, tokens] int64."""
    ids = torch.tensor([tokenizer.encode(TEXT)[:MOST_TOKENS]])
    ids[:, ::3] = tokenizer.mask_id
    return ids


def probe_view(ids: Tensor, context: Context) -> View:
    """Show the ids in a context, all positions asked for; a clean copy is the same ids."""
    copies = ids.repeat(1, context.parts)
    return view_of_parts(copies, context, None, torch.arange(ids.shape[1], device=ids.device))


@torch.no_grad()
def answers(
    folder: Path, ids: Tensor, contexts: list[Context], groups: ProcessGroupCollection, device: Device
) -> list[Tensor]:
    """Load a folder with our reader and return its logits in each context, [tokens, vocabulary] fp32 on CPU.

    Not a collective, but the process world must have been joined.
    """
    options = Options(device=device, precision=Precision("fp32"))
    model = build_model(read_architecture(folder), groups, options)
    load_model(model, folder)
    ids = ids.to(device.torch_device)
    return [(model.rows(probe_view(ids, context)) @ model.head_weight.T).cpu() for context in contexts]
