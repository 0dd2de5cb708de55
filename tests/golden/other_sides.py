"""Files of a second goldens folder that hold whole steps over two tokenizations: chunks, or pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden.other_formulas import attention, midrange, save, tidal_values
from tests.golden.other_steps import (
    IGNORED,
    answer,
    block_teacher,
    cross_entropy,
    forward,
    noise,
    sample_text,
    tables,
)

CROSS_COLUMNS = [
    [((1, 3), (0, 2)), ((3, 4), (2, 5)), ((4, 7), (5, 6)), ((8, 11), (9, 12)), ((11, 13), (12, 12))],
    [((2, 4), (1, 2)), ((5, 6), (3, 4)), ((6, 8), (4, 9))],
    [],
    [((4, 6), (2, 3)), ((7, 12), (3, 8))],
]
"""(student run, teacher run) of each chunk; one reaches into a prompt, one lost its teacher side."""
CROSS_OVERLAP = [*CROSS_COLUMNS[:3], [((5, 9), (2, 6)), ((7, 12), (4, 8))]]
"""The same with two ranges that overlap on both sides."""
CROSS_CASES = [
    {"mode": "alm", "demo": False, "loss_norm_type": "batch", "taid_axis_mode": "both"},
    {"mode": "reverse_alm", "demo": True, "loss_norm_type": "token", "taid_axis_mode": "both"},
    {"mode": "alm_taid", "demo": True, "loss_norm_type": "sequence", "taid_axis_mode": "timestep_only"},
    {"mode": "reverse_alm_taid", "demo": False, "loss_norm_type": "token", "taid_axis_mode": "training_only"},
    {"mode": "alm_taid", "demo": False, "loss_norm_type": "token", "taid_axis_mode": "both"},
]
LENGTH, TEACHER_LENGTH = 13, 12


def write_cross_steps(
    path: Path, generator: torch.Generator, columns: list[list[Any]] = CROSS_COLUMNS
) -> None:
    """Four samples of 13 and 12 tokens over 11 and 15 ids, blocks of 4, T = 3, step 3 of 7."""
    ids, labels = sample_text(generator, 4, LENGTH, 11)
    models = {"student": tables(generator, 11, 26), "teacher": tables(generator, 15, TEACHER_LENGTH)}
    masks = {"student": 9, "teacher": 14}
    others = torch.randint(14, (4, TEACHER_LENGTH), generator=generator)
    student = torch.zeros(4, LENGTH, 6, dtype=torch.bool)
    teacher = torch.zeros(4, TEACHER_LENGTH, 6, dtype=torch.bool)
    for sample, runs in enumerate(columns):
        for column, (mine, theirs) in enumerate(runs):
            student[sample, slice(*mine), column] = True
            teacher[sample, slice(*theirs), column] = True
    real = torch.arange(TEACHER_LENGTH) < torch.tensor([12, 10, 7, 9])[:, None]
    seen = real[:, None, :, None] & real[:, None, None, :]
    arrays: dict[str, Any] = {
        "in_input_ids": ids,
        "in_labels": labels,
        "in_teacher_input_ids": others,
        "in_teacher_attention_mask": real.long(),
        "in_alignment_matrix_student": student,
        "in_alignment_matrix_teacher": teacher,
        "student_attention_mask": attention(LENGTH, 4)[None, None],
        "student_position_ids": torch.arange(LENGTH).repeat(2).expand(4, -1),
        "teacher_attention_mask": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    }
    for side, model in models.items():
        arrays[f"{side}_mask_id"] = masks[side]
        arrays |= {f"{side}_{letter}": table for letter, table in model.items()}
    cases = []
    for number, varied in enumerate(CROSS_CASES):
        case = {"tag": f"case{number}", "loss_weight_type": "scheduler", "taid_timestep_weight": "midrange"}
        case |= {"alm_temperature": 3.0, "global_step": 3, "max_steps": 7, **varied}
        draws = [
            torch.rand(4, generator=generator),
            torch.rand(4, LENGTH, generator=generator),
            torch.rand(4, 6, generator=generator),
        ][: 3 if case["demo"] else 2]
        arrays |= {f"case{number}_u{place}": values for place, values in enumerate(draws)}
        arrays |= cross_case(case, draws, (ids, labels, others), (student, teacher), (models, masks))
        cases.append(case)
    save(path, {**arrays, "cases_json": cases})


def cross_case(
    case: dict[str, Any],
    draws: list[Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    align: tuple[Tensor, Tensor],
    sides: tuple[dict[str, dict[str, Tensor]], dict[str, int]],
) -> dict[str, Any]:
    """Work one case out over dense matrices."""
    (ids, labels, others), (student, teacher), (models, masks) = tokens, align, sides
    time, hidden, weight = noise(draws, labels, "linear")
    touched = (hidden[..., None] & student).any(1)  # [samples, columns]
    hidden |= (touched[:, None] & student).any(-1) & (labels != IGNORED)
    active = touched & ~((labels == IGNORED)[..., None] & student).any(1)
    shown = torch.cat([torch.where(hidden, masks["student"], ids), ids], 1)

    def read(unseen: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.where(unseen, masks["teacher"], others)
        return seen, forward(models["teacher"], seen)

    def members(chunks: Tensor) -> Tensor:
        return (chunks[:, None] & teacher).any(-1)

    if case["demo"]:
        one, two = members(touched & (draws[2] < 0.5)), members(touched & (draws[2] >= 0.5))
        (early, theirs), (late, logits) = read(two), read(one)
        inputs, theirs = [early, late], torch.where(one[..., None], logits, theirs)
    else:
        inputs, theirs = answer(read, members(touched), None)
    leaf = forward(models["student"], shown).requires_grad_(True)
    parts = {"ce": cross_entropy(leaf[:, :LENGTH], ids, labels, hidden, weight, case["loss_norm_type"])}
    s = chunk_likelihood(leaf[:, :LENGTH], ids, student, case["alm_temperature"])
    t = chunk_likelihood(theirs, others, teacher, case["alm_temperature"])
    done = (1 - math.cos(math.pi * case["global_step"] / case["max_steps"])) / 2
    trained, factor = 0.1 + 0.8 * done, torch.ones_like(time)
    if "taid" in case["mode"]:
        axes = {"both": trained * (1 - time), "training_only": trained + 0 * time}
        share = axes.get(case["taid_axis_mode"], 0.9 * (1 - time))[:, None]
        t = ((1 - share) * s + share * t).detach().clamp(1e-7, 1 - 2.0**-23)
        factor = midrange(time)
    one, two = (s, t) if "reverse" in case["mode"] else (t, s)
    values = -(one * two.log() + (1 - one) * (1 - two).log()) * factor[:, None]
    parts[case["mode"]] = (values * active).sum() / active.sum()
    loss = sum(parts.values())
    loss.backward()
    tag = case["tag"]
    logged = {f"{tag}_log_{name}_loss": value for name, value in parts.items()}
    if "taid" in case["mode"]:
        logged[f"{tag}_log_lambda_train"] = trained
    read_by = {f"{tag}_teacher{place}_input_ids": values for place, values in enumerate(inputs)}
    return {
        **logged,
        **read_by,
        f"{tag}_loss": loss,
        f"{tag}_log_loss": loss,
        f"{tag}_student_grad": leaf.grad,
        f"{tag}_student_input_ids": shown,
    }


def chunk_likelihood(logits: Tensor, ids: Tensor, align: Tensor, temperature: float) -> Tensor:
    """Softened likelihood of each column's tokens, [samples, columns]."""
    tokens = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    sums = torch.einsum("bl,blc->bc", tokens, align.double())
    return (sums / temperature).exp().clamp(1e-7, 1 - 2.0**-23)


