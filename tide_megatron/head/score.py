"""How likely one model finds the gold tokens of its rows: no loss, no gradient, one exchange."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.head.parts import HeadInput
from tide_megatron.head.statistics import exchange_statistics, gold_logits


@torch.no_grad()
def score_rows(head: HeadInput, gold: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Score gold ids under a head that may be cut by vocabulary. All ranks of the group call it together.

    Args:
        head: all the group's hidden rows with this rank's columns.
        gold: [rows] int64 ids.
        group: the head group.

    Returns:
        NLL in nats [rows] fp32 and whether the gold id is the most likely [rows] bool (ties count), the
        same on every rank.
    """
    columns = head.columns
    found = exchange_statistics([columns.logits], [gold_logits(columns, gold)], group)
    (normaliser,), (picked,) = found.normalisers, found.golds
    return -normaliser.log_probabilities(picked), picked >= normaliser.maximum
