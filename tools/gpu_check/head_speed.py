"""The head loss at the paper's vocabularies: milliseconds over the floor of its four products, and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bench.head_case import Case, Setting, draw_case
from bench.head_loss import Way, our_work
from gpu_check.rows import Place, Row, judged
from gpu_check.timing import milliseconds, peak_gib

VOCABULARIES = (151_936, 157_184)
"""Of Qwen3 and WeDLM, and of LLaDA2; both heads have the same."""
COPIES = {850: 2, 3_400: 8}
"""Rows -> how often the drawn text, which hides about 425 tokens, is repeated."""
WAYS = {
    "fused eager": Way(budget_mib=None),
    "fused compiled": Way(budget_mib=None, compiled=True),
    "plain": Way(form="plain"),
}
CALLS = 5
NEAR = 2e-2
"""Relative difference of two forms' objectives in bf16, at most."""


def check_head(place: Place) -> list[Row]:
    """Time every form on every size; a size is a row."""
    small = place.is_rehearsal
    sizes = [(vocabulary, rows) for vocabulary in VOCABULARIES for rows in COPIES]
    if small:
        sizes = [(2_048, 850)]
    device = torch.device(place.device)
    return [time_head(vocabulary, rows, device) for vocabulary, rows in sizes]


def time_head(vocabulary: int, rows: int, device: torch.device, teacher_hidden: int = 1_024) -> Row:
    """Time all forms on one size, beside the floor."""
    setting = Setting(
        loss="tidal",
        vocabulary=vocabulary,
        shared=vocabulary - 290,
        seed=5,
        copies=COPIES[rows],
        teacher_hidden=teacher_hidden,
    )
    if device.type == "cpu":
        setting = dataclasses.replace(setting, hidden=64, teacher_hidden=64, precision="fp32")
    case = on(draw_case(setting), device)
    floor = milliseconds(case.floor(), device, calls=CALLS)
    figures: dict[str, Any] = {
        "floor_ms": floor,
        "rows": int(case.text.masked.sum()),
        "vocabulary": vocabulary,
    }
    objectives = {}
    for name, way in WAYS.items():
        if way.compiled and device.type == "cpu":
            continue  # it takes tens of seconds to compile there
        work = our_work(case, way)
        objectives[name] = float(work()[0])
        found = milliseconds(work, device, calls=CALLS)
        figures[name] = {"ms": found, "over_floor": found / floor, "peak_gib": peak_gib(work, device)}
    seen = [
        f"{name} {figures[name]['ms']:.1f} ms ({figures[name]['over_floor']:.1f}x{_memory(figures[name])})"
        for name in objectives
    ]
    text = f"V {vocabulary}, {figures['rows']} rows: floor {floor:.1f} ms, {', '.join(seen)}"
    wanted = objectives["plain"]
    faults = [
        f"{name}'s objective {value:.5f} is not the plain form's {wanted:.5f}"
        for name, value in objectives.items()
        if not abs(value - wanted) <= NEAR * abs(wanted)
    ]
    return judged("head speed", text, faults, **figures)


def _memory(found: dict[str, Any]) -> str:
    return "" if found["peak_gib"] is None else f", {found['peak_gib']:.2f} GiB"


def on(case: Case, device: torch.device) -> Case:
    """Return a case whose tensors are on a device; the counts stay, as a run's do."""
    return dataclasses.replace(
        case,
        text=_moved(case.text, device),
        student=_moved(case.student, device),
        teacher=_moved(case.teacher, device),
        gradient=case.gradient.to(device),
    )


def _moved(value: Any, device: torch.device) -> Any:
    """Return a dataclass whose tensor fields are on a device."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(
        value, **{name: entry.to(device) for name, entry in fields.items() if isinstance(entry, Tensor)}
    )