ALIGNED_CASES = [
    ("kl_aligned", "x0_xt", False),
    ("reverse_kl_aligned", "xt_x0", True),
    ("taid_aligned", "x0_xt", True),
    ("taid_aligned+kl_aligned", "xt_x0", False),
]


def write_aligned_steps(path: Path, generator: torch.Generator) -> None:
    """Three samples of 11 and 15 tokens over 13 ids, blocks of 5, SV = 10, T = 1.5, step 2 of 9."""
    ids, labels = sample_text(generator, 3, 11, 13)
    others = torch.randint(11, (3, 15), generator=generator)
    mine, theirs, count = (
        torch.zeros(3, 7, dtype=torch.int64),
        torch.zeros(3, 7, dtype=torch.int64),
        [7, 0, 4],
    )
    for sample, pairs in enumerate(count):
        mine[sample, :pairs] = torch.arange(pairs) + 4
        theirs[sample, :pairs] = torch.arange(pairs) + 6 - sample
        others[sample, theirs[sample, :pairs]] = ids[sample, mine[sample, :pairs]]
    models = {"student": tables(generator, 13, 22), "teacher": tables(generator, 13, 30)}
    masks = {"student": 11, "teacher": 12}
    real = torch.arange(15) < torch.tensor([15, 10, 12])[:, None]
    arrays: dict[str, Any] = {
        "in_input_ids": ids,
        "in_labels": labels,
        "in_teacher_input_ids": others,
        "in_teacher_attention_mask": real.long(),
        "in_align_student": mine,
        "in_align_teacher": theirs,
        "in_n_aligned": torch.tensor(count),
    }
    for side, model in models.items():
        arrays[f"{side}_mask_id"] = masks[side]
        arrays |= {f"{side}_{letter}": table for letter, table in model.items()}
    both = real.repeat(1, 2)
    for order in ("xt_x0", "x0_xt"):
        seen = attention(15, 5, clean_first=order == "x0_xt")[None] & both[:, None] & both[..., None]
        lowest = torch.finfo(torch.float32).min
        arrays[f"teacher_attention_mask_{order}"] = torch.zeros(seen.shape).masked_fill(~seen, lowest)[
            :, None
        ]
    cases = []
    for mode, order, demo in ALIGNED_CASES:
        case = {"tag": f"{mode}_{order}", "mode": mode, "concat_order": order, "demo": demo}
        case |= {"shared_vocab_size": 10, "taid_timestep_weight": "midrange", "kl_temperature": 1.5}
        case |= {"taid_weight": 0.6, "kl_weight": 0.2, "global_step": 2, "max_steps": 9}
        draws = [torch.rand(3, generator=generator), *torch.rand(2, 3, 11, generator=generator)][: 2 + demo]
        arrays |= {f"{case['tag']}_u{place}": values for place, values in enumerate(draws)}
        read = block_teacher(models["teacher"], others, masks["teacher"], order)
        pairs = [(s, int(mine[s, p]), int(theirs[s, p])) for s, n in enumerate(count) for p in range(n)]
        arrays |= aligned_case(case, draws, (ids, labels, pairs), (models["student"], 11), read)
        cases.append(case)
    save(path, {**arrays, "cases_json": cases})


