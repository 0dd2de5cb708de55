"""A second folder in the goldens' format: other shapes, vocabularies, temperatures, block sizes and seeds.

Written in fp64 from the formulas of the spec over full tensors, with none of the package's code. It
shows that the replays take everything from the files: a constant of the first folder that slipped in
would fail here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


def write_other_folder(folder: Path) -> None:
    """Write bd3lm_mask, taid, alm, step_bd3lm and step_shared."""
    generator = torch.Generator().manual_seed(1234)
    write_masks(folder / "bd3lm_mask.npz")
    write_tidal(folder / "taid.npz", generator)
    write_calm(folder / "alm.npz", generator)
    write_plain_steps(folder / "step_bd3lm.npz", generator)
    write_shared_steps(folder / "step_shared.npz", generator)


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Store tensors as fp32, int64 or bool arrays, and lists of cases as JSON."""
    plain = {
        key: value.detach().numpy() if isinstance(value, Tensor) else value for key, value in arrays.items()
    }
    narrow = {
        k: v.astype(np.float32) if getattr(v, "dtype", None) == np.float64 else v for k, v in plain.items()
    }
    np.savez(
        path,
        **{k: np.array(json.dumps(v)) if k == "cases_json" else np.asarray(v) for k, v in narrow.items()},
    )


