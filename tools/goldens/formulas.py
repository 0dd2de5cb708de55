"""Replays of single formulas: schedules, masks, TIDAL and CALM with their gradients.

Shapes, block sizes, lengths, steps and temperatures come from the files' own keys. What a file does not say
about its cases, the goldens' README does: `NAMED_CASES`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens.engine import (
    Clock,
    Noised,
    block_diffusion,
    chunk_likelihoods,
    chunk_values,
    dense_mask,
    evaluate,
    masked_at,
    swap_halves,
    tidal_term,
)
from goldens.row import LOSS_TOLERANCE, Golden, Row
from tide_megatron.diffusion.schedule import SCHEDULES

NAMED_CASES: dict[str, dict[str, Any]] = {
    "lam0": {"lambda_init": 0.0, "lambda_max": 0.0, "axis_mode": "training_only", "step": 5, "max_steps": 10},
    "lam1": {"lambda_init": 1.0, "lambda_max": 1.0, "axis_mode": "training_only", "step": 5, "max_steps": 10},
    "bf16": {"axis_mode": "both", "timestep_weight": "midrange", "step": 37, "max_steps": 100},
    "mixed": {"axis_mode": "both", "timestep_weight": "midrange", "step": 37, "max_steps": 100},
}
"""The cases of taid.npz that the README describes in words; what they leave out has our defaults."""


def replay_schedules(path: Path) -> list[Row]:
    """Replay alpha.npz: alpha, its derivative, the loss weight and the sampler's ratio of every schedule."""
    golden = Golden(path)
    time, later = golden.read("t"), golden.read("t_rev")
    for name in sorted({key.rsplit("_alpha", 1)[0] for key in golden.keys(".*_alpha")}):
        schedule = SCHEDULES[name]  # type: ignore[index]
        ours = {
            f"{name}_alpha": schedule.alpha(time),
            f"{name}_dalpha": schedule.d_alpha(time),
            f"{name}_weight": schedule.weight(time),
            f"{name}_reverse_mask_prob_s_half_t": schedule.stay_masked(later / 2, later),
        }
        golden.compare(f"{name}_*", ours)
    return golden.rows()


def replay_masks(path: Path) -> list[Row]:
    """Replay bd3lm_mask.npz: the block-diffusion rule in both orders of the halves, every entry."""
    golden = Golden(path)
    for order in ("xtx0", "x0xt"):
        ours = {}
        for key in golden.keys(rf"n\d+_bs\d+_{order}"):
            length, block = map(int, re.findall(r"\d+", key)[:2])
            mask = dense_mask(block_diffusion(block), length)[0, 0]
            ours[key] = mask if order == "xtx0" else swap_halves(mask)
        golden.compare(f"n*_bs*_{order}", ours, tolerance=0.0)
    return golden.rows()


def replay_tidal(path: Path) -> list[Row]:
    """Replay taid.npz: values and gradients of every case, a row per axis, growth and timestep weight."""
    golden = Golden(path)
    student, teacher, entropy = (
        golden.read(f"{key}") for key in ("student_logits", "teacher_logits", "entropy_weights")
    )
    noised = masked_at(golden.read("masked_mask"), golden.read("t"))
    groups: dict[str, dict[str, Tensor]] = {}
    for case in golden.cases():
        tag, weights = f"case{case['id']}", entropy if case["entropy_weights"] else None
        value, grad = _tidal(case, student, teacher, noised, weights)
        group = f"case*: {case['axis_mode']}, {case['lambda_decay']}, {case['timestep_weight']}"
        groups.setdefault(group, {}).update({f"{tag}_loss": value, f"{tag}_grad": grad})
    for group, ours in groups.items():
        golden.compare(group, ours)
    rounded = golden.read("bf16_student_logits"), golden.read("bf16_teacher_logits")
    inputs = {"bf16": rounded, "mixed": (student, rounded[1])}
    for name, options in NAMED_CASES.items():
        value, grad = _tidal(options, *inputs.get(name, (student, teacher)), noised)
        if name == "bf16":
            grad = _nearest_to(golden.read("bf16_grad"), grad)
        golden.compare(f"{name}_*", {f"{name}_loss": value, f"{name}_grad": grad})
    value, _ = _tidal({}, student, teacher, masked_at(torch.zeros_like(noised.masked), noised.time))
    golden.compare("emptymask_*", {"emptymask_loss": value}, tolerance=0.0)
    return golden.rows()


