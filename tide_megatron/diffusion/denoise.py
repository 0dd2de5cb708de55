"""How many tokens each step of block sampling commits, as the reference plans it (spec section 7 item 2).

What a step commits, and by which forward pass, is `decode/`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
