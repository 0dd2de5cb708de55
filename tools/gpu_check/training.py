"""Training as users start it, held to what a CPU gives in fp32."""

from __future__ import annotations

import json
from typing import Any

from gpu_check.recorded import RUNS, compare, load_run, read_expected, record_steps
from gpu_check.rows import Place, Row, judged
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

NEAR = 0.01
"""Nats a byte between the ends of a bf16 run on this device and an fp32 one on a CPU, at most."""


def check_steps(place: Place, name: str, attention: str, form: str) -> list[Row]:
    """Make six SGD steps with one attention kernel and one head form, first gradients and all losses."""
    kernel, note = attention, ""
    if place.is_rehearsal and attention == "flex":  # no backward on a CPU
        kernel, note = "structured", "structured ran in flex's place, "
    expected = read_expected(place, name)
    recipe, _ = load_run(name, place, f"attention={kernel}", f"head.form={form}", *expected["words"])
    figures, faults = compare(run_ranks(record_steps, (recipe,), 1, place.device), expected)
    text = (
        f"{note}first losses {figures['first_loss']:.1e} and gradients {figures['gradient']:.1e} from the "
        f"CPU's, later losses {figures['later_losses']:.1e}, smallest router gap {figures['router_gap']:.1e}"
    )
    return [judged(f"{name} {attention} {form}", text, faults, **figures)]


def quickstart(place: Place, *words: str) -> dict[str, Any]:
    """Run the quickstart's recipe with both teachers on one rank; return what training returns."""
    data = place.assets / "data"
    here = [f"device={place.device}", f"folder={place.scratch / 'quickstart'}"]
    here += [f"data.train={data / 'pairs'}", f"data.held_out={data / 'held_out'}"]
    recipe, tree = load_recipe(RUNS / "quickstart.yaml", [*here, *words])
    result: dict[str, Any] = run_ranks(train, (recipe, tree, False), 1, place.device)
    assert result["finished"], "the run was stopped"
    return result


def check_quickstart(place: Place) -> list[Row]:
    """Hold the quickstart's run in bf16 to the CPU's in fp32, by what the student is worth at the end."""
    expected = json.loads((place.assets / "expected" / "quickstart.json").read_text(encoding="utf-8"))
    precision = [f"{model}.precision=bf16" for model in ("student", "teachers.moe", "teachers.dense")]
    near = NEAR
    if place.is_rehearsal:  # a few steps on a few samples, and a CPU that is slow in bf16
        precision, near = precision[:1], 0.1
    result = quickstart(place, *expected["words"], *precision)
    words = ", ".join(expected["words"])
    score, wanted = result["nll_per_byte"], expected["nll_per_byte"]
    text = f"bf16 ends at {score:.4f} nats/byte, the CPU's fp32 at {wanted:.4f} ({words})"
    faults = [] if abs(score - wanted) <= near else [f"{abs(score - wanted):.4f} apart, more than {near}"]
    return [
        judged(
            "quickstart bf16", text, faults, nll_per_byte=score, expected=wanted, seconds=result["seconds"]
        )
    ]
