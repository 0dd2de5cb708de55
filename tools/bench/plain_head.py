"""The plain way to a head loss, frozen: what the reference implementation does, for benches to compare with.

Heads over every position of both models, fp32 copies of all logits, cross-entropy over every position
through a transposed view, hidden rows picked after the head and copied again before each softmax,
likelihoods of all positions where only members of chunks matter, gradients by autograd (spec sections 1, 2
and 9). Nothing here may become faster: whatever this file spends is what the benches count from. It shares no
code with the package, so it is also an independent witness of the values.

One thing is heavier than in one of the reference's two pipelines: where the teacher is a block-diffusion
model, the reference keeps its bf16 logits as they are; here they get an fp32 copy too (5 % of the CPU
seconds of TIDAL in bf16).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

TILE = 8192
"""Ids of one piece of the fp32 addition: a whole fp32 copy of the gradient would be the bench's own fault."""
EPSILON = 1e-7
"""Chunk likelihoods stay this far from 0 and 1, in fp32."""
SMALLEST_TARGET = 1e-8
"""Targets below this count as this much inside the logarithm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model from its final hidden states on."""

    hidden: Tensor
    """[samples, positions, hidden size]: the student's 2l of [x_t ; x_0], or all of the teacher's."""
    weight: Tensor
    """[vocabulary, hidden size]."""

    @property
    def logits(self) -> Tensor:
        """[samples, positions, vocabulary] fp32, of every position."""
        return functional.linear(self.hidden, self.weight).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What is known of a microbatch once its noise was drawn."""

    ids: Tensor
    """[samples, length] int64 clean tokens."""
    masked: Tensor
    """[samples, length] bool."""
    token_weight: Tensor
    """[samples, length] fp32: cross-entropy's timestep weight over its divisor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingTarget:
    """TIDAL, with everything that its schedules say filled in."""

    temperature: float
    columns: int | None
    """How many first ids are compared; None: all."""
    share: Tensor
    """[samples] fp32: lambda."""
    timestep_weight: Tensor
    """[samples] fp32."""
    weight: float = 1.0

    def loss(self, student: Tensor, teacher: Tensor, batch: Microbatch) -> Tensor:
        """Return the term, a scalar, from [samples, positions, vocabulary] logits; 0 with nothing masked."""
        if not batch.masked.any():
            return student.new_zeros(())
        place, used = _padded_places(batch.masked)  # [samples, most]
        ours, theirs = (_gathered(logits, place) for logits in (student, teacher))
        ours, theirs = (self._compared(rows, used) for rows in (ours, theirs))
        sample = used.nonzero()[:, 0]  # [rows]
        return self._mean(ours, theirs, sample)

    def _compared(self, gathered: Tensor, used: Tensor) -> Tensor:
        """Return [rows, columns] of [samples, most, vocabulary], pads dropped."""
        sliced = gathered[..., : self.columns]
        return sliced.reshape(-1, sliced.shape[-1])[used.flatten()]

    def _mean(self, ours: Tensor, theirs: Tensor, sample: Tensor) -> Tensor:
        softened = (ours / self.temperature).float()
        with torch.no_grad():
            share = self.share[sample, None]  # [rows, 1]
            mixed = (1 - share) * softened + share * (theirs / self.temperature).float()
            target = mixed.softmax(-1)
            logarithm = target.clamp_min(SMALLEST_TARGET).log()
        divergence = (target * (logarithm - softened.log_softmax(-1))).sum(-1)  # [rows]
        return self.temperature**2 * (self.timestep_weight[sample] * divergence).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkLikelihoods:
    """Reverse CALM over chunks that are columns of two matrices."""

    temperature: float
    teacher_ids: Tensor
    """[samples, teacher length] int64."""
    members: tuple[Tensor, Tensor]
    """([samples, length, chunks], [samples, teacher length, chunks]) bool: of student and teacher."""
    active: Tensor
    """[samples, chunks] bool: the chunks that enter the mean."""
    weight: float = 1.0

    def loss(self, student: Tensor, teacher: Tensor, batch: Microbatch) -> Tensor:
        """Return the term, a scalar, from [samples, positions, vocabulary] logits; 0 without chunks."""
        mine, theirs = self.members
        ours = self._likelihoods(student, batch.ids, mine)
        with torch.no_grad():
            given = self._likelihoods(teacher, self.teacher_ids, theirs)
        values = -(ours * given.log() + (1 - ours) * (1 - given).log())  # [samples, chunks]
        return (values * self.active).sum() / self.active.sum().clamp_min(1)

    def _likelihoods(self, logits: Tensor, ids: Tensor, members: Tensor) -> Tensor:
        """Return [samples, chunks], from every position's gold logit and log-sum-exp."""
        logits = logits.float()
        gold = logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)  # [samples, length]
        chunks = torch.bmm(gold[:, None], members.float()).squeeze(1)
        return torch.exp(chunks / self.temperature).clamp(EPSILON, 1 - EPSILON)


Term = MovingTarget | ChunkLikelihoods


def cross_entropy(logits: Tensor, batch: Microbatch) -> Tensor:
    """Return the weighted sum of all positions' NLL, a scalar, from [samples, length, vocabulary] logits."""
    nll = functional.cross_entropy(logits.transpose(1, 2), batch.ids, reduction="none")
    return (nll * batch.token_weight * batch.masked).sum()


def plain_head_loss(student: Model, teacher: Model, batch: Microbatch, term: Term) -> Tensor:
    """Return cross-entropy plus the weighted term, an fp32 scalar with graph.

    Args:
        student: hidden states of [x_t ; x_0]; the second half's logits are made and thrown away.
        teacher: hidden states of as many positions as the term's matrices; under a moving target of the
            student's, other halves may follow.
        batch: what was masked.
        term: the distillation loss.
    """
    logits = student.logits[:, : batch.ids.shape[1]]
    with torch.no_grad():
        answer = teacher.logits
    return cross_entropy(logits, batch) + term.weight * term.loss(logits, answer, batch)


def release_gradients(objective: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Go backward, and add the weight's gradient to the fp32 one as data-parallel wrappers do.

    The hidden states keep theirs in `grad`.

    Args:
        objective: from `plain_head_loss`.
        weight: the student's head, a leaf.
        gradient: [vocabulary, hidden size] fp32, added to.
    """
    objective.backward()
    assert weight.grad is not None, "the objective depends on the head"
    for first in range(0, len(weight), TILE):
        gradient[first : first + TILE] += weight.grad[first : first + TILE]
    weight.grad = None


def _padded_places(masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's masked positions, padded by 0 to the most, and which are real, [samples, most]."""
    numbers = masked.sum(1)
    used = torch.arange(int(numbers.max()), device=masked.device) < numbers[:, None]
    place = torch.zeros(used.shape, dtype=torch.int64, device=masked.device)
    place[used] = masked.nonzero()[:, 1]
    return place, used


def _gathered(logits: Tensor, place: Tensor) -> Tensor:
    """Copy the rows at `place` out of all positions, [samples, most, vocabulary]."""
    return logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
