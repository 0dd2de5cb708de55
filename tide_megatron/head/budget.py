"""How many bytes a slab of the fused head loss may take: the default, what was asked for, what is free.

Arithmetic only: free memory comes in as numbers, so that every case can be tried without a GPU. All ranks
must work with one budget, because all ranks of a vocabulary group make the same slabs; the rank with the
least free memory decides for all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from tide_megatron.base.errors import ConfigError
from tide_megatron.losses.base import ColumnLoss, Loss

log = logging.getLogger(__name__)

MIB = 2**20
BUDGET_MIB = {"cpu": 256, "cuda": 6144}
"""Default by device. CPU: some hundred rows of a 152k vocabulary fit twice, and each further slab reads both
weights and the gradient buffer once more (measured). CUDA: the same reason at its batch sizes; 9,000 rows of
two bf16 heads of 157,184 ids beside the tiles are one slab (arithmetic, tests/unit/head/test_budget.py)."""
_SHARE_OF_FREE = 2
"""The default takes one part in so many of what is free: activations and the optimizer's moments, which the
first step allocates, need the rest."""
_MULTIPLE_MIB = 64
"""A default that was cut is cut to a multiple of this, so that a run that goes on finds the same slabs where
nearly as much is free."""


class HeadShape(NamedTuple):
    """What a head's logits take."""

    vocabulary: int
    dtype: torch.dtype


def row_bytes(kept: Iterable[tuple[HeadShape, float]], ranks: int) -> int:
    """Return the bytes of the logits that one row of the student keeps on a rank.

    Args:
        kept: each head whose logits are read again, with how many of its rows go with one of the student's.
        ranks: over which each head is cut; the widest cut counts, so that all ranks make the same slabs.
    """
    return max(
        1, round(sum(-(-head.vocabulary // ranks) * head.dtype.itemsize * share for head, share in kept))
    )


def kept_heads(
    losses: Mapping[str, Loss], heads: Mapping[str, HeadShape], is_exact: bool
) -> list[tuple[HeadShape, float]]:
    """Return the heads of a run for `row_bytes`, before any row is there: a teacher's row for a row.

    Args:
        losses: the terms by name.
        heads: of `student` and every teacher by name.
        is_exact: whether all products run in fp32.
    """
    kept = {"student", *(loss.teacher for loss in losses.values() if isinstance(loss, ColumnLoss))}
    return [(heads[name]._replace(dtype=torch.float32) if is_exact else heads[name], 1.0) for name in kept]


def settle_budget(
    wanted_mib: int | None, default_mib: int, least_bytes: int, free: Sequence[float], device: str
) -> int:
    """Return the budget of all ranks in bytes. Not a collective: equal numbers give equal answers.

    Args:
        wanted_mib: what the recipe asks for; None: the default, which gives way where less is free.
        default_mib: of this kind of device.
        least_bytes: of what one row needs, tiles included.
        free: bytes that each rank has left beside its models.
        device: what kind of device it is, for the message.

    Raises:
        ConfigError: more is asked for than some rank has left, or not even one row fits there.
    """
    rank = min(range(len(free)), key=free.__getitem__)
    left_mib = int(free[rank]) // MIB
    place = f"rank {rank} has {left_mib} MiB of {device} memory free beside its models"
    if wanted_mib is not None:
        if wanted_mib > left_mib:
            raise ConfigError(
                f"head.budget_mib: {wanted_mib} MiB are more than there is, {place}; use at most {left_mib}, "
                "or leave it out"
            )
        return wanted_mib * MIB
    least_mib = -(-least_bytes // MIB)
    if least_mib > left_mib:
        raise ConfigError(
            f"head.budget_mib: one row of the heads needs {least_mib} MiB, but {place}; use more head.ranks, "
            "more ranks for the models, or a smaller batch.microbatch"
        )
    sensible = left_mib // _SHARE_OF_FREE // _MULTIPLE_MIB * _MULTIPLE_MIB
    budget = min(default_mib, max(sensible, least_mib))
    if budget < default_mib:
        log.warning("head loss: slabs of %d MiB instead of %d: %s", budget, default_mib, place)
    return budget * MIB
