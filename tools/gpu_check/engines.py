"""Engines, forms of experts and FP8 products that claim the same arithmetic, side by side on one device.

Models are small with random weights, the same ones in every form (`draw_weights` goes through the mapping of
names); widths are multiples of 128, which every kernel takes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench.shapes import LLADA2_MINI, WEDLM_8B
from gpu_check.rows import NotMeasured, Place, Row, judged
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.base.transformer_engine import find_transformer_engine
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View, view_of_parts
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.fp8_engine import fp8_engine
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

NARROW = {"num_hidden_layers": 2, "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4}
NARROW |= {"num_key_value_heads": 2, "intermediate_size": 384, "vocab_size": 512, "initializer_range": 0.05}
DENSE: dict[str, Any] = WEDLM_8B | NARROW
MIXTURE: dict[str, Any] = LLADA2_MINI | NARROW | {"num_experts": 16, "moe_intermediate_size": 128}
MIXTURE |= {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
MODELS = {"dense": DENSE, "mixture": MIXTURE}
SAMPLES, LENGTH = 4, 96
CLOSE = {"bf16": 1e-2, "fp32": 1e-3}
"""Norm of the difference over the norm, at most: two orders of the same sums of one product; by what is not
in FP8. Whole models are no measure of it: a sum that is rounded the other way in bf16 is quantised the other
way in the next layer, and after two layers of random weights the answers are 6 to 14 % apart (tried on a CPU,
with a noise of 1e-5 to 1e-3 on every sum)."""
SUMS = 4e-2
"""The same for a mixture layer, whose second product quantises what the first one rounded."""
RECIPES = {"cuda": ("rowwise", "tensorwise"), "cpu": ("rowwise",)}
"""A rehearsal makes one."""
ROUNDED = 0.1
"""The same for whole models in bf16 without FP8."""
MOVED = 0.4
"""How far FP8 may move a small random model's hidden states; it moved them by up to 0.23 on a CPU."""


def check_own(place: Place) -> list[Row]:
    """Compare grouped experts with the loop, forward and backward, and torch's FP8 products with casts."""
    return _rows("engines", run_ranks(own, (), 1, place.device))


def check_te(place: Place) -> list[Row]:
    """Compare Transformer Engine's layers with the local ones, and its FP8 with casts."""
    if place.transformer_engine is None or place.device != "cuda":
        raise NotMeasured("Transformer Engine's layers need a GPU, and the pack that the assets bring")
    return _rows("engines TE", run_ranks(transformer_engine, (), 1, place.device))


def _rows(check: str, found: dict[str, tuple[float, float] | str]) -> list[Row]:
    """Judge distances by their limits; a word says why there is none."""
    rows = []
    for name, seen in found.items():
        if isinstance(seen, str):
            rows.append(Row(check=check, verdict="not measured", text=f"{name}: {seen}"))
            continue
        distance, limit = seen
        faults = [] if distance <= limit else [f"more than {limit}"]
        rows.append(judged(check, f"{name}: {distance:.1e} apart", faults, distance=distance, limit=limit))
    return rows


def own(*, device: Device, stop: StopFlag) -> dict[str, tuple[float, float] | str]:
    """Return (distance, limit) of each pair of forms that need torch alone; a rank function."""
    found: dict[str, tuple[float, float] | str] = {}
    close = CLOSE["bf16"]
    forms = [_trained(form, device) for form in ("loop", "grouped")]
    for name in forms[0]:
        found[f"grouped experts beside the loop, {name}"] = (apart(forms[1][name], forms[0][name]), close)
    for model in MODELS:
        for recipe in RECIPES[device.type]:
            found |= _products(model, recipe, device)
    return found


def transformer_engine(*, device: Device, stop: StopFlag) -> dict[str, tuple[float, float] | str]:
    """Return (distance, limit) of each pair with Transformer Engine in it; a rank function."""
    library = find_transformer_engine()
    if not library.is_usable:
        return {"Transformer Engine": str(library)}
    found: dict[str, tuple[float, float] | str] = {}
    for model in MODELS:
        build = functools.partial(_build, model, device, "bf16")
        local, te = (_answer(build(engine=Engine(name=name)), device) for name in ("local", "te"))
        found[f"{model}, te beside local"] = (apart(te, local), ROUNDED)
        for recipe in ("blockwise", "tensorwise"):
            found |= _moved(model, recipe, local, device)
    return found


