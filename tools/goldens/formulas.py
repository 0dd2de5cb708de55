"""Replays of single formulas with their gradients: TIDAL (taid.npz) and the CALM family (alm.npz).

TIDAL runs through `head_loss` with an identity head, so that logits are hidden rows; CALM through the
pure chunk functions. What a file does not say about its cases, the goldens' README does: the constants
below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens.row import LOSS_TOLERANCE, Golden, Row
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.plain import head_loss
from tide_megatron.losses.calm import Calm, ReverseCalm, chunk_log_likelihoods, likelihood
from tide_megatron.losses.cross_entropy import gold_log_likelihood
from tide_megatron.losses.rows import rows_of
from tide_megatron.losses.tidal import Tidal

TIDAL_OPTIONS = {
    "axis_mode": "axes",
    "lambda_decay": "growth",
    "timestep_weight": "timestep_weight",
    "temperature": "temperature",
    "shared_vocab_size": "shared_vocab_size",
    "lambda_init": "initial",
    "lambda_max": "maximum",
}
"""Option of a case -> our field."""
NAMED_CASES: dict[str, dict[str, Any]] = {
    "lam0": {"lambda_init": 0.0, "lambda_max": 0.0, "axis_mode": "training_only", "step": 5, "max_steps": 10},
    "lam1": {"lambda_init": 1.0, "lambda_max": 1.0, "axis_mode": "training_only", "step": 5, "max_steps": 10},
    "bf16": {"axis_mode": "both", "timestep_weight": "midrange", "step": 37, "max_steps": 100},
    "mixed": {"axis_mode": "both", "timestep_weight": "midrange", "step": 37, "max_steps": 100},
}
"""The cases that the README describes in words; what they leave out has our defaults, the paper's."""


def replay_tidal(path: Path) -> list[Row]:
    """Replay taid.npz: values and gradients of every case, a row per axis, growth and timestep weight."""
    golden = Golden(path)
    student, teacher = golden.read("student_logits"), golden.read("teacher_logits")
    noised = _noised(golden.read("masked_mask"), golden.read("t"))
    entropy = golden.read("entropy_weights")
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for case in golden.cases():
        loss, clock = _tidal(case)
        value, grad = _value_and_grad(
            loss, clock, student, teacher, noised, entropy if case["entropy_weights"] else None
        )
        group = f"case*: {case['axis_mode']}, {case['lambda_decay']}, {case['timestep_weight']}"
        tag = f"case{case['id']}"
        groups.setdefault(group, []).extend([(f"{tag}_loss", value), (f"{tag}_grad", grad)])
    for group, pairs in groups.items():
        golden.compare(group, pairs, LOSS_TOLERANCE)
    rounded = golden.read("bf16_student_logits"), golden.read("bf16_teacher_logits")
    inputs = {
        "lam0": (student, teacher),
        "lam1": (student, teacher),
        "bf16": rounded,
        "mixed": (student, rounded[1]),
    }
    for name, case in NAMED_CASES.items():
        value, grad = _value_and_grad(*_tidal(case), *inputs[name], noised)
        if name == "bf16":
            grad = _nearest_to(golden.read("bf16_grad"), grad)
        golden.compare(f"{name}_*", [(f"{name}_loss", value), (f"{name}_grad", grad)], LOSS_TOLERANCE)
    nothing = _noised(torch.zeros_like(noised.hidden), noised.time)
    value, _ = _value_and_grad(*_tidal({}), student, teacher, nothing)
    golden.compare("emptymask_*", [("emptymask_loss", value)], 0.0)
    return golden.rows()