def _tidal(
    case: dict[str, Any], student: Tensor, teacher: Tensor, noised: Noised, entropy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return TIDAL's value and its gradient to all student logits [samples, length, vocabulary].

    Entropy weights [samples, length], which the reference's trainer never passes, multiply every masked
    position's term, and so its gradient; the weighted value is a sum over positions, each evaluated alone.
    """
    leaf, losses = student.clone().requires_grad_(True), {"tidal": tidal_term(case)}
    clock = Clock(step=case.get("step", 0), total_steps=case.get("max_steps", 1))
    masked, counts = noised.masked, {"tidal": losses["tidal"].count(noised)}

    def objective(where: Tensor) -> Tensor:
        part = masked_at(where, noised.time)
        return evaluate(leaf[where], teacher[where], losses, part, clock, counts).objective

    value = objective(masked)
    value.backward()
    assert leaf.grad is not None, "the objective depends on the student"
    if entropy is None:
        return value.detach(), leaf.grad
    alone = torch.nn.functional.one_hot(masked.flatten().nonzero()[:, 0], masked.numel()).bool()
    with torch.no_grad():
        parts = torch.stack([objective(one.view(masked.shape)) for one in alone])
    return (entropy[masked] * parts).sum(), leaf.grad * entropy[..., None]


def _nearest_to(rounded: Tensor, exact: Tensor) -> Tensor:
    """Return `rounded` where bf16 rounding of a value within tolerance of `exact` gives it, else `exact`."""
    slack = LOSS_TOLERANCE * rounded.abs().max().clamp_min(1.0)
    low, high = (exact - slack).bfloat16().float(), (exact + slack).bfloat16().float()
    return torch.where((low <= rounded) & (rounded <= high), rounded, exact)


def replay_calm(path: Path) -> list[Row]:
    """Replay alm.npz: both directions at every temperature, with and without chunk weights."""
    golden = Golden(path)
    sides = [
        [golden.read(key) for key in (f"{side}_logits", f"{side}_input_ids", f"align_{side}")]
        for side in ("student", "teacher")
    ]
    active, weights = golden.read("chunk_mask"), golden.read("chunk_weights")

    def evaluate_chunks(
        direction: str, temperature: float, weights: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaf = sides[0][0].clone().requires_grad_(True)
        student = chunk_likelihoods(leaf, *sides[0][1:], temperature)
        teacher = chunk_likelihoods(*sides[1], temperature)
        name = "reverse_alm" if direction == "reverse" else "alm"
        values = chunk_values(name, temperature, student, teacher)
        objective = (values * weights.flatten() * active.flatten()).sum() / active.sum().clamp_min(1)
        objective.backward()
        assert leaf.grad is not None, "the objective depends on the student"
        return objective.detach(), leaf.grad

    for key in golden.keys(r"(forward|reverse)_T\d+_(now|w)_loss"):
        direction, temperature, kind, _ = key.split("_")
        weighted = weights if kind == "w" else torch.ones_like(weights)
        value, grad = evaluate_chunks(direction, float(temperature[1:]), weighted, active)
        tag = key.removesuffix("_loss")
        golden.compare(f"{tag}_*", {key: value, f"{tag}_grad": grad})
    value, _ = evaluate_chunks("forward", 1.0, weights, torch.zeros_like(active))
    golden.compare("nochunk_*", {"nochunk_loss": value}, tolerance=0.0)
    return golden.rows()
