"""CALM and Reverse CALM: compare how likely both models find the same stretch of text (spec section 2).

A *chunk* is a stretch of bytes that both tokenizers cut out; its likelihood is the product of its
tokens' probabilities, softened by the temperature. The two likelihoods are compared as Bernoulli
variables, so the models need no common vocabulary. Clamping to [1e-7, 1 - 1e-7] happens in fp32, where
the upper bound is 1 - 2^-23: a likelihood outside gets no gradient. There is no T^2 here.

The pure functions serve any chunking. The losses of this file still know only equal tokenizers, where a
chunk is a row and the gold ids are the teacher's too; chunks of several tokens enter with the second
tokenizer (and with them the mixture of both ideas, whose target is `(1 - lambda) s + lambda t` in
`bernoulli_cross_entropy`).
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Noised
from tide_megatron.losses.cross_entropy import gold_log_likelihood
from tide_megatron.losses.rows import STRICT, Rows, Temperature, Weight, num_hidden, one_per_row

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
    return softened.clamp(LIKELIHOOD_EPSILON, 1 - LIKELIHOOD_EPSILON)


def bernoulli_cross_entropy(target: Tensor, prediction: Tensor) -> Tensor:
    """Return -[target log prediction + (1 - target) log(1 - prediction)], elementwise; both in (0, 1)."""
    return -(target * prediction.log() + (1 - target) * (1 - prediction).log())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChunkLikelihood(abc.ABC):
    """Options and divisor of a loss that compares chunk likelihoods; a chunk is one hidden row here."""

    teacher: str
    """Name of the teacher to listen to."""
    weight: Weight = 1.0
    temperature: Temperature = 2.0

    needs_teacher: ClassVar[bool] = True

    @abc.abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the value of each chunk from both likelihoods, [chunks] in (0, 1)."""

    def count(self, noised: Noised) -> Tensor:
        """Return the number of chunks of this microbatch: its hidden rows."""
        return num_hidden(noised)

    def coefficients(self, rows: Rows, clock: Clock) -> Tensor:
        """Return 1 for every chunk."""
        return one_per_row(rows)

    def values(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return `compare` of both models' likelihoods of each gold token."""
        assert teacher is not None, f"no answer of teacher {self.teacher!r} reached its loss"
        theirs = likelihood(gold_log_likelihood(teacher, rows.gold), self.temperature)  # [rows]
        ours = likelihood(gold_log_likelihood(student, rows.gold), self.temperature)
        return self.compare(ours, theirs)


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
