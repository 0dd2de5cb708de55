"""Arithmetic of block sampling: how many tokens a step commits, which ones, and what each forward reads.

The sampler itself runs a model and lives in `evaluate/`; what is here is pure and replays the reference
(spec section 7): the transfer schedule with its fp32 ratio and half-even rounding, the low-confidence
rule, and the key-value plan that follows from the attention predicate. Left out until fast decoding:
classifier-free guidance, stochastic transfer, thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.diffusion.mask import Context, may_attend
from tide_megatron.diffusion.schedule import Schedule


def transfer_counts(schedule: Schedule, num_masked: Sequence[int], num_steps: int) -> Tensor:
    """Plan how many tokens each denoising step commits (spec section 7 item 2).

    Step j of S goes from t = (S-j)/S to s = (S-j-1)/S and commits the expected share of what is left. The
    ratio is evaluated in fp32 and then widened, which decides .5 ties; rounding is half to even.

    Args:
        schedule: the noise schedule.
        num_masked: masked tokens of each sample's block.
        num_steps: denoising steps S, at least 1.

    Returns:
        [samples, steps] int64; steps in which a sample commits nothing are removed, rows are right-padded
        with 0. Every row sums to the sample's masked tokens.
    """
    assert num_steps >= 1, f"a block needs at least one step, not {num_steps}"
    grid = torch.tensor([step / num_steps for step in range(num_steps, -1, -1)], dtype=torch.float32)
    commit = [1 - stay for stay in schedule.stay_masked(grid[1:], grid[:-1]).tolist()]  # fp32, then widened
    rows = []
    for total in num_masked:
        row, left = [], int(total)
        for share in commit:
            count = min(left, round(left * share))  # Python rounds half to even, as the reference does
            left -= count
            row += [count] if count else []
        rows.append(row)
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)


def commit_most_confident(
    logits: Tensor, ids: Tensor, masked: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Commit each sample's most confident predictions among its masked positions (rule `low_confidence`).

    A prediction is the argmax and its confidence the softmax probability in the logits' dtype (spec section
    7 item 3). Committed tokens never change.

    Args:
        logits: [samples, length, vocabulary].
        ids: [samples, length] int64 current tokens.
        masked: [samples, length] bool positions still to fill.
        counts: [samples] int64 how many to commit now; at most what is masked is committed.

    Returns:
        (new ids, new masked), same shapes; the inputs are left alone.
    """
    confidence, token = torch.softmax(logits, dim=-1).max(dim=-1)  # [samples, length]
    surest_first = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = surest_first.argsort(dim=-1)  # a permutation sorted is its inverse: the rank of each position
    commit = masked & (rank < counts[:, None])
    return torch.where(commit, token, ids), masked & ~commit


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValuePlan:
    """What one forward over a block reads: `queries` attend to `cached` and to each other, all to all."""

    queries: Tensor
    """[queries] int64 positions in the sequence that are fed."""
    cached: Tensor
    """[cached] int64 positions of earlier blocks; their keys and values were made when those were clean."""


def key_value_plan(context: Context, length: int, block: int) -> KeyValuePlan:
    """Say what a forward over one block feeds and what it takes from the cache, from `may_attend` itself.

    The same plan serves a block being denoised (noised queries) and a finished block being remembered (clean
    queries): both see the clean blocks before and all of their own. A bidirectional model sees what is still
    to come, so nothing can be cached and the whole sequence is fed.

    Args:
        context: the model's context kind.
        length: tokens of the sequence so far, the current block included.
        block: number of the current block.
    """
    position = torch.arange(length)
    if context.kind == "bidirectional":
        return KeyValuePlan(queries=position, cached=position[:0])
    queries = position[position // context.block_size == block]
    clean = position + (context.parts - 1) * length  # where clean copies stand in the training layout
    seen = may_attend(context, length, queries[:, None], clean[None, :])  # [queries, length]
    assert (seen == seen[:1]).all(), "the queries of one block must see the same keys"
    return KeyValuePlan(queries=queries, cached=position[seen[0] & (position // context.block_size < block)])
