"""Parts of a step at the paper's sizes on one GPU: linears, a mixture layer, the head, teacher forwards.

Each pair that is compared has the same weights and inputs, and how far the answers are apart is told with the
times; answers that have nothing to do with each other fail the row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from bench.gpu_ways import (
    LENGTH,
    SAMPLES,
    SMALL_MIXTURE,
    Pipeline,
    architecture_of,
    asked,
    require_room,
    setting_of,
    timed,
    weight_bytes,
)
from bench.shapes import LLADA2_MINI, WEDLM_8B
from bench.step_case import TEACHER, Setting, batch_of, draw_there, make_teacher_model, view_builder_of
from gpu_check.head_speed import time_head
from gpu_check.rows import Place, Row, judged
from gpu_check.step_speed import SMALL
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.fp8 import SCALINGS, Quantized, quantize_into, scale_shape
from tide_megatron.models.fp8_engine import fp8_engine
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.quantized import scaled_product
from tide_megatron.models.spec import ModelOptions
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

TOKENS = 3 * SAMPLES * LENGTH
"""That a block-diffusion teacher reads in complementary views of a microbatch."""
CALLS = 10
ROUNDING, FP8, UNRELATED = 2e-2, 0.5, 1.2
"""Norm of the difference over the norm, at most: of two orders of sums in bf16; of FP8 in one layer; of FP8
through a whole model with random weights, where little is left to demand: unrelated answers are 1.4 apart."""


def apart(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def _faults(distance: float, limit: float) -> list[str]:
    return [] if distance <= limit else [f"answers are {distance:.1e} apart, more than {limit}"]


def check_linears(place: Place) -> list[Row]:
    """Time WeDLM's four products in bf16 and in FP8, activations quantised on the way."""
    found = asked(time_linears, (place.is_rehearsal,), place)
    each = [
        f"{name} {pair['bf16']:.2f} / {pair['fp8']:.2f} ms ({pair['bf16'] / pair['fp8']:.2f}x, product alone "
        f"{pair['bf16'] / pair['product']:.2f}x)"
        for name, pair in found["each"].items()
    ]
    text = f"bf16 / FP8 rowwise, {found['tokens']} tokens: {', '.join(each)}; all {found['speedup']:.2f}x"
    return [judged("linears", text, _faults(found["apart"], 0.1), **found)]


