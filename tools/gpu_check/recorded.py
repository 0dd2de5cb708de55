"""A few training steps with everything by which two devices can be compared.

Losses by term, gradient norms, every parameter's gradient of the first step, and how close a mixture's router
came to choosing another expert: a gap of the size of rounding is the one difference that is nobody's fault.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_check.rows import Place
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree, load_recipe
from tide_megatron.train.setup import Setup, set_up
from tide_megatron.train.step import StepResult, train_step

RUNS = Path(__file__).parent / "runs"
LAYOUTS = {
    1: [],
    2: ["teachers.moe.layout.expert=2", "teachers.dense.layout.tensor=2"],
    4: [
        "teachers.moe.layout.expert=4",
        "teachers.dense.layout.tensor=2",
        "teachers.dense.layout.pipeline=2",
        "batch.microbatch=1",
    ],
}
"""Ranks -> how the cross-tokenizer run's teachers are cut over them."""
LARGEST = 1e-5
"""Difference of a first-step gradient or loss, in fp32, relative to the largest."""
LATER = 1e-3
"""Relative difference of the losses after several updates."""


def load_run(name: str, place: Place, *words: str) -> tuple[Recipe, Tree]:
    """Read one of `runs/`, with data and run folder where this check has them; words override."""
    data = f"data.train={place.assets / 'data' / 'pairs'}"
    here = [f"device={place.device}", f"folder={place.scratch / 'run'}", data]
    return load_recipe(RUNS / f"{name}.yaml", [*here, *words])


def record_steps(recipe: Recipe, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Make a recipe's updates and say everything about them; a rank function. All ranks call it together.

    Returns:
        `steps`: loss by term, objective and gradient norm; `gradients` of the first step by parameter,
        summed over ranks, as `encoded`; `router_gap`: the smallest difference between the last score that was
        chosen and the next, over this rank's tokens of the first step (inf without mixtures).
    """
    parts = set_up(recipe, device)
    gaps = watch_routers(parts)
    clock = Clock(total_steps=recipe.steps)
    found: dict[str, Any] = {"steps": []}
    for step in range(recipe.steps):
        result = train_step(parts.run, parts.run.read(parts.loader.update(clock.consumed)), clock)
        found["steps"].append(_figures(result))
        if not step:
            found["gradients"] = gradients_of(parts)
            found["router_gap"] = min((float(gap) for gap in gaps), default=math.inf)
        clock = clock.after_step(applied=result.update.applied, samples=parts.loader.update_samples)
    return found


def _figures(result: StepResult) -> dict[str, Any]:
    return {"terms": result.terms, "objective": result.objective, "grad_norm": result.update.grad_norm}


def gradients_of(parts: Setup) -> dict[str, Any]:
    """Return what the last step left in DDP's buffers, as `encoded`; clipping would have changed it."""
    parameters = parts.run.student.model.named_parameters()
    return {name: encoded(parameter.main_grad) for name, parameter in parameters}


def encoded(tensor: Tensor) -> dict[str, Any]:
    """Write a tensor as JSON values: base64 of little-endian fp32. A rank's answer must not hold tensors."""
    numbers = tensor.detach().float().cpu().numpy().astype("<f4")
    return {"shape": list(tensor.shape), "fp32": base64.b64encode(numbers.tobytes()).decode()}


def decoded(entry: Mapping[str, Any]) -> Tensor:
    """Read what `encoded` wrote."""
    return torch.frombuffer(bytearray(base64.b64decode(entry["fp32"])), dtype=torch.float32).view(
        entry["shape"]
    )


def watch_routers(parts: Setup) -> list[Tensor]:
    """Note the smallest gap of every later call of every teacher's router in the list that is returned."""
    gaps: list[Tensor] = []
    for teacher in parts.run.teachers.values():
        for name, module in teacher.model.named_modules():
            if name.endswith(".router"):
                module.register_forward_pre_hook(lambda module, given: gaps.append(_gap(module, given[0])))
    return gaps


@torch.no_grad()
def _gap(router: Any, states: Tensor) -> Tensor:
    """Return the smallest gap between the last chosen and the next score; scores as the router ranks them."""
    logits = router.gating(states).float().flatten(0, -2)
    scores = logits.sigmoid() if router.score_function == "sigmoid" else logits.softmax(-1)
    if router.expert_bias is not None:
        scores = scores + router.expert_bias
    best = scores.sort(dim=-1, descending=True).values
    return (best[:, router.topk - 1] - best[:, router.topk]).min()


def write_record(found: Mapping[str, Any], file: Path) -> None:
    """Write what `record_steps` returned as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n", encoding="utf-8")


def read_expected(place: Place, name: str) -> dict[str, Any]:
    """Read what `make gpu-assets` recorded of a run."""
    return read_record(place.assets / "expected" / f"{name}.json")


def read_record(file: Path) -> dict[str, Any]:
    """Read what `write_record` wrote."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Compare two records; return the differences, and a fault for each one that is too large.

    A loss's difference is relative to its expected value; a gradient's to the largest entry of all gradients
    (`gradient`), and, for the log only, to that of its own parameter (`gradient_of_own`).
    """
    first, later = _losses(found["steps"], expected["steps"])
    assert found["gradients"].keys() == expected["gradients"].keys(), "other parameters than expected"
    pairs = {
        name: (decoded(found["gradients"][name]), decoded(wanted))
        for name, wanted in expected["gradients"].items()
    }
    largest = max(float(wanted.abs().max()) for _, wanted in pairs.values())
    apart = {name: float((mine - wanted).abs().max()) for name, (mine, wanted) in pairs.items()}
    worst = max(apart, key=lambda name: apart[name])
    own = {name: apart[name] / max(float(wanted.abs().max()), 1e-30) for name, (_, wanted) in pairs.items()}
    figures = {
        "first_loss": first,
        "gradient": apart[worst] / largest,
        "gradient_of_own": max(own.values()),
        "later_losses": later,
        "router_gap": found["router_gap"],
        "expected_router_gap": expected["router_gap"],
    }
    limits = {"first_loss": LARGEST, "gradient": LARGEST, "later_losses": LATER}
    faults = [
        f"{name} differs by {figures[name]:.1e}, more than {limit:.0e}"
        + (f" ({worst})" if name == "gradient" else "")
        for name, limit in limits.items()
        if not figures[name] <= limit
    ]
    return figures, faults


def _losses(found: Sequence[Any], expected: Sequence[Any]) -> tuple[float, float]:
    """Return the largest difference of losses and norms in the first step, and in all later ones.

    A term's is relative to the largest term: one that is nearly 0 is a difference of large numbers.
    """
    apart = [
        max(_relative(mine[name], wanted[name], wanted[name]) for name in ("objective", "grad_norm"))
        for mine, wanted in zip(found, expected, strict=True)
    ]
    terms = expected[0]["terms"]
    largest = max(map(abs, terms.values()))
    first = [_relative(found[0]["terms"][name], value, largest) for name, value in terms.items()]
    return max(apart[0], *first), max(apart[1:], default=0.0)


def _relative(mine: float, wanted: float, scale: float) -> float:
    return abs(mine - wanted) / abs(scale)
