"""How far a student is from a teacher at the same rows, over heads that are cut by vocabulary.

KL(teacher || student) at temperature 1, and whether both find the same id the most likely. Columns are worked
on tile by tile, as in a training step, so logits of all ids never exist.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.softmax import LOWEST, OnlineSoftmax, merge
from tide_megatron.head.tiles import TiledHead, tiles
from tide_megatron.parallel.exchange import gather_statistics

MOST_IDS = 2**24
"""Ids travel as fp32, which has all whole numbers up to here."""


class RowAgreement(NamedTuple):
    """What a student and a teacher say of the same rows."""

    kl: Tensor
    """[pairs] fp32, nats: KL(teacher || student), both normalised over the compared ids."""
    is_same: Tensor
    """[pairs] bool: the most likely id is the same (of equals, the lowest counts)."""


class _First:
    """The most likely id over the columns seen so far."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.logit = torch.full((rows,), LOWEST, device=device)
        self.id = torch.zeros(rows, device=device)

    def add(self, logits: Tensor, start: int) -> None:
        """Take in the columns of the ids from `start` on, which come in ascending order."""
        if logits.shape[1]:
            highest, place = logits.max(1)
            is_new = highest > self.logit
            self.logit = torch.where(is_new, highest, self.logit)
            self.id = torch.where(is_new, (place + start).float(), self.id)


@torch.no_grad()
def compare_rows(
    student: HeadInput, teacher: HeadInput, ids: int, group: ProcessGroup | None = None
) -> RowAgreement:
    """Compare two models' distributions at rows that predict the same id. Alike on every rank.

    All ranks of the vocabulary group call it together; it makes two exchanges of small numbers a row.

    Args:
        student: [pairs, hidden size] of all the group's pairs, with this rank's columns.
        teacher: likewise; row i belongs to the student's row i.
        ids: so many first ids are compared, which must be the same bytes in both vocabularies.
        group: the vocabulary group; None: one rank has all columns.
    """
    assert ids <= MOST_IDS, f"{ids} ids do not travel as fp32"
    rows, device = len(student.hidden), student.hidden.device
    heads = [TiledHead(head, head.hidden, None) for head in (student, teacher)]
    ours, theirs = OnlineSoftmax(rows, device), OnlineSoftmax(rows, device, has_difference=True)
    firsts = [_First(rows, device) for _ in heads]
    for start, stop in tiles(max(head.num_columns for head in heads), rows, device):
        made = [head.make(start, stop) for head in heads]
        mine, target = (part.below(ids) for part in made)
        assert mine.shape == target.shape, "heads are cut at different ids"
        for first, part, logits in zip(firsts, made, (mine, target), strict=True):
            first.add(logits, part.start)
        ours.add(mine)
        theirs.add(target, mine)
    found = merge([], [ours, theirs], group)
    merged, merged_target = found.softmaxes
    difference = found.differences[1]
    assert difference is not None, "the teacher's softmax was made with one"
    kl = difference - (merged_target.maximum - merged.maximum) - (merged_target.log_sum - merged.log_sum)
    return RowAgreement(kl.clamp_min(0), _are_same(firsts, group))


def _are_same(firsts: list[_First], group: ProcessGroup | None) -> Tensor:
    """Say of each row whether the two models' most likely ids over all ranks' columns are the same."""
    packed = torch.cat([part for first in firsts for part in (first.logit, first.id)])
    one, one_id, other, other_id = gather_statistics(packed, group).chunk(4, dim=1)  # [ranks, rows] each
    return _at_most_likely(one, one_id) == _at_most_likely(other, other_id)


def _at_most_likely(logits: Tensor, ids: Tensor) -> Tensor:
    """Return each row's id on the rank whose logit is the highest, [rows] from [ranks, rows] twice."""
    return ids.gather(0, logits.max(0).indices[None])[0]