def time_linears(small: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Return milliseconds of each matrix by form; a rank function."""
    architecture = architecture_of(WEDLM_8B | (SMALL if small else {}))
    hidden, width = architecture.hidden, architecture.feed_forward
    inner = architecture.heads * architecture.head_dim
    queries = inner + 2 * architecture.query_groups * architecture.head_dim
    shapes = {
        "qkv": (queries, hidden),
        "proj": (hidden, inner),
        "fc1": (2 * width, hidden),
        "fc2": (hidden, width),
    }
    tokens, each, distances = 128 if small else TOKENS, {}, []
    for name, (out, inside) in shapes.items():
        rows, weight = (
            torch.randn(size, inside, device=device.torch_device, dtype=torch.bfloat16)
            for size in (tokens, out)
        )
        each[name], distance = _linear(rows, weight, device)
        distances.append(distance)
    sums = {form: sum(pair[form] for pair in each.values()) for form in ("bf16", "fp8", "product")}
    return {
        "each": each,
        "tokens": tokens,
        "speedup": sums["bf16"] / sums["fp8"],
        "product_speedup": sums["bf16"] / sums["product"],
        "apart": max(distances),
    }


@torch.no_grad()
def _linear(rows: Tensor, weight: Tensor, device: Device) -> tuple[dict[str, float], float]:
    """Time one matrix; return milliseconds by form, and how far FP8's answer is from bf16's."""
    scaling = SCALINGS["rowwise"]
    held, given = (
        _quantized(matrix, block) for matrix, block in ((weight, scaling.weights), (rows, scaling.inputs))
    )
    one = torch.ones((), device=rows.device)

    def product() -> Tensor:
        if device.type == "cuda":
            scales = (given.scale, held.scale.t())
            return torch._scaled_mm(given.data, held.data.t(), *scales, out_dtype=torch.bfloat16)
        return torch._scaled_mm(given.data, held.data.t(), one, one, out_dtype=torch.float32)

    works: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: torch.nn.functional.linear(rows, weight),
        "fp8": lambda: scaled_product(rows, held, scaling),
        "product": product,
    }
    distance = apart(works["fp8"](), works["bf16"]())
    for work in works.values():  # warm up
        work()
    return {name: 1e3 * timed(work, CALLS, device) for name, work in works.items()}, distance


def _quantized(matrix: Tensor, block: tuple[int | None, int | None]) -> Quantized:
    scale = torch.empty(scale_shape(matrix.shape, block), device=matrix.device)
    into = Quantized(torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device), scale, block)
    quantize_into(matrix, into, is_power_of_two=False)
    return into


def check_mixture(place: Place) -> list[Row]:
    """Time one of LLaDA2-mini's mixture layers, by the form of its experts."""
    found = asked(time_mixture, (place.is_rehearsal,), place)
    told = ", ".join(f"{name} {spent:.2f}" for name, spent in found["ms"].items())
    text = f"{found['tokens']} tokens, ms: {told}; {found['best']} {found['speedup']:.1f}x megatron-core's"
    faults = [
        fault
        for name, distance in found["apart"].items()
        for fault in _faults(distance, FP8 if name.startswith("FP8") else ROUNDING)
    ]
    return [judged("mixture layer", text, faults, **found)]


@torch.no_grad()
def time_mixture(small: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Return milliseconds of the layer by form, router and combination with it; a rank function."""
    config = LLADA2_MINI | ({**SMALL, **SMALL_MIXTURE} if small else {})
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 64}
    tokens = 128 if small else 2 * SAMPLES * LENGTH
    torch.manual_seed(3)
    hidden = torch.randn(tokens, 1, config["hidden_size"], device=device.torch_device)
    hidden = hidden.to(_precision(device).dtype)
    ours = "loop" if device.type == "cpu" else "grouped"
    forms = {"megatron-core's": "sequential", "one after the other": "sequential", ours: ours, "FP8": "auto"}
    spent, distances, wanted = {}, {}, None
    for name, form in forms.items():
        layer = _mixture_layer(config, form, name, device)
        answer = layer(hidden)[0]
        wanted = answer if wanted is None else wanted
        distances[name] = apart(answer, wanted)
        spent[name] = 1e3 * timed(functools.partial(layer, hidden), CALLS, device)
    return {
        "ms": spent,
        "best": ours,
        "speedup": spent["megatron-core's"] / spent[ours],
        "fp8_speedup": spent[ours] / spent["FP8"],
        "apart": distances,
        "tokens": tokens,
    }


def _mixture_layer(config: dict[str, Any], form: str, name: str, device: Device) -> Any:
    """Return a mixture layer with the same weights in any form."""
    precision = _precision(device)
    fp8 = Fp8Options() if name == "FP8" else None
    engine = Engine() if fp8 is None else fp8_engine("auto", fp8, precision, device)
    options = ModelOptions(device=device, precision=precision, experts=form, fp8=fp8, engine=engine)
    model = build_model(architecture_of(config), make_groups(Layout()), options)
    draw_there(model, 2, 0.02)
    layer = model.decoder.layers[0].mlp
    if name == "megatron-core's":
        layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
            layer.num_local_experts, layer.local_expert_indices, layer.config, model.groups
        )
    return layer


def _precision(device: Device) -> Precision:
    return Precision("bf16" if device.type == "cuda" else "fp32")


def check_head(place: Place) -> list[Row]:
    """Time the head of the shared pipeline over the floor of its four products."""
    vocabulary, rows, hidden = (512, 850, 64) if place.is_rehearsal else (151_936, 3_400, 4_096)
    row = time_head(vocabulary, rows, torch.device(place.device), hidden)
    best = row.figures.get("fused compiled") or row.figures["fused eager"]
    return [dataclasses.replace(row, check="head", figures=row.figures | {"over_floor": best["over_floor"]})]


def check_forward(place: Place, pipeline: Pipeline) -> list[Row]:
    """Time a whole teacher's forward pass over a microbatch in complementary views, in bf16 and in FP8."""
    found = asked(time_forward, (pipeline, place.is_rehearsal), place)
    name = "dense forward" if pipeline == "shared" else "mixture forward"
    text = (
        f"{found['tokens']} tokens: bf16 {found['bf16']:.1f} ms, FP8 {found['fp8']:.1f} ms "
        f"({found['bf16'] / found['fp8']:.2f}x), hidden states {found['apart']:.1%} apart"
    )
    return [judged(name, text, _faults(found["apart"], UNRELATED), **found)]


def time_forward(pipeline: Pipeline, small: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Return milliseconds by precision, with the same weights; a rank function."""
    plain = dataclasses.replace(setting_of(pipeline, "ours", small=small), fp8=None)
    quantized = dataclasses.replace(plain, fp8=Fp8Options())
    dtype = torch.float32 if small else torch.bfloat16
    config = plain.teacher_config()
    needed = 1.2 * sum(weight_bytes(config, dtype, setting.fp8) for setting in (plain, quantized))
    require_room(needed, device)
    found: dict[str, Any] = {}
    answers = []
    for name, setting in (("bf16", plain), ("fp8", quantized)):
        work, tokens = _forward(make_teacher_model(setting, device), setting, device)
        answers.append(work())
        found |= {name: 1e3 * timed(work, 1 if small else CALLS, device), "tokens": tokens}
    return found | {"apart": apart(answers[1], answers[0])}


def _forward(model: TideModel, setting: Setting, device: Device) -> tuple[Callable[[], Tensor], int]:
    """Return the forward pass of a microbatch's view, and its tokens."""
    noised = Noiser(seed=setting.seed, whole_chunks_of=() if setting.pipeline == "shared" else (TEACHER,))(
        batch_of(setting, 0).to(device.torch_device)
    )
    (view,) = view_builder_of(setting).views(TEACHER, noised)

    @torch.no_grad()
    def work() -> Tensor:
        return model.rows(view)

    return work, view.ids.numel()
