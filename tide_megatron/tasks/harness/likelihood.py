"""How likely a diffusion model finds a continuation of a text: a bound, estimated by masking it.

With n tokens, l of them masked at random and l uniform in 1..n, the mean of n / l times the summed
log-likelihood of the masked tokens is the model's bound on the continuation's log-likelihood (a lower one):
the integral over the noise level, with the level integrated out. Every subset of l tokens therefore weighs
1 / (l * C(n, l)); the reference has no such scores at all (spec section 7).

- A short continuation is summed over all its subsets: exact, no draws (up to 5 tokens with 32 draws).
- A long one is drawn in pairs: l stratified over the pairs, and the second of a pair masks from the other end
  of the same shuffle, so that the two hide about complementary halves (antithetic).
- Draws are a pure function of (seed, tokens of the pair): the same on any rank and in any order.

Under block contexts the blocks before are clean, as when the model writes, and what stands behind the
continuation in its last block is masked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy
import torch
from torch import Tensor

from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import ModelScorer
from tide_megatron.models.build import TideModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A bound on a continuation's log-likelihood."""

    value: float
    """Nats; a lower bound."""
    standard_error: float
    """Of the estimate, in nats; 0 where it is exact."""
    is_greedy: bool
    """Whether every token is the likeliest one when all of the continuation is masked."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """One masking of one continuation."""

    pair: int
    masked: tuple[int, ...]
    """Places in the continuation."""
    weight: float
    """Of the masked tokens' summed log-likelihood in the bound."""
    draw: int
    """Rows of one draw are one sample of the estimate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """Estimates bounds with a whole model on this rank."""

    model: TideModel
    context: Context
    mask_id: int
    pad_id: int
    draws: int = 32
    """Maskings of each continuation."""
    seed: int = 0
    batch: int = 16
    """Maskings that are read at a time."""

    @torch.no_grad()
    def estimate(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Estimate]:
        """Return a bound for each (text before, continuation), both in tokens; no continuation is empty."""
        rows = [row for number, (_, tokens) in enumerate(pairs) for row in self._rows(number, pairs[number])]
        rows.sort(key=lambda row: sum(map(len, pairs[row.pair])))
        sums: list[dict[int, float]] = [{} for _ in pairs]
        is_greedy = [False] * len(pairs)
        for first in range(0, len(rows), self.batch):
            some = rows[first : first + self.batch]
            for row, (log_likelihood, is_right) in zip(some, self._score(some, pairs), strict=True):
                draws = sums[row.pair]
                draws[row.draw] = draws.get(row.draw, 0.0) + row.weight * log_likelihood
                if len(row.masked) == len(pairs[row.pair][1]):
                    is_greedy[row.pair] = is_right
        return [self._estimate(draws, right) for draws, right in zip(sums, is_greedy, strict=True)]

    def _estimate(self, draws: dict[int, float], is_greedy: bool) -> Estimate:
        values = numpy.array([draws[draw] for draw in sorted(draws) if draw >= 0])
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Estimate(value=float(values.mean()), standard_error=error, is_greedy=is_greedy)

    def _rows(self, number: int, pair: tuple[Sequence[int], Sequence[int]]) -> Iterator[_Row]:
        """Yield the maskings of one continuation; the last of a drawn one is whole, without weight."""
        count = len(pair[1])
        if 2**count - 1 <= self.draws:
            for size in range(1, count + 1):
                weight = 1 / (size * math.comb(count, size))
                for masked in itertools.combinations(range(count), size):
                    yield _Row(number, masked, weight, 0)
            return
        stream = numpy.random.Generator(numpy.random.Philox(key=_key(self.seed, *pair)))
        halves = max(2, self.draws // 2)
        for half in range(halves):
            share = (half + stream.random()) / halves
            order = stream.permutation(count)
            for places, level in ((order, share), (order[::-1], 1 - share)):
                size = min(count, int(level * count) + 1)
                yield _Row(number, tuple(sorted(places[:size].tolist())), count / size / 2, half)
        yield _Row(number, tuple(range(count)), 0.0, -1)

    def _score(
        self, rows: Sequence[_Row], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Return each row's summed log-likelihood of masked tokens, and whether all are the likeliest."""
        is_whole = self.context.kind == "bidirectional"
        block = 1 if is_whole else self.context.block_size
        context = self.context if is_whole else Context(kind="block_diffusion", block_size=block)
        longest = max(-(-sum(map(len, pairs[row.pair])) // block) * block for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full_like(ids, IGNORED)
        masked, counted = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for place, row in enumerate(rows):
            before, tokens = pairs[row.pair]
            first, last = len(before), len(before) + len(tokens)
            end = -(-last // block) * block
            ids[place, :last] = torch.tensor([*before, *tokens])
            labels[place, first:end] = ids[place, first:end]
            counted[place, [first + one for one in row.masked]] = True
            masked[place, last:end] = True
        masked |= counted
        return self._summed(ids, labels, masked, counted, context)

    def _summed(
        self, ids: Tensor, labels: Tensor, masked: Tensor, counted: Tensor, context: Context
    ) -> list[tuple[float, bool]]:
        """Score masked rows [rows, length] and sum those that count."""
        rows, device = torch.arange(len(ids)), self.model.head_weight.device
        batch = Batch(
            sample_ids=rows,
            epochs=torch.zeros_like(rows),
            ids=ids,
            labels=labels,
            reply_bytes=torch.zeros_like(rows),
        )
        noised = Noised(
            batch=batch.to(device), time=torch.ones(len(ids), device=device), masked=masked.to(device)
        )
        scores = ModelScorer(model=self.model, context=context, mask_id=self.mask_id)(noised)
        sample, position = noised.row_index
        counts = counted.to(device)[sample, position]
        nll = torch.zeros(len(ids), dtype=torch.float64, device=device)
        nll.index_add_(0, sample[counts], scores.nll[counts].double())
        wrong = torch.zeros(len(ids), dtype=torch.int64, device=device)
        wrong.index_add_(0, sample[counts], (~scores.is_right[counts].bool()).long())
        return [(-value, count == 0) for value, count in zip(nll.tolist(), wrong.tolist(), strict=True)]


def _key(seed: int, before: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Return Philox's key of a pair: two words of 64 bits."""
    text = f"{seed} {list(before)} {list(tokens)}".encode()
    digest = hashlib.sha256(text).digest()
    return [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