def aligned_case(
    case: dict[str, Any],
    draws: list[Tensor],
    tokens: tuple[Tensor, Tensor, list[tuple[int, int, int]]],
    student: tuple[dict[str, Tensor], int],
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """Work one case out pair by pair."""
    (ids, labels, pairs), (model, mask_id) = tokens, student
    time, hidden, weight = noise(draws, labels, "linear")
    shown = torch.cat([torch.where(hidden, mask_id, ids), ids], 1)
    kept = [pair for pair in pairs if hidden[pair[0], pair[1]]]
    unseen, first = torch.zeros(3, 15, dtype=torch.bool), torch.zeros(3, 15, dtype=torch.bool)
    for sample, position, place in kept:
        unseen[sample, place] = True
        first[sample, place] = case["demo"] and bool(draws[2][sample, position] < 0.5)
    inputs, theirs = answer(read, unseen, first if case["demo"] else None)
    leaf = forward(model, shown).requires_grad_(True)
    sample, position, place = (torch.tensor(column) for column in zip(*kept, strict=True))
    a, b, level = leaf[sample, position], theirs[sample, place], time[sample]
    s, t = (z[:, :10].div(1.5).log_softmax(-1) for z in (a, b))
    share = (0.1 + 0.8 * (1 - math.cos(math.pi * 2 / 9)) / 2) * (1 - level)
    by_name = {
        "kl": 0.2 * 2.25 * (t.exp() * (t - s)).sum(-1),
        "reverse_kl": 0.2 * 2.25 * (s.exp() * (s - t)).sum(-1),
        "taid": 0.6 * midrange(level) * tidal_values(a[:, None], b[:, None], share, 1.5, 10)[:, 0],
    }
    names = [name.removesuffix("_aligned") for name in case["mode"].split("+")]
    parts = {"ce": cross_entropy(leaf[:, : ids.shape[1]], ids, labels, hidden, weight, "token")}
    parts |= {name: by_name[name].mean() for name in names}
    loss = sum(parts.values())
    loss.backward()
    tag = case["tag"]
    return {
        **{f"{tag}_log_{name}_loss": value for name, value in parts.items()},
        **{f"{tag}_teacher{number}_input_ids": values for number, values in enumerate(inputs)},
        f"{tag}_log_n_aligned_masked": float(len(kept)),
        f"{tag}_log_n_aligned_total": float(len(pairs)),
        f"{tag}_loss": loss,
        f"{tag}_log_loss": loss,
        f"{tag}_student_grad": leaf.grad,
        f"{tag}_student_input_ids": shown,
    }
