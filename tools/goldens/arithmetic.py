"""Replays of what has no gradients: schedules, attention masks, transfer counts, one commit of the sampler.

Shapes, block sizes, lengths and steps come from the files' own keys.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from goldens.row import LOSS_TOLERANCE, Golden, Row
from tide_megatron.diffusion.denoise import commit_most_confident, transfer_counts
from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.diffusion.schedule import SCHEDULES


def swap_halves(mask: Tensor) -> Tensor:
    """Turn a mask over [x_t ; x_0] into the same rule over [x_0 ; x_t] (last two dimensions)."""
    half = mask.shape[-1] // 2
    return mask.roll((half, half), dims=(-2, -1))


def replay_schedules(path: Path) -> list[Row]:
    """Replay alpha.npz: alpha, its derivative, the loss weight and the sampler's ratio of every schedule."""
    golden = Golden(path)
    time, later = golden.read("t"), golden.read("t_rev")
    for name in sorted({key.rsplit("_alpha", 1)[0] for key in golden.keys(".*_alpha")}):
        schedule = SCHEDULES[name]  # type: ignore[index]
        pairs = [
            (f"{name}_alpha", schedule.alpha(time)),
            (f"{name}_dalpha", schedule.d_alpha(time)),
            (f"{name}_weight", schedule.weight(time)),
            (f"{name}_reverse_mask_prob_s_half_t", schedule.stay_hidden(later / 2, later)),
        ]
        golden.compare(f"{name}_*", pairs, LOSS_TOLERANCE)
    return golden.rows()


def replay_masks(path: Path) -> list[Row]:
    """Replay bd3lm_mask.npz: the block-diffusion rule in both orders of the halves, every entry."""
    golden = Golden(path)
    for order in ("xtx0", "x0xt"):
        pairs = []
        for key in golden.keys(rf"n\d+_bs\d+_{order}"):
            length, block = map(int, re.findall(r"\d+", key)[:2])
            mask = dense_mask(Context(kind="block_diffusion", block_size=block), length)[0, 0]
            pairs.append((key, mask if order == "xtx0" else swap_halves(mask)))
        golden.compare(f"n*_bs*_{order}", pairs, 0.0)
    return golden.rows()


def replay_sampler(path: Path) -> list[Row]:
    """Replay sampler.npz: transfer counts and one commit; whole sequences wait for fast decoding."""
    golden = Golden(path)
    for name, schedule in SCHEDULES.items():
        pairs = []
        for key in golden.keys(rf"ntt_{name}_L\d+_s\d+"):
            length, steps = map(int, re.findall(r"\d+", key))
            pairs.append((key, transfer_counts(schedule, [length, length - length // 2], steps)))
        golden.compare(f"ntt_{name}_*", pairs, 0.0)
    ids, _ = commit_most_confident(
        golden.read("step_logits"), golden.read("step_x"), golden.read("step_mask"), golden.read("step_k")
    )
    golden.compare("step_*", [("step_out", ids)], 0.0)
    names = [case["name"] for case in golden.cases()]
    whole = [key for name in names for key in golden.keys(rf"{re.escape(name)}_(seq|hist|hist_len)")]
    inputs = golden.keys("prompt[0-9]+|(mask|pad|eos)_id|prep_(x|attn|pos)")
    golden.put_off("whole sequences", [*whole, *inputs], "the sampler beyond its transfer counts")
    return golden.rows()
