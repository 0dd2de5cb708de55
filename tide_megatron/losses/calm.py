"""CALM and Reverse CALM: compare how likely both models find the same stretch of text (spec section 2).

A *chunk* is a stretch of bytes that both tokenizers cut out; its likelihood is the product of its
tokens' probabilities, softened by the temperature. The two likelihoods are compared as Bernoulli
variables, so the models need no common vocabulary. Likelihoods are kept inside [1e-7, 1 - 1e-7]: one outside
gets no gradient. There is no T^2 here.

All of it is computed from logarithms, and 1 - p from them as well: in fp32, 1 - p taken from p has no digits
near 1, where the coefficient -(t - s) / (1 - s) needs them. (The reference does take it from p, so its upper
bound is 1 - 2^-23.)

Chunks come from `Rows.link`: of a teacher with its own tokens the wholly masked ones, of a teacher that
reads the student's tokens every row. The mixtures (CALM+TIDAL and its reverse) put (1 - lambda) s + lambda
t, detached and clamped, in the teacher's place; the mixture is one of likelihoods, not of logits.
"""

from __future__ import annotations

import abc
import math
from typing import Annotated, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.options import STRICT, Paper
from tide_megatron.base.segments import segment_sums
from tide_megatron.diffusion.batch import Noised
from tide_megatron.losses.base import LikelihoodLoss, Temperature
from tide_megatron.losses.rows import Rows
from tide_megatron.losses.tidal import Mixture

LIKELIHOOD_EPSILON = 1e-7
"""Likelihoods stay this far from 0 and 1."""


class Bernoulli(NamedTuple):
    """How likely something is, and how likely it is not, both to all digits; fp32 of one shape."""

    p: Tensor
    rest: Tensor
    """1 - p."""
    log_p: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, log_p: Tensor) -> Bernoulli:
        """Take log p < 0."""
        p, is_likely = log_p.exp(), log_p > -math.log(2)
        # Of two ways each is exact on its own side, in value and slope; both are finite on either.
        rest = torch.where(is_likely, -torch.expm1(log_p), 1 - p)
        log_rest = torch.where(is_likely, rest.log(), torch.log1p(-p))
        return cls(p, rest, log_p, log_rest)

    def mixed(self, other: Bernoulli, share: Tensor) -> Bernoulli:
        """Return (1 - share) of this and `share` of another likelihood; no logarithms are mixed."""
        p, rest = (
            (1 - share) * ours + share * theirs
            for ours, theirs in ((self.p, other.p), (self.rest, other.rest))
        )
        logs = (torch.where(one < 0.5, one.log(), torch.log1p(-two)) for one, two in ((p, rest), (rest, p)))
        return Bernoulli(p, rest, *logs)


def chunk_log_likelihoods(tokens: Tensor, member: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """Add up token log-likelihoods by chunk.

    Args:
        tokens: [tokens] fp32 log-likelihoods.
        member: [members] int64: a token that belongs to ...
        chunk: [members] int64, ascending: ... this chunk; a token may be in several chunks or in none.
        num_chunks: how many chunks there are; one without members has log-likelihood 0.

    Returns:
        [num_chunks] fp32.
    """
    return segment_sums(tokens[member], chunk, num_chunks)


def likelihood(log_likelihood: Tensor, temperature: float) -> Bernoulli:
    """Return exp(log-likelihood / T), kept inside [1e-7, 1 - 1e-7]; no gradient outside."""
    least, most = math.log(LIKELIHOOD_EPSILON), math.log1p(-LIKELIHOOD_EPSILON)
    return Bernoulli.of((log_likelihood.float() / temperature).clamp(least, most))


def bernoulli_cross_entropy(target: Bernoulli, prediction: Bernoulli) -> Tensor:
    """Return -[target log prediction + (1 - target) log(1 - prediction)], elementwise."""
    return -(target.p * prediction.log_p + target.rest * prediction.log_rest)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChunkLikelihood(LikelihoodLoss):
    """Options and divisor of a loss that compares chunk likelihoods."""

    teacher: str
    """Name of the teacher to listen to."""
    temperature: Annotated[Temperature, Paper("2.0; the cross-tokenizer script has 5.0")] = 2.0
    """Divisor of a chunk's log-likelihood."""

    @abc.abstractmethod
    def compare(self, student: Bernoulli, teacher: Bernoulli) -> Tensor:
        """Return the value of each chunk from both likelihoods, [chunks]."""

    def count(self, noised: Noised) -> Tensor:
        """Return the number of chunks of this microbatch that enter the loss."""
        return torch.tensor(noised.link(self.teacher).num_chunks, dtype=torch.float64)

    def item_sample(self, rows: Rows) -> Tensor:
        """Return each chunk's sample."""
        return rows.link(self.teacher).chunk_sample

    def from_likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows, clock: Clock) -> Tensor:
        """Return `compare` of both models' likelihoods of each chunk."""
        return self.compare(*self.likelihoods(student, teacher, rows))

    def likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> tuple[Bernoulli, Bernoulli]:
        """Return each side's likelihood of each chunk, [chunks], from [rows] logarithms."""
        assert teacher is not None, f"no answer of teacher {self.teacher!r} reached its loss"
        link = rows.link(self.teacher)
        sides = (student, link.student_rows), (teacher, link.teacher_rows)
        for who, (_, (_, chunk)) in zip(("student", f"teacher {self.teacher!r}"), sides, strict=True):
            _check_chunks(chunk, link.num_chunks, who)
        ours, theirs = (
            likelihood(chunk_log_likelihoods(tokens, *members, link.num_chunks), self.temperature)
            for tokens, members in sides
        )
        return ours, theirs


def _check_chunks(chunk: Tensor, num_chunks: int, who: str) -> None:
    """Refuse a chunk that has no token on one side, which would count as certain, where that costs nothing.

    On a device the host would have to wait. There the data has been looked at when it was opened
    (`data.columns`).
    """
    if chunk.device.type == "cpu":
        has_token = torch.zeros(num_chunks, dtype=torch.bool).index_fill(0, chunk, True)
        torch._assert_async(has_token.all(), f"a chunk has no token of the {who}, so it cannot be compared")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Calm(ChunkLikelihood):
    """CALM: the teacher's likelihood is the target of the student's."""

    def compare(self, student: Bernoulli, teacher: Bernoulli) -> Tensor:
        """Return -[t log s + (1 - t) log(1 - s)]."""
        return bernoulli_cross_entropy(teacher, student)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseCalm(ChunkLikelihood):
    """Reverse CALM: the student's likelihood weighs the teacher's log-odds, so gradients are bounded.

    No entropy term holds the likelihood away from 0 and 1; weights above 1 were seen to diverge.
    """

    def compare(self, student: Bernoulli, teacher: Bernoulli) -> Tensor:
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
            target = ours.mixed(theirs, share)
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