def replay_calm(path: Path) -> list[Row]:
    """Replay alm.npz: both directions at every temperature, with and without chunk weights."""
    golden = Golden(path)
    logits = {side: golden.read(f"{side}_logits") for side in ("student", "teacher")}
    ids = {side: golden.read(f"{side}_input_ids") for side in ("student", "teacher")}
    align = {side: golden.read(f"align_{side}") for side in ("student", "teacher")}
    active = golden.read("chunk_mask")
    weights = {"now": torch.ones_like(golden.read("chunk_weights")), "w": golden.read("chunk_weights")}
    losses = {"forward": Calm, "reverse": ReverseCalm}

    def evaluate(direction: str, temperature: float, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits["student"].clone().requires_grad_(True)
        both = [
            likelihood(_chunks(side_logits, ids[side], align[side]), temperature)
            for side, side_logits in (("student", leaf), ("teacher", logits["teacher"]))
        ]
        values = losses[direction](teacher="golden", temperature=temperature).compare(*both)
        objective = (values * weight.flatten() * mask.flatten()).sum() / mask.sum().clamp_min(1)
        objective.backward()
        assert leaf.grad is not None, "the objective depends on the student"
        return objective.detach(), leaf.grad

    for key in golden.keys(r"(forward|reverse)_T\d+_(now|w)_loss"):
        tag = key.removesuffix("_loss")
        direction, temperature, kind = tag.split("_")
        value, grad = evaluate(direction, float(temperature[1:]), weights[kind], active)
        golden.compare(f"{tag}_*", [(key, value), (f"{tag}_grad", grad)], LOSS_TOLERANCE)
    value, _ = evaluate("forward", 1.0, weights["now"], torch.zeros_like(active))
    golden.compare("nochunk_*", [("nochunk_loss", value)], 0.0)
    return golden.rows()


def _chunks(logits: Tensor, ids: Tensor, align: Tensor) -> Tensor:
    """Return the log-likelihood of each chunk [samples * chunks] under an alignment matrix."""
    samples, length, num_chunks = align.shape
    tokens = gold_log_likelihood(logits, ids).flatten()
    sample, position, chunk = align.nonzero(as_tuple=True)
    return chunk_log_likelihoods(
        tokens, sample * length + position, sample * num_chunks + chunk, samples * num_chunks
    )


def _noised(hidden: Tensor, time: Tensor) -> Noised:
    """Wrap a mask and its noise levels; the tokens themselves do not matter to TIDAL."""
    ids = torch.zeros(hidden.shape, dtype=torch.int64)
    numbers = torch.zeros(len(hidden), dtype=torch.int64)
    batch = Batch(
        sample_ids=numbers,
        epochs=numbers,
        ids=ids,
        labels=ids.masked_fill(~hidden, IGNORED),
        reply_bytes=numbers,
    )
    return Noised(batch=batch, time=time, hidden=hidden)


def _tidal(case: dict[str, Any]) -> tuple[Tidal, Clock]:
    """Build loss and clock from a case; an option we do not know is an error, never ignored."""
    others = {"id", "step", "max_steps", "entropy_weights"}
    unknown = set(case) - set(TIDAL_OPTIONS) - others
    assert not unknown, f"unknown options in a case: {sorted(unknown)}"
    options = {TIDAL_OPTIONS[key]: value for key, value in case.items() if key in TIDAL_OPTIONS}
    clock = Clock(step=case.get("step", 0), total_steps=case.get("max_steps", 1))
    return Tidal(teacher="golden", **options), clock


def _value_and_grad(
    loss: Tidal, clock: Clock, student: Tensor, teacher: Tensor, noised: Noised, entropy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the objective and its gradient to all student logits [samples, length, vocabulary]."""
    leaf = student.clone().requires_grad_(True)
    rows, index = rows_of(noised), noised.row_index
    if entropy is None:
        head = torch.eye(student.shape[-1])
        parts = head_loss(
            HeadInput(hidden=leaf[index], weight=head),
            {"golden": HeadInput(hidden=teacher[index], weight=head)},
            {"tidal": loss},
            rows,
            {"tidal": loss.count(noised)},
            clock,
        )
        objective = parts.objective
    else:  # the reference's dead feature: one more coefficient per row
        values = loss.values(leaf[index], teacher[index], rows, clock)
        objective = (loss.coefficients(rows, clock) * entropy[index] * values).sum() / loss.count(
            noised
        ).float()
    objective.backward()
    assert leaf.grad is not None, "the objective depends on the student"
    return objective.detach(), leaf.grad


def _nearest_to(rounded: Tensor, exact: Tensor) -> Tensor:
    """Return `rounded` where bf16 rounding of a value within tolerance of `exact` gives it, else `exact`."""
    slack = LOSS_TOLERANCE * rounded.abs().max().clamp_min(1.0)
    low, high = (exact - slack).bfloat16().float(), (exact + slack).bfloat16().float()
    return torch.where((low <= rounded) & (rounded <= high), rounded, exact)