def attention(length: int, block: int, clean_first: bool = False) -> Tensor:
    """Spell the block-diffusion rule out for every pair."""
    place = range(2 * length)
    clean = [(p >= length) != clean_first for p in place]
    number = [p % length // block for p in place]

    def allowed(q: int, k: int) -> bool:
        if clean[q] == clean[k]:
            return number[k] <= number[q] if clean[q] else number[k] == number[q]
        return not clean[q] and number[k] < number[q]

    return torch.tensor([[allowed(q, k) for k in place] for q in place])


def write_masks(path: Path) -> None:
    """Masks of lengths and blocks the first folder does not have."""
    arrays = {}
    for length, block in ((9, 3), (7, 2)):
        arrays[f"n{length}_bs{block}_xtx0"] = attention(length, block)
        arrays[f"n{length}_bs{block}_x0xt"] = attention(length, block, clean_first=True)
    save(path, arrays)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw logits that fp32 holds exactly, as fp64."""
    return (torch.randn(*shape, generator=generator) * 2).double()


def tidal_values(student: Tensor, teacher: Tensor, share: Tensor, temperature: float, columns: int) -> Tensor:
    """TIDAL per position over full tensors."""
    s, t = student[..., :columns] / temperature, teacher[..., :columns] / temperature
    r = ((1 - share[:, None, None]) * s + share[:, None, None] * t).detach().softmax(-1)
    return temperature**2 * (r * (r.clamp_min(1e-8).log() - s.log_softmax(-1))).sum(-1)


def share_of(case: dict[str, Any], time: Tensor) -> Tensor:
    """Lambda of a case at each noise level."""
    done = case["step"] / case["max_steps"]
    grown = (1 - math.cos(math.pi * done)) / 2 if case["lambda_decay"] == "cosine" else done
    trained = case["lambda_init"] + (case["lambda_max"] - case["lambda_init"]) * grown
    axes = {"both": trained * (1 - time), "training_only": trained + 0 * time}
    return axes.get(case["axis_mode"], case["lambda_max"] * (1 - time))


def midrange(time: Tensor) -> Tensor:
    """Weight of the middle noise levels."""
    return torch.exp(-((time - 0.5) ** 2) / (2 * 0.15**2))


_COMMON = {
    "temperature": 3.0,
    "shared_vocab_size": 8,
    "lambda_init": 0.2,
    "lambda_max": 0.7,
    "max_steps": 11,
}
_VARIED = [
    {
        "axis_mode": axis,
        "lambda_decay": growth,
        "timestep_weight": weight,
        "step": step,
        "entropy_weights": dead,
    }
    for axis, growth, weight, step, dead in (
        ("both", "cosine", "uniform", 4, False),
        ("training_only", "linear", "midrange", 9, False),
        ("timestep_only", "cosine", "midrange", 0, True),
    )
]
TIDAL_CASES: list[dict[str, Any]] = [{"id": number, **_COMMON, **case} for number, case in enumerate(_VARIED)]
TIDAL_DEFAULTS = {
    "temperature": 2.0,
    "shared_vocab_size": 13,
    "lambda_decay": "cosine",
    "lambda_init": 0.1,
    "lambda_max": 0.9,
}
TIDAL_NAMED = {
    "lam0": {
        "axis_mode": "training_only",
        "lambda_init": 0.0,
        "lambda_max": 0.0,
        "step": 5,
        "max_steps": 10,
    },
    "lam1": {
        "axis_mode": "training_only",
        "lambda_init": 1.0,
        "lambda_max": 1.0,
        "step": 5,
        "max_steps": 10,
    },
    "bf16": {"axis_mode": "both", "timestep_weight": "midrange", "step": 37, "max_steps": 100},
    "mixed": {"axis_mode": "both", "timestep_weight": "midrange", "step": 37, "max_steps": 100},
}


def write_tidal(path: Path, generator: torch.Generator) -> None:
    """Two samples of seven positions over 13 ids; T = 3, steps of 11."""
    student, teacher = draw(generator, 2, 7, 13), draw(generator, 2, 7, 13)
    mask, time = torch.rand(2, 7, generator=generator) < 0.6, torch.tensor([0.35, 0.8])
    entropy = torch.rand(2, 7, generator=generator)
    arrays: dict[str, Any] = {
        "student_logits": student,
        "teacher_logits": teacher,
        "masked_mask": mask,
        "t": time,
        "entropy_weights": entropy,
        "emptymask_loss": 0.0,
    }
    rounded = student.bfloat16().double(), teacher.bfloat16().double()
    arrays |= {"bf16_student_logits": rounded[0], "bf16_teacher_logits": rounded[1]}
    inputs = {"bf16": rounded, "mixed": (student, rounded[1])}
    for tag, case in [(f"case{case['id']}", case) for case in TIDAL_CASES] + list(TIDAL_NAMED.items()):
        whole = {**TIDAL_DEFAULTS, **case}
        ours, theirs = inputs.get(tag, (student, teacher))
        leaf = ours.clone().requires_grad_(True)
        share = share_of(whole, time.double())
        values = tidal_values(leaf, theirs, share, whole["temperature"], whole["shared_vocab_size"])
        weight = midrange(time.double())[:, None] if whole.get("timestep_weight") == "midrange" else 1.0
        weight = weight * (entropy.double() if whole.get("entropy_weights") else 1.0)
        loss = (values * weight * mask).sum() / mask.sum()
        loss.backward()
        grad = leaf.grad.bfloat16().double() if tag == "bf16" else leaf.grad
        arrays |= {f"{tag}_loss": loss, f"{tag}_grad": grad}
    save(path, {**arrays, "cases_json": TIDAL_CASES})


def write_calm(path: Path, generator: torch.Generator) -> None:
    """Three samples, 9 against 11 tokens, 7 against 5 ids, T = 3."""
    logits = {"student": draw(generator, 3, 9, 7), "teacher": draw(generator, 3, 11, 5)}
    ids = {side: torch.randint(z.shape[-1], z.shape[:2], generator=generator) for side, z in logits.items()}
    align = {
        side: torch.nn.functional.one_hot(torch.arange(z.shape[1]) * 4 // z.shape[1], 4)
        .bool()
        .repeat(3, 1, 1)
        for side, z in logits.items()
    }
    mask = torch.rand(3, 4, generator=generator) < 0.7
    weights = torch.rand(3, 4, generator=generator)
    leaf = logits["student"].requires_grad_(True)

    def likelihood(side: str, temperature: float) -> Tensor:
        tokens = logits[side].log_softmax(-1).gather(-1, ids[side][..., None])[..., 0]
        sums = torch.einsum("bl,blc->bc", tokens, align[side].double())
        return (sums / temperature).exp().clamp(1e-7, 1 - 2.0**-23)

    arrays: dict[str, Any] = {"chunk_mask": mask, "chunk_weights": weights, "nochunk_loss": 0.0}
    for side in ("student", "teacher"):
        arrays |= {
            f"{side}_logits": logits[side],
            f"{side}_input_ids": ids[side],
            f"align_{side}": align[side],
        }
    for direction, temperature, kind in (("forward", 3, "now"), ("reverse", 3, "w"), ("reverse", 1, "now")):
        s, t = likelihood("student", temperature), likelihood("teacher", temperature)
        one, two = (t, s) if direction == "forward" else (s, t)
        values = -(one * two.log() + (1 - one) * (1 - two).log())
        loss = (values * mask * (weights.double() if kind == "w" else 1.0)).sum() / mask.sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        arrays |= {
            f"{direction}_T{temperature}_{kind}_loss": loss,
            f"{direction}_T{temperature}_{kind}_grad": grad,
        }
    save(path, arrays)


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


def noise(draws: tuple[Tensor, Tensor], labels: Tensor, scheduler: str) -> tuple[Tensor, Tensor, Tensor]:
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
    options |= {"kl_temperature": 1.5, "global_step": 5, "max_steps": 20, "demo": False}
    cases = []
    for mode, order in (("kl", "xt_x0"), ("reverse_kl", "x0_xt"), ("taid+kl", "x0_xt")):
        tag = f"{mode}_{order}"
        draws = torch.rand(2, generator=generator), torch.rand(2, 10, generator=generator)
        time, hidden, weight = noise(draws, labels, "linear")
        noisy = {side: torch.where(hidden, masks[side], ids) for side in models}
        shown = torch.cat([noisy["student"], ids], 1)
        halves = [noisy["teacher"], ids] if order == "xt_x0" else [ids, noisy["teacher"]]
        theirs = forward(models["teacher"], torch.cat(halves, 1))
        theirs = theirs[:, :10] if order == "xt_x0" else theirs[:, 10:]
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
        arrays |= {f"{tag}_u0": draws[0], f"{tag}_u1": draws[1], f"{tag}_student_input_ids": shown}
        arrays[f"{tag}_teacher0_input_ids"] = torch.cat(halves, 1)
        cases.append({"tag": tag, "mode": mode, "concat_order": order, **options})
    save(path, {**arrays, "cases_json": cases})
