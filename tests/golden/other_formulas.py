"""Files of a second goldens folder that hold single formulas: masks, TIDAL, the CALM family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