def _products(model: str, recipe: str, device: Device) -> dict[str, tuple[float, float] | str]:
    """Compare torch's FP8 products with casts, on the same inputs: linears, or a whole mixture layer."""
    name, word = f"{model}, FP8 {recipe}", "bf16" if device.type == "cuda" else "fp32"
    fp8, precision = Fp8Options(recipe=recipe), Precision(word)
    try:
        engines = [fp8_engine(engine, fp8, precision, device) for engine in ("scaled", "emulated")]
    except ConfigError as lack:
        return {name: str(lack)}
    layers = [_build(model, device, word, fp8=fp8, engine=engine).decoder.layers[-1] for engine in engines]
    if model == "mixture":
        parts = {"mlp": NARROW["hidden_size"]}
    else:
        heads = NARROW["num_attention_heads"] * NARROW["head_dim"]
        parts = {"self_attention.linear_qkv": NARROW["hidden_size"], "self_attention.linear_proj": heads}
        parts |= {"mlp.linear_fc1": NARROW["hidden_size"], "mlp.linear_fc2": NARROW["intermediate_size"]}
    found: dict[str, tuple[float, float] | str] = {}
    for part, width in parts.items():
        states = _states(width, device, precision.dtype)
        with torch.no_grad():
            scaled, emulated = (layer.get_submodule(part)(states)[0] for layer in layers)
        limit = SUMS if model == "mixture" and word == "bf16" else CLOSE[word]
        found[f"{name}, {part}, scaled beside casts"] = (apart(scaled, emulated), limit)
    return found


def _moved(model: str, recipe: str, plain: Tensor, device: Device) -> dict[str, tuple[float, float] | str]:
    """Say how far Transformer Engine's FP8 moves a model's answer, and how far casts do."""
    fp8, precision = Fp8Options(recipe=recipe), Precision("bf16")
    distances = {}
    for engine in ("emulated", "te"):
        try:
            chosen = fp8_engine(engine, fp8, precision, device)
        except ConfigError as lack:
            return {f"{model}, FP8 {recipe}, {engine}": str(lack)}
        answer = _answer(_build(model, device, "bf16", fp8=fp8, engine=chosen), device)
        distances[engine] = apart(answer, plain)
    told = f"{model}, te's FP8 {recipe} beside bf16 (casts: {distances['emulated']:.1e})"
    return {told: (distances["te"], MOVED)}


def _build(model: str, device: Device, precision: str, **options: Any) -> TideModel:
    config = MODELS[model]
    architecture = ARCHITECTURES[config["model_type"]].from_hf(config)
    how = ModelOptions(device=device, precision=Precision(precision), **options)
    built = build_model(architecture, make_groups(Layout()), how)
    draw_weights(built, 5)
    return built


@torch.no_grad()
def _answer(model: TideModel, device: Device) -> Tensor:
    """Return the hidden states of every position."""
    return model.rows(_view(device))


def _view(device: Device) -> View:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(NARROW["vocab_size"], (SAMPLES, LENGTH), generator=generator)
    ids = ids.to(device.torch_device)
    rows = torch.arange(ids.numel(), device=ids.device)
    return view_of_parts(ids, Context(kind="bidirectional"), None, rows)


def _states(width: int, device: Device, dtype: torch.dtype) -> Tensor:
    """Draw [tokens, samples, width]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(LENGTH, SAMPLES, width, generator=generator).to(device.torch_device, dtype)


def _trained(form: str, device: Device) -> dict[str, Tensor]:
    """Return a mixture layer's answer in bf16, and gradients of its input and of one expert."""
    model = _build("mixture", device, "bf16", trainable=True, experts=form)
    layer = model.decoder.layers[-1].mlp
    hidden = _states(NARROW["hidden_size"], device, torch.bfloat16).requires_grad_(True)
    answer = layer(hidden)[0]
    answer.float().square().sum().backward()
    first = layer.experts.local_experts[0]
    gradients = {name: getattr(first, name).weight.grad for name in ("linear_fc1", "linear_fc2")}
    return {"answer": answer.detach(), "input's gradient": hidden.grad, **gradients}


def apart(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())
