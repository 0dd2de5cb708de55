"""How likely one model finds the gold tokens of its rows: no loss, no gradient, one exchange.

Logits are made tile by tile and forgotten: memory does not grow with rows x vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.head.parts import HeadInput
from tide_megatron.head.running import merge
from tide_megatron.head.tiles import TiledHead, likelihood_statistics


@torch.no_grad()
def score_rows(head: HeadInput, gold: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Score gold ids under a head that may be cut by vocabulary. All ranks of the group call it together.

    Args:
        head: all the group's hidden rows with this rank's columns.
        gold: [rows] int64 ids.
        group: the head group.

    Returns:
        NLL in nats [rows] fp32 and whether the gold id is the most likely [rows] bool (ties count), alike on
        every rank.
    """
    running, picked = likelihood_statistics(TiledHead(head, head.hidden, None), gold)
    found = merge([running], [picked], group)
    (normaliser,), (logits,) = found.normalisers, found.golds
    return -normaliser.log_probabilities(logits), logits >= normaliser.maximum
