"""Which of a block's masked tokens a step commits: pure functions of how sure the model is of each.

Probabilities and entropies are those of the model's own distribution, whatever the temperature.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from tide_megatron.decode.options import Decoding
from tide_megatron.diffusion.denoise import transfer_counts
from tide_megatron.diffusion.schedule import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picks:
    """What the model would write at the masked positions of one block."""

    tokens: Sequence[int]
    """[masked]."""
    confidence: Sequence[float]
    """[masked] probability of that token."""
    entropy: Sequence[float]
    """[masked] nats, of the whole distribution; empty unless the schedule asks."""


def block_steps(options: Decoding, block: int) -> int:
    """Return the denoising steps of one block.

    Args:
        options: of the reply.
        block: tokens of a block.
    """
    steps = options.steps or options.new_tokens
    if options.schedule == "reference":
        return math.ceil(steps / math.ceil(options.new_tokens / block))
    return max(1, math.ceil(steps * min(block, options.new_tokens) / options.new_tokens))


@functools.lru_cache(maxsize=1024)
def planned_counts(masked: int, steps: int) -> tuple[int, ...]:
    """Return how many tokens each step of a block commits, the reference's way (`transfer_counts`)."""
    return tuple(transfer_counts(Linear(), [masked], steps)[0].tolist())


def choose(options: Decoding, picks: Picks, planned: int) -> list[int]:
    """Return which picks are committed now, the surest first; equally sure ones from left to right.

    Args:
        options: schedule and threshold.
        picks: of the block's masked positions, from left to right; not empty.
        planned: how many the plan of steps asks for, at least 1; `confidence` and `entropy` may take more.
    """
    if options.schedule == "entropy":
        surest = sorted(range(len(picks.tokens)), key=picks.entropy.__getitem__)
        return surest[: max(planned, _bounded(picks.entropy, surest, options.limit))]
    surest = sorted(range(len(picks.tokens)), key=lambda place: -picks.confidence[place])
    if options.schedule == "confidence":
        planned = max(planned, sum(value > options.limit for value in picks.confidence))
    return surest[:planned]


def _bounded(entropy: Sequence[float], surest: Sequence[int], limit: float) -> int:
    """Return how many of the surest have at most `limit` nats together, the least sure of them not counted.

    The joint entropy of independent draws exceeds that of the true distribution by no more than this sum.
    """
    total = 0.0
    for count, place in enumerate(surest):
        if total > limit:
            return count
        total += entropy[place]
    return len(surest)
