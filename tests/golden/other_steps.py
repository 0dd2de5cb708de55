"""Files of a second goldens folder that hold whole steps over one tokenization: cross-entropy, KL, TIDAL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden.other_formulas import attention, draw, save, tidal_values

IGNORED = -100


def tables(generator: torch.Generator, vocabulary: int, length: int) -> dict[str, Tensor]:
    """Draw a table model."""
    shapes = {"E": vocabulary, "P": length, "C": vocabulary}
    return {letter: draw(generator, rows, vocabulary) for letter, rows in shapes.items()}


def forward(model: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Evaluate a table model."""
    return model["E"][ids] + model["P"][: ids.shape[1]] + model["C"][ids].mean(1, keepdim=True)


def sample_text(
    generator: torch.Generator, samples: int, length: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Draw ids below the mask ids, and labels with prompts of unequal length."""
    ids = torch.randint(vocabulary - 2, (samples, length), generator=generator)
    labels = ids.clone()
    for sample in range(samples):
        labels[sample, : 2 + sample] = IGNORED
    return ids, labels


def noise(draws: Sequence[Tensor], labels: Tensor, scheduler: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return time, hidden set and loss weight; fp32, because comparisons with uniforms decide."""
    time = 1e-3 + (1 - 1e-3) * draws[0]
    if scheduler == "linear":
        alpha, slope = 1 - time, torch.ones_like(time)
    else:
        angle = math.pi / 2 * (1 - time)
        alpha, slope = 1 - torch.cos(angle), math.pi / 2 * torch.sin(angle)
    hidden = (draws[1] < (1 - alpha)[:, None]) & (labels != IGNORED)
    return time.double(), hidden, (slope / (1 - alpha + 1e-6)).double()


def cross_entropy(
    z: Tensor, ids: Tensor, labels: Tensor, hidden: Tensor, weight: Tensor, norm: str
) -> Tensor:
    """Cross-entropy over full logits [samples, length, vocabulary]."""
    nll = -z.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * weight[:, None] * hidden
    able = (labels != IGNORED).sum(-1)
    by_norm = {
        "token": nll.sum() / able.sum(),
        "sequence": (nll.sum(-1) / able).mean(),
        "batch": nll.sum() / len(z),
    }
    return by_norm[norm]


def answer(
    read: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor, first: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Return a teacher's inputs and logits [samples, length, vocabulary]; `first`: what pass 1 shows."""
    if first is None:
        shown, logits = read(hidden)
        return [shown], logits
    (one, early), (two, late) = read(hidden & ~first), read(hidden & first)
    return [one, two], torch.where((hidden & first)[..., None], late, early)


def block_teacher(
    model: dict[str, Tensor], ids: Tensor, mask_id: int, order: str
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what reads both halves of `ids`, in an order, and answers for the noisy one."""

    def read(hidden: Tensor) -> tuple[Tensor, Tensor]:
        noisy = torch.where(hidden, mask_id, ids)
        shown = torch.cat([noisy, ids] if order == "xt_x0" else [ids, noisy], 1)
        logits = forward(model, shown)
        length = ids.shape[1]
        return shown, logits[:, :length] if order == "xt_x0" else logits[:, length:]

    return read


def write_plain_steps(path: Path, generator: torch.Generator) -> None:
    """Two samples of nine tokens over 12 ids, blocks of 5."""
    ids, labels = sample_text(generator, 2, 9, 12)
    model, mask_id = tables(generator, 12, 18), 10
    arrays: dict[str, Any] = {"in_input_ids": ids, "in_labels": labels, "student_mask_id": mask_id}
    arrays |= {f"student_{letter}": table for letter, table in model.items()}
    cases = []
    for number, (scheduler, kind, norm, shift) in enumerate(
        [
            ("linear", "scheduler", "token", False),
            ("cosine", "scheduler", "sequence", True),
            ("linear", "uniform", "batch", True),
        ]
    ):
        tag = f"number{number}"
        draws = torch.rand(2, generator=generator), torch.rand(2, 9, generator=generator)
        _, hidden, weight = noise(draws, labels, scheduler)
        shown = torch.cat([torch.where(hidden, mask_id, ids), ids], 1)
        leaf = forward(model, shown).requires_grad_(True)
        seen = torch.cat([leaf[:, :1], leaf[:, :-1]], 1) if shift else leaf
        weight = weight if kind == "scheduler" else torch.ones_like(weight)
        loss = cross_entropy(seen[:, :9], ids, labels, hidden, weight, norm)
        loss.backward()
        arrays |= {
            f"{tag}_u0": draws[0],
            f"{tag}_u1": draws[1],
            f"{tag}_loss": loss,
            f"{tag}_grad": leaf.grad,
        }
        arrays["student_input_ids"] = shown
        case = {"tag": tag, "scheduler": scheduler, "loss_weight_type": kind, "loss_norm_type": norm}
        cases.append({**case, "right_shift_logits": shift, "block_size": 5})
    save(path, {**arrays, "cases_json": cases})


def write_shared_steps(path: Path, generator: torch.Generator) -> None:
    """Two samples of ten tokens over 14 ids, blocks of 3, SV = 9, T = 1.5, step 5 of 20."""
    ids, labels = sample_text(generator, 2, 10, 14)
    models = {side: tables(generator, 14, 20) for side in ("student", "teacher")}
    masks = {"student": 12, "teacher": 13}
    lowest = torch.finfo(torch.float32).min
    arrays: dict[str, Any] = {"in_input_ids": ids, "in_labels": labels}
    arrays["student_attention_mask"] = attention(10, 3)[None, None]
    for side, model in models.items():
        arrays[f"{side}_mask_id"] = masks[side]
        arrays |= {f"{side}_{letter}": table for letter, table in model.items()}
    for order in ("xt_x0", "x0_xt"):
        forbidden = ~attention(10, 3, clean_first=order == "x0_xt")[None, None]
        arrays[f"teacher_attention_mask_{order}"] = torch.zeros(forbidden.shape).masked_fill(
            forbidden, lowest
        )
    options = {
        "shared_vocab_size": 9,
        "taid_timestep_weight": "uniform",
        "taid_weight": 0.6,
        "kl_weight": 0.2,
    }
    options |= {"kl_temperature": 1.5, "global_step": 5, "max_steps": 20}
    cases = []
    for mode, order, demo in (
        ("kl", "xt_x0", False),
        ("reverse_kl", "x0_xt", False),
        ("taid+kl", "x0_xt", False),
        ("taid", "xt_x0", True),
        ("reverse_kl", "x0_xt", True),
    ):
        tag = f"{mode}_{demo}_{order}"
        draws = [torch.rand(2, generator=generator), *torch.rand(2, 2, 10, generator=generator)][: 2 + demo]
        time, hidden, weight = noise(draws, labels, "linear")
        shown = torch.cat([torch.where(hidden, masks["student"], ids), ids], 1)
        read = block_teacher(models["teacher"], ids, masks["teacher"], order)
        inputs, theirs = answer(read, hidden, draws[2] < 0.5 if demo else None)
        leaf = forward(models["student"], shown).requires_grad_(True)
        ours = leaf[:, :10]
        values = {"ce": cross_entropy(ours, ids, labels, hidden, weight, "token")}
        s, t = (z[..., :9].div(1.5).log_softmax(-1) for z in (ours, theirs))
        share = (0.1 + 0.8 * (1 - math.cos(math.pi / 4)) / 2) * (1 - time)
        by_position = {
            "kl": 2.25 * (t.exp() * (t - s)).sum(-1),
            "reverse_kl": 2.25 * (s.exp() * (s - t)).sum(-1),
            "taid": tidal_values(ours, theirs, share, 1.5, 9),
        }
        factor = {"ce": 1.0, "kl": 0.2, "reverse_kl": 0.2, "taid": 0.6}
        values |= {name: (by_position[name] * hidden).sum() / hidden.sum() for name in mode.split("+")}
        loss = sum(factor[name] * value for name, value in values.items())
        loss.backward()
        logged = {name: value * (factor[name] if "+" in mode else 1.0) for name, value in values.items()}
        arrays |= {f"{tag}_log_{name}_loss": value for name, value in logged.items()}
        arrays |= {f"{tag}_loss": loss, f"{tag}_log_loss": loss, f"{tag}_student_grad": leaf.grad}
        arrays |= {f"{tag}_u{number}": values for number, values in enumerate(draws)}
        arrays |= {f"{tag}_teacher{number}_input_ids": values for number, values in enumerate(inputs)}
        arrays[f"{tag}_student_input_ids"] = shown
        cases.append({"tag": tag, "mode": mode, "concat_order": order, "demo": demo, **options})
    save(path, {**arrays, "cases_json": cases})
