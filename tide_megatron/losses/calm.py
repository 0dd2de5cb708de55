"""CALM and Reverse CALM: compare how likely both models find the same stretch of text (spec section 2).

A *chunk* is a stretch of bytes that both tokenizers cut out; its likelihood is the product of its
tokens' probabilities, softened by the temperature. The two likelihoods are compared as Bernoulli
variables, so the models need no common vocabulary. Clamping to [1e-7, 1 - 1e-7] happens in fp32, where
the upper bound is 1 - 2^-23: a likelihood outside gets no gradient. There is no T^2 here.

Chunks come from `Rows.link`: of a teacher with its own tokens the wholly masked ones, of a teacher that
reads the student's tokens every row. The mixtures (CALM+TIDAL and its reverse) put (1 - lambda) s + lambda
t, detached and clamped, in the teacher's place; the mixture is one of likelihoods, not of logits.
"""

from __future__ import annotations

import abc
from typing import Annotated

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.options import STRICT, Paper
from tide_megatron.diffusion.batch import Noised
from tide_megatron.losses.base import LikelihoodLoss, Temperature
from tide_megatron.losses.rows import Rows
from tide_megatron.losses.tidal import Mixture

LIKELIHOOD_EPSILON = 1e-7
"""Likelihoods stay this far from 0 and 1 (rounded to fp32: 1 - 2^-23 above)."""


def chunk_log_likelihoods(tokens: Tensor, member: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """Add up token log-likelihoods by chunk.

    Args:
        tokens: [tokens] fp32 log-likelihoods.
        member: [members] int64: a token that belongs to ...
        chunk: [members] int64: ... this chunk; a token may be in several chunks or in none.
        num_chunks: how many chunks there are; one without members has log-likelihood 0.

    Returns:
        [num_chunks] fp32.
    """
    return tokens.new_zeros(num_chunks).index_add(0, chunk, tokens[member])


def likelihood(log_likelihood: Tensor, temperature: float) -> Tensor:
    """Return exp(log-likelihood / T), clamped to [1e-7, 1 - 1e-7] in fp32; no gradient where it clamps."""
    softened = torch.exp(log_likelihood.float() / temperature)
    return clamped(softened)


def bernoulli_cross_entropy(target: Tensor, prediction: Tensor) -> Tensor:
    """Return -[target log prediction + (1 - target) log(1 - prediction)], elementwise; both in (0, 1)."""
    return -(target * prediction.log() + (1 - target) * (1 - prediction).log())


def clamped(share: Tensor) -> Tensor:
    """Return likelihoods kept inside [1e-7, 1 - 1e-7]."""
    return share.clamp(LIKELIHOOD_EPSILON, 1 - LIKELIHOOD_EPSILON)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChunkLikelihood(LikelihoodLoss):
    """Options and divisor of a loss that compares chunk likelihoods."""

    teacher: str
    """Name of the teacher to listen to."""
    temperature: Annotated[Temperature, Paper("2.0; the cross-tokenizer script has 5.0")] = 2.0
    """Divisor of a chunk's log-likelihood."""

    @abc.abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the value of each chunk from both likelihoods, [chunks] in (0, 1)."""

    def count(self, noised: Noised) -> Tensor:
        """Return the number of chunks of this microbatch that enter the loss."""
        return torch.tensor(noised.link(self.teacher).num_chunks, dtype=torch.float64)

    def item_sample(self, rows: Rows) -> Tensor:
        """Return each chunk's sample."""
        return rows.link(self.teacher).chunk_sample

    def from_likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return `compare` of both models' likelihoods of each chunk."""
        return self.compare(*self.likelihoods(student, teacher, rows))

    def likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return each side's likelihood of each chunk, ([chunks], [chunks]) fp32, from [rows] logarithms."""
        assert teacher is not None, f"no answer of teacher {self.teacher!r} reached its loss"
        link = rows.link(self.teacher)
        ours, theirs = (
            likelihood(chunk_log_likelihoods(tokens, *members, link.num_chunks), self.temperature)
            for tokens, members in ((student, link.student_rows), (teacher, link.teacher_rows))
        )
        return ours, theirs


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Calm(ChunkLikelihood):
    """CALM: the teacher's likelihood is the target of the student's."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return -[t log s + (1 - t) log(1 - s)]."""
        return bernoulli_cross_entropy(teacher, student)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseCalm(ChunkLikelihood):
    """Reverse CALM: the student's likelihood weighs the teacher's log-odds, so gradients are bounded.

    No entropy term holds the likelihood away from 0 and 1; weights above 1 were seen to diverge.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return -[s log t + (1 - s) log(1 - t)]."""
        return bernoulli_cross_entropy(student, teacher)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _Mixed(Mixture, ChunkLikelihood):
    """A chunk loss whose target lies between student and teacher."""

    def from_likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return `compare` of the student's likelihood with the mixture's."""
        ours, theirs = self.likelihoods(student, teacher, rows)
        with torch.no_grad():
            share = self.teacher_share(self.item_time(rows), clock)
            target = clamped((1 - share) * ours + share * theirs)
        return self.compare(ours, target)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CalmTidal(_Mixed, Calm):
    """CALM towards a target that moves from the student to the teacher."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseCalmTidal(_Mixed, ReverseCalm):
    """Reverse CALM against a target that moves from the student to the teacher; the paper advises against it.

    While lambda is small the target is the student itself, which pushes likelihoods to 0 or 1 (spec section
    2).
    """
