"""A loss of whole logits in plain torch: the oracle of every head; recorded figures are held against it."""

from __future__ import annotations

from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.losses.base import ColumnLoss, LikelihoodLoss, Loss
from tide_megatron.losses.rows import Columns, Distribution, Rows


def gold_log_likelihood(logits: Tensor, gold: Tensor) -> Tensor:
    """Return log softmax(logits)[gold], fp32, over the whole vocabulary.

    Args:
        logits: [..., vocabulary], any float dtype.
        gold: [...] int64 ids.
    """
    logits = logits.float()
    return logits.gather(-1, gold[..., None]).squeeze(-1) - logits.logsumexp(-1)


def loss_values(loss: Loss, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
    """Return the formula of each item, [items] fp32, differentiable in `student`.

    Args:
        loss: of either family.
        student: [rows, vocabulary] logits, any float dtype.
        teacher: [teacher rows, vocabulary] logits, or None for a loss without a teacher.
        rows: what the loss may know.
        clock: where the run stands.
    """
    if isinstance(loss, LikelihoodLoss):
        theirs = None
        if loss.teacher is not None:
            assert teacher is not None, f"{loss} has a teacher"
            theirs = gold_log_likelihood(teacher, rows.link(loss.teacher).gold)
        return loss.from_likelihoods(gold_log_likelihood(student, rows.gold), theirs, rows, clock)
    assert isinstance(loss, ColumnLoss), f"{loss} is of no family"
    assert teacher is not None, f"{loss} has a teacher"
    both = (Columns(logits=logits, vocabulary=logits.shape[-1]) for logits in (student, teacher))
    ours, target = loss.softened(*both, rows, clock)
    return loss.value(Distribution(ours.log_softmax(-1)), Distribution(target.log_softmax(-1)))
